"""GeoCLIP's trained encoders, in and out, and a check of ours against values stored from the published ones.

`python -m geotoken_jax.interop.geoclip ACTION`:

- `check WEIGHTS FILE.npz`: prints the largest error of each stored quantity (docs/fidelity.md says which).
- `import WEIGHTS OUT.safetensors`: published weights become a file of parameters of `GeoCLIP`.
- `export PARAMETERS.safetensors OUT`: and the way back, to a state dict of the published model.

WEIGHTS is the wheel that `pip download --no-deps geoclip` fetches, a folder of its `.pth` files, or a state dict of the
whole published model as a `.pth`, `.safetensors` or `.npz` file. None of it needs torch but a `.pth` of other than the
wheel's kind; nothing is imported from the wheel, and only tensors are unpickled. `Locator` answers with them, as
`geotoken predict --method=geoclip` does.
"""

import argparse
import io
import math
import pickle
import re
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath
from flax import nnx
from jaxtyping import Float

from geotoken_jax import checkpoint
from geotoken_jax.align.heads import AlignModel, Head
from geotoken_jax.align.location_encoder import Capsules, LocationSettings
from geotoken_jax.backbone import HuggingFaceSettings
from geotoken_jax.backbone.clip import Clip
from geotoken_jax.backbone.huggingface import HuggingFace
from geotoken_jax.configuration import InitSettings
from geotoken_jax.gallery import encodings
from geotoken_jax.interop import official
from geotoken_jax.interop.official import Weights
from geotoken_jax.predict.prediction import Candidate, Prediction
from geotoken_jax.predict.predictor import Predictor, spread
from geotoken_jax.settings import SettingsError

#: What precedes the names of a file's tensors in the state dict of the whole model -> the file.
_FILES = {
    "location_encoder.": "location_encoder_weights.pth",
    "image_encoder.mlp.": "image_encoder_mlp_weights.pth",
    "logit_scale": "logit_scale_weights.pth",
}
_IN_WHEEL, _GALLERY = "geoclip/model/weights", "geoclip/model/gps_gallery/coordinates_100K.csv"
#: Members of the whole state dict that are not ours to hold: the backbone, and coordinates.
_UNUSED = ("image_encoder.CLIP.", "gps_gallery", "gps_queue")

#: Places of the gallery that an answer names.
_CANDIDATES = 20


class GeoCLIP(nnx.Module):
    """What GeoCLIP has trained: the head on CLIP's image embedding, the location encoder, and the logit scale.

    A photo's score at a place is exp(scale) times the cosine of image(embedding) and location.features(coordinates).
    (Vivanco Cepeda et al. 2023.)
    """

    def __init__(self, location: LocationSettings, image: tuple[int, int, int], *, rngs: nnx.Rngs):
        """image: widths of the head's input, hidden layer and output."""
        self.image = Head(image, 0.0, rngs=rngs)
        self.location = Capsules(location, rngs=rngs)
        self.scale = nnx.Param(jnp.zeros(()))


def import_(path: epath.PathLike, projection: str = "equal_earth") -> GeoCLIP:
    """Returns the encoders whose weights `read_weights` finds; projection: "mercator" is G3's."""
    return from_state_dict(read_weights(path), projection)


def from_state_dict(weights: Weights, projection: str = "equal_earth") -> GeoCLIP:
    """Returns our model with the published weights. Raises ValueError naming a missing, extra or misshapen tensor."""
    used = {name: value for name, value in weights.items() if not name.startswith(_UNUSED)}
    capsules = {name.split(".")[1] for name in used if re.match(r"location_encoder\.LocEnc\d+\.", name)}
    fourier, _ = official._shape(used, "location_encoder.LocEnc0.capsule.0.b", 2)
    out, hidden = official._shape(used, "location_encoder.LocEnc0.head.0.weight", 2)
    middle, width = official._shape(used, "image_encoder.mlp.0.weight", 2)
    image_out, _ = official._shape(used, "image_encoder.mlp.2.weight", 2)
    location = LocationSettings(projection, (1.0,) * len(capsules), fourier, hidden, out)
    model = GeoCLIP(location, (width, middle, image_out), rngs=nnx.Rngs(0))
    _load(_places(model), used)
    return model


