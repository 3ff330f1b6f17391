"""Imports, exports, checks and runs GeoCLIP's published encoders.

`python -m geotoken_jax.interop.geoclip ACTION`:

- `check WEIGHTS FILE.npz`: prints the largest error of each quantity stored in FILE.npz (listed in docs/fidelity.md).
- `import WEIGHTS OUT.safetensors`: converts published weights to a parameter file of `GeoCLIP`.
- `export PARAMETERS.safetensors OUT`: converts a parameter file to a state dict of the published model.

WEIGHTS is one of

- GeoCLIP's name on the Hugging Face hub, VicenteVivanco/geoclip-geolocation, or a folder with the files of this
  release (`config.json`, `model.safetensors` and a CSV of coordinates);
- the wheel that `pip download --no-deps geoclip` fetches, or a folder with the wheel's `.pth` files;
- a state dict of the whole published model as a `.pth`, `.safetensors` or `.npz` file.

Only a `.pth` state dict needs torch; the wheel's `.pth` files do not. No code of the wheel is run, and only tensors are
unpickled. `GeoCLIPPredictor` runs the encoders for `geotoken predict --method=geoclip`.
"""

import argparse
import glob
import io
import math
import pathlib
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
from jaxtyping import Float, UInt8

from geotoken_jax import checkpoint, hub
from geotoken_jax.align.heads import AlignModel, Head
from geotoken_jax.align.location_encoder import Capsules, LocationSettings
from geotoken_jax.backbone import HuggingFaceSettings
from geotoken_jax.backbone.checkpoint import read_json
from geotoken_jax.backbone.clip import Clip
from geotoken_jax.backbone.huggingface import HuggingFace
from geotoken_jax.configuration import InitSettings
from geotoken_jax.gallery import encodings
from geotoken_jax.interop import official
from geotoken_jax.interop.official import Weights
from geotoken_jax.predict.answer import with_places
from geotoken_jax.predict.prediction import Candidate, Prediction
from geotoken_jax.predict.predictor import Predictor, spread
from geotoken_jax.settings import SettingsError

#: Name of GeoCLIP's release on the Hugging Face hub, which `GeoCLIP.from_pretrained` of geoclip 1.2.2 and later reads.
HUB = "VicenteVivanco/geoclip-geolocation"
#: The backbone that GeoCLIP was trained on.
_CLIP = "openai/clip-vit-large-patch14"
#: Prefix of tensor names in the state dict of the whole model -> file of the wheel that contains these tensors.
_FILES = {
    "location_encoder.": "location_encoder_weights.pth",
    "image_encoder.mlp.": "image_encoder_mlp_weights.pth",
    "logit_scale": "logit_scale_weights.pth",
}
_IN_WHEEL, _GALLERY = "geoclip/model/weights", "geoclip/model/gps_gallery/coordinates_100K.csv"
#: Name prefixes of tensors of the whole model that are not imported: the CLIP backbone and the coordinates.
_UNUSED = ("image_encoder.CLIP.", "gps_gallery", "gps_queue")

#: Number of gallery coordinates that a prediction lists as candidates.
_CANDIDATES = 20


class GeoCLIP(nnx.Module):
    """GeoCLIP's trained parameters: image head, location encoder and logit scale (Vivanco Cepeda et al. 2023).

    The score of coordinates for a photo is exp(scale) times the cosine similarity of image(CLIP's image embedding) and
    location.features(coordinates).
    """

    def __init__(self, location: LocationSettings, image: tuple[int, int, int], *, rngs: nnx.Rngs):
        """image: widths of the head's input, hidden layer and output."""
        self.image = Head(image, 0.0, rngs=rngs)
        self.location = Capsules(location, rngs=rngs)
        self.scale = nnx.Param(jnp.zeros(()))


def import_(path: epath.PathLike, projection: str = "equal_earth") -> GeoCLIP:
    """Returns GeoCLIP with published weights.

    path: see `read_weights`. projection: "equal_earth" for GeoCLIP, "mercator" for the variant of G3.
    """
    return from_state_dict(read_weights(path), projection)


def from_state_dict(weights: Weights, projection: str = "equal_earth") -> GeoCLIP:
    """Returns GeoCLIP with the weights of the whole model's state dict.

    projection: see `import_`. Raises ValueError if a tensor is missing, unknown or of the wrong shape.
    """
    used = {name: value for name, value in weights.items() if not name.startswith(_UNUSED)}
    capsules = {name.split(".")[1] for name in used if re.match(r"location_encoder\.LocEnc\d+\.", name)}
    fourier, _ = official._shape(used, "location_encoder.LocEnc0.capsule.0.b", 2)
    out, hidden = official._shape(used, "location_encoder.LocEnc0.head.0.weight", 2)
    middle, width = official._shape(used, "image_encoder.mlp.0.weight", 2)
    image_out, _ = official._shape(used, "image_encoder.mlp.2.weight", 2)
    location = LocationSettings(projection, (1.0,) * len(capsules), fourier, hidden, out)
    model = GeoCLIP(location, (width, middle, image_out), rngs=nnx.Rngs(0))
    _load(_variables(model), used)
    return model