def to_state_dict(model: GeoCLIP) -> dict[str, np.ndarray]:
    """Returns the weights under their names in the published model's whole state dict, layouts included."""
    places = _places(model).items()
    return {name: np.array(_turned(name, np.asarray(variable[...])), order="C") for name, variable in places}


class Locator(Predictor):
    """GeoCLIP as published, without any training of ours: CLIP, its trained encoders, and the coordinates of its
    gallery, among which it chooses by softmax."""

    batch_size = 32

    def __init__(self, clip: epath.PathLike, weights: epath.PathLike):
        """clip: checkpoint folder of CLIP ViT-L/14, as Hugging Face publishes it. weights: the wheel, or a folder of
        its `.pth` files and its coordinates_100K.csv.

        Encodes the gallery, which takes some seconds. Raises SettingsError for a folder or weights that will not do.
        """
        self._clip = HuggingFace(HuggingFaceSettings(str(clip), "float32", self.batch_size))
        try:
            model = import_(weights)
            self._coordinates = read_gallery(weights)
        except (ValueError, OSError, ModuleNotFoundError) as error:
            raise SettingsError(f"{weights} cannot be read as GeoCLIP's weights: {error}") from error
        width = model.image.hidden.in_features
        if self._clip.width != width or not isinstance(self._clip.model, Clip):
            kind = "CLIP" if isinstance(self._clip.model, Clip) else "SigLIP"
            raise SettingsError(
                f"{clip} is {kind} {self._clip.width} wide, and GeoCLIP stands on CLIP {width} wide: name a checkpoint "
                "folder of CLIP ViT-L/14 (openai/clip-vit-large-patch14)"
            )
        blocks = encodings.encoder(model.location, lambda location, x: location.features(x))(self._coordinates)
        encoded = jnp.concatenate([jnp.asarray(block) for block in blocks])

        @jax.jit
        def run(features: jax.Array) -> jax.Array:
            with jax.default_matmul_precision("highest"):
                image = model.image(features)
                image = image / jnp.linalg.norm(image, axis=-1, keepdims=True)
                return jax.nn.softmax(jnp.exp(model.scale[...]) * image @ encoded.T)

        self._run = run

    def _predict(self, photos: Sequence[Any], captured: Any) -> list[Prediction]:
        del captured
        prepared = np.stack([self._clip.prepare(photo) for photo in photos])
        return [self._answer(p) for p in np.asarray(self._run(jnp.asarray(self._clip.images(prepared))))]

    def _answer(self, probability: Float[np.ndarray, "N"]) -> Prediction:
        best = np.argsort(-probability, kind="stable")[:_CANDIDATES]
        latitude, longitude = self._coordinates[best].T.tolist()
        candidates = tuple(map(Candidate, latitude, longitude, probability[best].tolist()))
        sure = spread(self._coordinates[best[0]], self._coordinates, probability)
        return Prediction(latitude[0], longitude[0], *sure, candidates, (), ())


def start(settings: InitSettings) -> Callable[[AlignModel], None] | None:
    """Returns what puts the capsules' weights into a new alignment model, for AlignTask; None where none are asked for.

    The MLP after the capsules, which GeoCLIP does not have, stays random, as in G3. Raises SettingsError for weights
    that are not to be had; what is returned does, for those that do not fit config.align.model.location.
    """
    if not settings.location:
        return None
    try:
        weights = read_weights(settings.location)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise SettingsError(f"config.align.init.location = {settings.location!r} cannot be read: {error}") from error
    weights = {name: value for name, value in weights.items() if name.startswith("location_encoder.")}

    def put(model: AlignModel) -> None:
        try:
            _load(dict(_capsules(model.location)), weights)
        except ValueError as error:
            raise SettingsError(
                f"config.align.init.location = {settings.location!r} does not fit config.align.model.location: {error}"
            ) from error

    return put


def _places(model: GeoCLIP) -> dict[str, nnx.Variable]:
    """Returns published name -> our variable; a linear layer's weight is our kernel transposed."""
    layers = (("image_encoder.mlp.0", model.image.hidden), ("image_encoder.mlp.2", model.image.output))
    return {
        **dict(_capsules(model.location)),
        **{name: variable for prefix, layer in layers for name, variable in _linear(prefix, layer)},
        "logit_scale": model.scale,
    }