def to_state_dict(model: GeoCLIP) -> dict[str, np.ndarray]:
    """Returns the state dict of the published model, with its tensor names and layouts."""
    variables = _variables(model).items()
    return {name: np.array(_transposed(name, np.asarray(variable[...])), order="C") for name, variable in variables}


class GeoCLIPPredictor(Predictor):
    """GeoCLIP as published: ranks the 100,000 coordinates of its gallery by a softmax over their scores for a photo."""

    batch_size = 32

    def __init__(self, clip: epath.PathLike | None = None, weights: epath.PathLike = HUB):
        """Encodes the gallery, which takes some seconds. Models on the hub are downloaded at their first use.

        clip: checkpoint of CLIP ViT-L/14, as a folder or a name on the hub; if None, the checkpoint that GeoCLIP was
        trained on. weights: name of GeoCLIP's release on the hub, folder with the release's files, the wheel, or folder
        with the wheel's `.pth` files and coordinates_100K.csv. Raises SettingsError if one of them cannot be read, or
        if the widths of CLIP and GeoCLIP differ.
        """
        #: Local file or folder with GeoCLIP's weights.
        self.folder = hub.resolve(weights, _RELEASE)
        try:
            model = import_(self.folder)
            self._coordinates = read_gallery(self.folder)
            clip = str(clip or _backbone(self.folder))
        except SettingsError:
            raise
        except (ValueError, OSError, ModuleNotFoundError) as error:
            raise SettingsError(
                f"{self.folder} cannot be read as GeoCLIP's weights ({error}): use {HUB}, or the wheel that `pip "
                "download --no-deps geoclip` fetches; if it is in the hub's cache, remove it and run the same command "
                "again"
            ) from error
        self._clip = HuggingFace(HuggingFaceSettings(clip, "float32", self.batch_size))
        width = model.image.hidden.in_features
        if self._clip.width != width or not isinstance(self._clip.model, Clip):
            kind = "CLIP" if isinstance(self._clip.model, Clip) else "SigLIP"
            raise SettingsError(
                f"{clip} is {kind} of width {self._clip.width}, but GeoCLIP needs CLIP of width {width}: give CLIP "
                f"ViT-L/14 ({_CLIP})"
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

    def prepare(self, photo: Any) -> UInt8[np.ndarray, "h w 3"]:
        return self._clip.prepare(photo)

    def predict_prepared(self, photos: Sequence[np.ndarray], captured: Any = None) -> list[Prediction]:
        del captured
        probabilities = np.asarray(self._run(jnp.asarray(self._clip.images(np.stack(photos)))))
        return with_places([self._answer(p) for p in probabilities])

    def _answer(self, probability: Float[np.ndarray, "N"]) -> Prediction:
        best = np.argsort(-probability, kind="stable")[:_CANDIDATES]
        latitude, longitude = self._coordinates[best].T.tolist()
        candidates = tuple(map(Candidate, latitude, longitude, probability[best].tolist()))
        uncertainty = spread(self._coordinates[best[0]], self._coordinates, probability)
        return Prediction(latitude[0], longitude[0], *uncertainty, candidates, (), ())


def start(settings: InitSettings) -> Callable[[AlignModel], None] | None:
    """Returns a function that copies GeoCLIP's weights into an alignment model's location encoder.

    The function copies the weights of the capsules, the parts of the encoder for one scale each. The encoder also has
    an MLP after the capsules, which GeoCLIP does not have. Its weights stay random, as in G3.

    settings: config.align.init. If its `location` is empty, the result is None. Raises SettingsError if the weights
    cannot be read. The returned function raises SettingsError if they do not fit config.align.model.location.
    """
    if not settings.location:
        return None
    try:
        weights = read_weights(settings.location)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise SettingsError(
            f"config.align.init.location is {settings.location!r}, which cannot be read ({error}): set it to {HUB}, to "
            "GeoCLIP's wheel, or to '' for random weights"
        ) from error
    weights = {name: value for name, value in weights.items() if name.startswith("location_encoder.")}

    def initialize(model: AlignModel) -> None:
        try:
            _load(dict(_capsules(model.location)), weights)
        except ValueError as error:
            raise SettingsError(
                f"config.align.init.location is {settings.location!r}, which does not fit "
                f"config.align.model.location: {error}; set config.align.model.location to the sizes of these weights, "
                "or config.align.init.location to '' for random weights"
            ) from error

    return initialize


def _variables(model: GeoCLIP) -> dict[str, nnx.Variable]:
    """Returns the variables of our model, by name of the published tensor.

    For linear layers, the variable is a kernel, which is the transposed published weight.
    """
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


def _transposed(name: str, value: np.ndarray) -> np.ndarray:
    return value.T if name.endswith(".weight") else value


def _load(variables: Mapping[str, nnx.Variable], weights: Weights) -> None:
    missing, extra = sorted(variables.keys() - weights.keys()), sorted(weights.keys() - variables.keys())
    if missing or extra:
        problem = f"lacks {missing[0]}" if missing else f"has an unknown tensor {extra[0]}"
        raise ValueError(f"the state dict {problem} ({len(missing)} missing, {len(extra)} extra)")
    for name, variable in variables.items():
        value = _transposed(name, weights[name])
        if value.shape != variable.shape:
            raise ValueError(f"{name} has the shape {value.shape} in our layout, but {variable.shape} is needed")
        variable[...] = jnp.asarray(value)


def read_weights(path: epath.PathLike) -> dict[str, np.ndarray]:
    """Returns the weights with the tensor names of the whole model's state dict.

    path: see WEIGHTS in the module's docstring. Raises ValueError if the path is not one of the listed kinds or cannot
    be downloaded, and FileNotFoundError if a file is missing.
    """
    path = hub.resolve(path, _RELEASE)
    if _is_release(path):
        return official.read_weights(path / "model.safetensors")
    if not path.is_dir() and path.suffix != ".whl":
        return official.read_weights(path)
    weights = {}
    for prefix, file in _FILES.items():
        tensors = _read_pth(f"{path}: {file}", _member(path, f"{_IN_WHEEL}/{file}"))
        weights |= {prefix + name: value for name, value in tensors.items()}
    return weights


def read_gallery(path: epath.PathLike) -> Float[np.ndarray, "N 2"]:
    """Returns GeoCLIP's gallery: 100,000 coordinates, in degrees.

    path: name of GeoCLIP's release on the hub, folder with the release's files, the wheel, or folder with
    coordinates_100K.csv.
    """
    path = hub.resolve(path, _RELEASE)
    file = _release_config(path)["gallery_file"] if _is_release(path) else _GALLERY
    return np.loadtxt(io.BytesIO(_member(path, file)), delimiter=",", skiprows=1, ndmin=2)


def _is_release(path: epath.Path) -> bool:
    return (path / "config.json").exists()


def _release_config(folder: epath.Path, name: str | None = None) -> dict[str, Any]:
    """Returns the config.json of a release of GeoCLIP. Raises SettingsError if it has another model or format.

    folder: folder of the release. name: name of the release in messages; if None, messages name the folder.
    """
    config = read_json(pathlib.Path(folder), "config.json")
    kind, version = (config.get(key) for key in ("model_type", "format_version"))
    gallery = config.get("gallery_file")
    if (kind, version) != ("geoclip-geolocation", 1) or not isinstance(gallery, str) or "/" in gallery:
        raise SettingsError(
            f"{name or folder} has a model of model_type {kind!r}, format {version}, with the gallery {gallery!r}, not "
            f"GeoCLIP's geoclip-geolocation, format 1, with a CSV file: give {HUB}"
        )
    return config


def _patterns(name: str, folder: epath.Path) -> list[str]:
    return ["model.safetensors", glob.escape(_release_config(folder, name)["gallery_file"])]


_RELEASE = hub.Kind("config.json", f"it is not GeoCLIP; give {HUB}", _patterns)


def _backbone(path: epath.Path) -> str:
    """Returns the name on the hub of the CLIP that GeoCLIP needs, with a commit if the release names one."""
    backbone = _release_config(path).get("backbone", {}) if _is_release(path) else {}
    return "@".join(backbone[key] for key in ("repo_id", "revision") if key in backbone) or _CLIP


def _member(path: epath.Path, name: str) -> bytes:
    if path.is_dir():
        return (path / name.rsplit("/")[-1]).read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as wheel:
            return wheel.read(name)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is not GeoCLIP's wheel ({error}): run `pip download --no-deps geoclip`, and use its file"
        ) from None


def _read_pth(file: str, data: bytes) -> dict[str, np.ndarray]:
    """Returns the float32 tensors in a file that torch.save wrote. A single tensor without a dict gets the name "".

    file: path of the file, for messages. data: its contents.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            (index,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            tensors = _Tensors(archive, index).load()
    except Exception as error:  # a damaged file can raise almost any exception
        raise ValueError(
            f"{file} cannot be read as float32 tensors ({error}): download GeoCLIP's wheel again"
        ) from error
    tensors = tensors if isinstance(tensors, dict) else {"": tensors}
    for name, value in tensors.items():
        if not (isinstance(name, str) and isinstance(value, np.ndarray)):
            raise ValueError(
                f"{file} cannot be read as float32 tensors (entry {name!r} is not a tensor): download GeoCLIP's "
                "wheel again"
            )
    return tensors


class _Tensors(pickle.Unpickler):
    """Unpickles dicts and float32 tensors without torch, and nothing else.

    A pickle names the functions and classes that it needs. This class accepts three names, which torch writes for dicts
    and float32 tensors, and replaces each with a harmless equivalent. Other names raise UnpicklingError. A file can
    therefore not run code.
    """

    def __init__(self, archive: zipfile.ZipFile, index: str):
        super().__init__(io.BytesIO(archive.read(index)))
        self._archive, self._folder = archive, index.removesuffix("data.pkl")

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            "torch._utils._rebuild_tensor_v2": _tensor,
            "torch.FloatStorage": "float32",
            "collections.OrderedDict": dict,
        }
        if f"{module}.{name}" not in allowed:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return allowed[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> np.ndarray:
        _, _, key, _, size = pid
        return np.frombuffer(self._archive.read(f"{self._folder}data/{key}"), "<f4", size)


def _tensor(storage: np.ndarray, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any) -> np.ndarray:
    contiguous = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    if list(strides) != contiguous:
        raise pickle.UnpicklingError("a tensor is not contiguous")
    return storage[offset:][: math.prod(shape)].reshape(shape)


def check(weights: Weights, path: epath.PathLike) -> dict[str, float]:
    """Returns the largest absolute error of each quantity stored in a file of reference values.

    weights: published weights. path: `.npz` file of outputs of the published model; docs/fidelity.md lists its arrays.
    """
    with np.load(io.BytesIO(epath.Path(path).read_bytes()), allow_pickle=False) as file:
        stored = official._StoredArrays({name: file[name] for name in file.files})
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
    errors = check(read_weights(options.weights), options.file)
    for name, value in errors.items():
        print(f"{name:22} largest error {value:.2e}{'' if value < 1e-4 else ', above the limit 1e-4'}")
    if all(value < 1e-4 for value in errors.values()):
        return 0
    print("the encoders differ from the published ones: check that WEIGHTS and FILE belong together")
    return 1


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
    """Returns the model from a parameter file that `import` wrote. Raises ValueError if a parameter is missing."""
    stored = safetensors.numpy.load(epath.Path(path).read_bytes())
    capsules = {name.split("/")[2] for name in stored if name.startswith("location/capsules/")}
    try:
        width, middle = stored["image/hidden/kernel"].shape
        out = stored["image/output/kernel"].shape[1]
        hidden, location_out = stored["location/capsules/0/output/kernel"].shape
        fourier = len(stored["location/capsules/0/frequencies"])
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}: give a parameter file that `import` wrote") from None
    location = LocationSettings("equal_earth", (1.0,) * len(capsules), fourier, hidden, location_out)
    return checkpoint.read_module(path, lambda rngs: GeoCLIP(location, (width, middle, out), rngs=rngs))


def main() -> None:
    """Runs the action named on the command line.

    The exit status is 1 if `check` finds a difference of 1e-4 or more, and 2 if a file cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog="python -m geotoken_jax.interop.geoclip",
        description="Imports, exports and checks GeoCLIP's published encoders.",
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    weights = f"{HUB} on the hub, the wheel, a folder with its .pth files, or a state dict of the whole model"
    action = actions.add_parser("check", help="compare our encoders with stored outputs of the published encoders")
    action.add_argument("weights", metavar="WEIGHTS", help=weights)
    action.add_argument("file", metavar="FILE.npz")
    action.set_defaults(run=_check)
    action = actions.add_parser("import", help="convert published weights to a parameter file")
    action.add_argument("weights", metavar="WEIGHTS", help=weights)
    action.add_argument("out", metavar="OUT.safetensors")
    action.set_defaults(run=_import)
    action = actions.add_parser("export", help="convert a parameter file to a published state dict")
    action.add_argument("parameters", metavar="PARAMETERS.safetensors")
    action.add_argument("out", metavar="OUT", help=f"file to write, one of {', '.join(official._FORMATS)}")
    action.set_defaults(run=_export)
    options = parser.parse_args()
    try:
        sys.exit(options.run(options))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