def _capsules(location: Capsules) -> Iterator[tuple[str, nnx.Variable]]:
    for i, capsule in enumerate(location.capsules):
        prefix = f"location_encoder.LocEnc{i}"
        yield f"{prefix}.capsule.0.b", capsule.frequencies
        for number, layer in zip((1, 3, 5), capsule.layers, strict=True):
            yield from _linear(f"{prefix}.capsule.{number}", layer)
        yield from _linear(f"{prefix}.head.0", capsule.output)


def _linear(name: str, layer: nnx.Linear) -> Iterator[tuple[str, nnx.Variable]]:
    assert layer.bias is not None
    yield f"{name}.weight", layer.kernel
    yield f"{name}.bias", layer.bias


def _turned(name: str, value: np.ndarray) -> np.ndarray:
    return value.T if name.endswith(".weight") else value


def _load(places: Mapping[str, nnx.Variable], weights: Weights) -> None:
    missing, extra = sorted(places.keys() - weights.keys()), sorted(weights.keys() - places.keys())
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"has an unknown tensor {extra[0]}"
        raise ValueError(f"the state dict {what} ({len(missing)} missing, {len(extra)} extra)")
    for name, variable in places.items():
        value = _turned(name, weights[name])
        if value.shape != variable.shape:
            raise ValueError(f"{name} is {value.shape}, seen from our side, where {variable.shape} fits")
        variable[...] = jnp.asarray(value)


def read_weights(path: epath.PathLike) -> dict[str, np.ndarray]:
    """Returns the state dict of a wheel, a folder of its `.pth` files, or a file, under the whole model's names.

    Raises ValueError for what is none of these, and FileNotFoundError naming a file that is not there.
    """
    path = epath.Path(path)
    if not path.is_dir() and path.suffix != ".whl":
        return official.read_weights(path)
    found = {}
    for prefix, file in _FILES.items():
        tensors = _read_pth(file, _member(path, f"{_IN_WHEEL}/{file}"))
        found |= {prefix + name: value for name, value in tensors.items()}
    return found


def read_gallery(path: epath.PathLike) -> Float[np.ndarray, "N 2"]:
    """Returns the 100,000 coordinates, in degrees, among which GeoCLIP chooses; path: the wheel, or a folder with
    coordinates_100K.csv."""
    data = _member(epath.Path(path), _GALLERY)
    return np.loadtxt(io.BytesIO(data), delimiter=",", skiprows=1, ndmin=2)


def _member(path: epath.Path, name: str) -> bytes:
    if path.is_dir():
        return (path / name.rsplit("/")[-1]).read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as wheel:
            return wheel.read(name)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no wheel of GeoCLIP: {error}") from None


def _read_pth(file: str, data: bytes) -> dict[str, np.ndarray]:
    """Returns the tensors of a file that torch.save wrote, of float32; one that stands alone has an empty name."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            (index,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            found = _Tensors(archive, index).load()
    except Exception as error:  # whatever a damaged archive or pickle leads to
        raise ValueError(f"{file} is no file of float32 tensors alone: {error}") from error
    found = found if isinstance(found, dict) else {"": found}
    for name, value in found.items():
        if not (isinstance(name, str) and isinstance(value, np.ndarray)):
            raise ValueError(f"{file} is no file of float32 tensors alone: {name!r} in it is none")
    return found


class _Tensors(pickle.Unpickler):
    """Unpickles dicts and float32 tensors: the only names it knows are the three that torch writes for these, and what
    it gives for them is ours."""

    def __init__(self, archive: zipfile.ZipFile, index: str):
        super().__init__(io.BytesIO(archive.read(index)))
        self._archive, self._folder = archive, index.removesuffix("data.pkl")

    def find_class(self, module: str, name: str) -> Any:
        known = {
            "torch._utils._rebuild_tensor_v2": _tensor,
            "torch.FloatStorage": "float32",
            "collections.OrderedDict": dict,
        }
        if f"{module}.{name}" not in known:
            raise pickle.UnpicklingError(f"{module}.{name} is in it")
        return known[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> np.ndarray:
        _, _, key, _, size = pid
        return np.frombuffer(self._archive.read(f"{self._folder}data/{key}"), "<f4", size)


def _tensor(storage: np.ndarray, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any) -> np.ndarray:
    wanted = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    if list(strides) != wanted:
        raise pickle.UnpicklingError("a tensor in it does not lie in one piece")
    return storage[offset:][: math.prod(shape)].reshape(shape)


def check(weights: Weights, path: epath.PathLike) -> dict[str, float]:
    """Returns the largest absolute error of each quantity that a file of the form in docs/fidelity.md stores."""
    with np.load(io.BytesIO(epath.Path(path).read_bytes()), allow_pickle=False) as file:
        stored = official._Stored({name: file[name] for name in file.files})
    coordinates = jnp.asarray(stored["coordinates_lat_lon_degrees"])
    features = jnp.asarray(stored["clip_image_features"])
    model, mercator = from_state_dict(weights), from_state_dict(weights, "mercator")
    encode = nnx.jit(lambda model: (model.location.features(coordinates), model.image(features), model.scale[...]))
    location, image, scale = encode(model)
    errors = {
        "location": location - stored["location_embedding_equal_earth"],
        "location, Mercator": encode(mercator)[0] - stored["location_embedding_mercator_yx"],
        "image": image - stored["image_embedding"],
        "logit scale": scale - stored["logit_scale"],
    }
    return {name: float(np.abs(np.asarray(error)).max()) for name, error in errors.items()}


def _check(options: argparse.Namespace) -> int:
    found = check(read_weights(options.weights), options.file)
    for name, value in found.items():
        print(f"{name:22} {value:.2e}")
    return 0 if all(value < 1e-4 for value in found.values()) else 1


def _import(options: argparse.Namespace) -> int:
    state = nnx.to_pure_dict(nnx.state(import_(options.weights)))
    checkpoint.write_parameters(options.out, state)
    print(f"{options.out}: {sum(value.size for value in jax.tree.leaves(state)):,} numbers")
    return 0


def _export(options: argparse.Namespace) -> int:
    weights = to_state_dict(read(options.parameters))
    official.write_weights(options.out, weights)
    print(f"{options.out}: {len(weights)} tensors, {sum(value.size for value in weights.values()):,} numbers")
    return 0


def read(path: epath.PathLike) -> GeoCLIP:
    """Returns the model of a file that `import` wrote. Raises ValueError for any other."""
    stored = safetensors.numpy.load(epath.Path(path).read_bytes())
    capsules = {name.split("/")[2] for name in stored if name.startswith("location/capsules/")}
    try:
        width, middle = stored["image/hidden/kernel"].shape
        out = stored["image/output/kernel"].shape[1]
        hidden, location_out = stored["location/capsules/0/output/kernel"].shape
        fourier = len(stored["location/capsules/0/frequencies"])
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}: it is no file that `import` wrote") from None
    location = LocationSettings("equal_earth", (1.0,) * len(capsules), fourier, hidden, location_out)
    return checkpoint.read_module(path, lambda rngs: GeoCLIP(location, (width, middle, out), rngs=rngs))


def main() -> None:
    """Runs one action; exits with 1 where a check is past its tolerance and with 2 where a file is not what it is to
    be."""
    parser = argparse.ArgumentParser(
        prog="python -m geotoken_jax.interop.geoclip", description="GeoCLIP's trained encoders, in and out."
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    weights = "the wheel, a folder of its .pth files, or a whole state dict"
    action = actions.add_parser("check", help="compare ours with stored values of the published encoders")
    action.add_argument("weights", metavar="WEIGHTS", help=weights)
    action.add_argument("file", metavar="FILE.npz")
    action.set_defaults(run=_check)
    action = actions.add_parser("import", help="published weights to a file of parameters")
    action.add_argument("weights", metavar="WEIGHTS", help=weights)
    action.add_argument("out", metavar="OUT.safetensors")
    action.set_defaults(run=_import)
    action = actions.add_parser("export", help="a file of parameters to a published state dict")
    action.add_argument("parameters", metavar="PARAMETERS.safetensors")
    action.add_argument("out", metavar="OUT", help=f"one of {', '.join(official._FORMS)}")
    action.set_defaults(run=_export)
    options = parser.parse_args()
    try:
        sys.exit(options.run(options))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
