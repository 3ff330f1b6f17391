"""GeoCLIP's weights in our modules: the published formula with random weights, an exact export, and safe loading.

tests/interop/test_geoclip.py tests the trained weights, which are in a wheel of 40 MB.
"""

import collections
import io
import json
import pathlib
import pickle
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax import nnx

from geotoken_jax import cli, sharding
from geotoken_jax.align.heads import AlignSettings
from geotoken_jax.align.location_encoder import LocationSettings
from geotoken_jax.align.loss import LossSettings
from geotoken_jax.align.task import AlignTask
from geotoken_jax.backbone import HuggingFaceSettings
from geotoken_jax.backbone.huggingface import HuggingFace
from geotoken_jax.geo.distance import great_circle_km
from geotoken_jax.interop import geoclip
from geotoken_jax.interop.geoclip import InitSettings
from geotoken_jax.settings import SettingsError
from geotoken_jax.train.step import Trainer
from tests import checkpoints

FOURIER, HIDDEN, OUT, WIDTH = 6, 10, 8, 16
SHAPES = {
    "image_encoder.mlp.0.weight": (WIDTH, WIDTH),
    "image_encoder.mlp.0.bias": (WIDTH,),
    "image_encoder.mlp.2.weight": (OUT, WIDTH),
    "image_encoder.mlp.2.bias": (OUT,),
    "logit_scale": (),
}
for encoder in (f"location_encoder.LocEnc{i}" for i in range(3)):
    SHAPES[f"{encoder}.capsule.0.b"] = (FOURIER, 2)
    for layer, widths in {"capsule.1": (HIDDEN, 2 * FOURIER), "capsule.3": (HIDDEN, HIDDEN),
                          "capsule.5": (HIDDEN, HIDDEN), "head.0": (OUT, HIDDEN)}.items():  # fmt: skip
        SHAPES |= {f"{encoder}.{layer}.weight": widths, f"{encoder}.{layer}.bias": widths[:1]}
PLACES = np.array([[48.8584, 2.2945], [-33.8568, 151.2153], [0, 0], [89.9, -179.9], [-54.8019, -68.303]], np.float32)


@pytest.fixture
def weights():
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def published_location(weights, coordinates):
    """The published location encoder, written out in float64: Equal Earth, then each capsule."""
    latitude, longitude = np.deg2rad(coordinates.astype(float)).T
    theta = np.arcsin(np.sqrt(3) / 2 * np.sin(latitude))
    a1, a2, a3, a4 = 1.340264, -0.081106, 0.000893, 0.003796
    below = 3 * (9 * a4 * theta**8 + 7 * a3 * theta**6 + 3 * a2 * theta**2 + a1)
    x = 2 * np.sqrt(3) * longitude * np.cos(theta) / below
    y = a4 * theta**9 + a3 * theta**7 + a2 * theta**3 + a1 * theta
    projected = np.stack([x, y], 1) * 66.50336 / 180
    total = np.zeros(())
    for i in range(3):
        w = {n.split(".", 2)[2]: v.astype(float) for n, v in weights.items() if f"LocEnc{i}." in n}
        angles = 2 * np.pi * projected @ w["capsule.0.b"].T
        h = np.concatenate([np.cos(angles), np.sin(angles)], 1)
        for layer in (1, 3, 5):
            h = np.maximum(h @ w[f"capsule.{layer}.weight"].T + w[f"capsule.{layer}.bias"], 0)
        total = total + h @ w["head.0.weight"].T + w["head.0.bias"]
    return total


def test_has_the_published_models_form(weights):
    model = geoclip.from_state_dict(weights)
    features = np.random.default_rng(1).normal(size=(4, WIDTH)).astype(np.float32)
    encode = nnx.jit(lambda model: (model.location.features(jnp.asarray(PLACES)), model.image(jnp.asarray(features))))
    location, image = encode(model)
    expected = published_location(weights, PLACES)
    np.testing.assert_allclose(location, expected, atol=1e-5 * abs(expected).max())
    w = {name.removeprefix("image_encoder.mlp."): value for name, value in weights.items()}
    hidden = np.maximum(features @ w["0.weight"].T + w["0.bias"], 0)
    np.testing.assert_allclose(image, hidden @ w["2.weight"].T + w["2.bias"], atol=1e-4)
    assert float(model.scale[...]) == weights["logit_scale"]


def pth(tensors) -> bytes:
    """Returns the bytes that torch.save writes for a dict of tensors, or for one tensor."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:

        class Pickler(pickle.Pickler):
            stored = 0

            def persistent_id(self, obj):
                if not isinstance(obj, Storage):
                    return None
                file.writestr(f"name/data/{self.stored}", obj.value.tobytes())
                self.stored += 1
                return "storage", FloatStorage, str(self.stored - 1), "cpu", obj.value.size

        data = io.BytesIO()
        Pickler(data, 2).dump(tensors)
        file.writestr("name/data.pkl", data.getvalue())
    return archive.getvalue()


class Storage:
    def __init__(self, value):
        self.value = value


class FloatStorage:
    """Has the name of torch's class in pickles."""


class Tensor:
    def __init__(self, value, strides=None):
        self.value = np.ascontiguousarray(value).reshape(np.shape(value))
        self.strides = strides or tuple(step // 4 for step in self.value.strides)

    def __reduce__(self):
        rest = (Storage(self.value), 0, self.value.shape, self.strides, False, collections.OrderedDict())
        return _rebuild_tensor_v2, rest


def _rebuild_tensor_v2(*_):
    """Has the name of torch's function in pickles."""


FloatStorage.__module__, _rebuild_tensor_v2.__module__ = "torch", "torch._utils"


@pytest.fixture
def as_torch(monkeypatch):
    """Makes these classes available to the pickler under torch's names."""
    for name, member in (("torch", FloatStorage), ("torch._utils", _rebuild_tensor_v2)):
        monkeypatch.setitem(sys.modules, name, type(sys)(name))
        setattr(sys.modules[name], member.__name__, member)


@pytest.fixture
def folder(tmp_path, weights, as_torch):
    for prefix, file in geoclip._FILES.items():
        tensors = {n.removeprefix(prefix): Tensor(value) for n, value in weights.items() if n.startswith(prefix)}
        (tmp_path / file).write_bytes(pth(tensors.get("", tensors)))
    return tmp_path


@pytest.fixture
def wheel(folder):
    path = folder / "geoclip-1.2.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file in geoclip._FILES.values():
            archive.writestr(f"geoclip/model/weights/{file}", (folder / file).read_bytes())
        archive.writestr("geoclip/model/gps_gallery/coordinates_100K.csv", "LAT,LON\n-50.943392,-72.935664\n1,2\n")
    return path


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, strict=True, err_msg=name)


def test_the_wheels_files_are_read_without_torch(folder, wheel, weights):
    assert_same(geoclip.read_weights(folder), weights)
    assert_same(geoclip.read_weights(wheel), weights)
    np.testing.assert_array_equal(geoclip.read_gallery(wheel), [[-50.943392, -72.935664], [1, 2]])


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["geoclip", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        geoclip.main()
    return end.value.code


def test_weights_come_in_and_go_out_bit_for_bit(monkeypatch, wheel, weights, tmp_path):
    assert run(monkeypatch, "import", wheel, tmp_path / "parameters.safetensors") == 0
    assert run(monkeypatch, "export", tmp_path / "parameters.safetensors", tmp_path / "out.npz") == 0
    assert_same(geoclip.read_weights(tmp_path / "out.npz"), weights)
    assert_same(geoclip.to_state_dict(geoclip.import_(wheel)), weights)


@pytest.mark.slow
@pytest.mark.parametrize(("off", "status"), [(0.0, 0), (1e-3, 1)])
def test_a_check_past_the_tolerance_exits_with_1(monkeypatch, wheel, weights, tmp_path, off, status):
    model, mercator = (geoclip.from_state_dict(weights, projection) for projection in ("equal_earth", "mercator"))
    features = np.ones((2, WIDTH), np.float32)
    stored = {
        "coordinates_lat_lon_degrees": PLACES,
        "location_embedding_equal_earth": model.location.features(jnp.asarray(PLACES)),
        "location_embedding_mercator_yx": mercator.location.features(jnp.asarray(PLACES)),
        "clip_image_features": features,
        "image_embedding": model.image(jnp.asarray(features)) + off,
        "logit_scale": weights["logit_scale"],
    }
    np.savez(tmp_path / "stored.npz", **stored)
    assert run(monkeypatch, "check", wheel, tmp_path / "stored.npz") == status


def release(weights, coordinates, clip: str = "") -> dict[str, bytes]:
    """Returns name -> contents of GeoCLIP's files on the hub. clip: name and commit of the backbone on the hub."""
    config = {"model_type": "geoclip-geolocation", "format_version": 1, "gallery_file": "gallery.csv", "sigma": [1, 16]}
    if clip:
        config["backbone"] = dict(zip(("repo_id", "revision"), clip.split("@"), strict=True))
    rows = "".join(f"{latitude},{longitude}\n" for latitude, longitude in coordinates.tolist())
    return {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": safetensors.numpy.save(weights),
        "gallery.csv": f"LAT,LON\n{rows}".encode(),
    }


def test_the_files_of_the_hub_hold_the_same(weights, tmp_path):
    at = np.random.default_rng(2).uniform((-80, -180), (80, 180), (4, 2))
    for name, data in release(weights, at).items():
        (tmp_path / name).write_bytes(data)
    found = geoclip.read_weights(tmp_path)
    assert found.keys() == weights.keys()
    assert all(np.array_equal(found[name], value) for name, value in weights.items())
    np.testing.assert_allclose(geoclip.read_gallery(tmp_path), at)
    for change in ({"model_type": "clip"}, {"format_version": 2}, {"gallery_file": "../gallery.csv"}):
        config = json.loads(release(weights, at)["config.json"])
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(SettingsError, match=r"not GeoCLIP's geoclip-geolocation, format 1, .*: give "):
            geoclip.read_gallery(tmp_path)


class Trap:
    """Writes a file if it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize(("content", "said"), [
    (lambda path: pth({"a": Trap(path / "trapped")}), f"it refers to {io.open.__module__}.open"),
    (lambda path: pth({"a": Tensor(np.zeros((3, 4), np.float32), strides=(1, 1000))}), "a tensor is not contiguous"),
    (lambda path: pth({"a": Tensor(np.zeros((3, 4), np.float32)), "epoch": 3}), "'epoch' is not a tensor"),
    (lambda path: b"GIF89a", "cannot be read as float32 tensors"),
])  # fmt: skip
def test_a_file_of_anything_but_tensors_is_refused_and_runs_nothing(monkeypatch, capsys, folder, content, said):
    (folder / "image_encoder_mlp_weights.pth").write_bytes(content(folder))
    assert run(monkeypatch, "import", folder, folder / "out.safetensors") == 2
    error = capsys.readouterr().err
    assert "image_encoder_mlp_weights.pth" in error and said in error and error.count("\n") == 1
    assert not (folder / "trapped").exists()


@pytest.mark.parametrize(("change", "said"), [
    (lambda w: w.pop("location_encoder.LocEnc1.head.0.bias"), "lacks location_encoder.LocEnc1.head.0.bias"),
    (lambda w: w.update(more=np.zeros(1)), "has an unknown tensor more"),
    (lambda w: w.update({"image_encoder.mlp.0.bias": np.zeros(3)}), r"image_encoder.mlp.0.bias has the shape \(3,\)"),
    (lambda w: w.pop("image_encoder.mlp.2.weight"), "image_encoder.mlp.2.weight is missing"),
])  # fmt: skip
def test_tensors_that_do_not_fit_are_named(weights, change, said):
    geoclip.from_state_dict({**weights, "gps_queue": np.zeros((2, 4096)), "image_encoder.CLIP.x": np.zeros(1)})
    change(weights)
    with pytest.raises(ValueError, match=said):
        geoclip.from_state_dict(weights)


def test_the_alignment_begins_with_its_capsules(wheel, weights):
    location = LocationSettings("mercator", (1, 16, 256), fourier=FOURIER, hidden=HIDDEN, out=OUT)
    loss = LossSettings("info_nce", chunk=8, queue=0, same_within_km=0.0)
    task: object = AlignTask(
        AlignSettings(hidden=8, dropout=0.0, whiten=0.0, location=location),
        WIDTH,
        loss,
        geoclip.start(InitSettings(str(wheel))),
    )
    mesh = sharding.make_mesh(sharding.MeshSettings(1, 1, 1), jax.devices()[:1])
    state = Trainer(task, optax.sgd(0.1), mesh).init(jax.random.key(0))  # pyright: ignore[reportArgumentType]
    for i, capsule in enumerate(state["params"]["location"]["capsules"].values()):
        kernel = weights[f"location_encoder.LocEnc{i}.capsule.3.weight"].T
        np.testing.assert_array_equal(capsule["layers"][1]["kernel"], kernel)
        frequencies = state["constants"]["location"]["capsules"][i]["frequencies"]
        np.testing.assert_array_equal(frequencies, weights[f"location_encoder.LocEnc{i}.capsule.0.b"])
    assert geoclip.start(InitSettings("")) is None


def test_what_cannot_be_begun_with_is_refused(wheel, tmp_path):
    with pytest.raises(SettingsError, match=r"config\.align\.init\.location is '.*none\.whl', which cannot be read"):
        geoclip.start(InitSettings(str(tmp_path / "none.whl")))
    start = geoclip.start(InitSettings(str(wheel)))
    location = LocationSettings("unit_vector", (1, 16, 256), fourier=FOURIER, hidden=HIDDEN, out=OUT)
    loss = LossSettings("info_nce", chunk=8, queue=0, same_within_km=0.0)
    task = AlignTask(AlignSettings(hidden=8, dropout=0.0, whiten=0.0, location=location), WIDTH, loss, start)
    with pytest.raises(SettingsError, match=r"does not fit config\.align\.model\.location: .*LocEnc0\.capsule\.0\.b"):
        task.init(nnx.Rngs(0))


def clip_of(folder: pathlib.Path, width: int, kind: str = "clip") -> pathlib.Path:
    """Writes a tiny checkpoint folder whose embeddings have this width."""
    with np.load(pathlib.Path(__file__).parent / "golden" / "backbones.npz") as golden:
        shapes = json.loads(str(golden[f"{kind}/shapes"]))
    projections = ("visual_projection.weight", "text_projection.weight")
    shapes |= {name: [width, *shapes[name][1:]] for name in projections if name in shapes}
    checkpoints.write(folder, kind, shapes)
    config = {**checkpoints.CONFIGS[kind], **({"projection_dim": width} if kind == "clip" else {})}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def published(folder, weights):
    """GeoCLIP's files with a gallery of 40 places, of which two are close to each other."""
    at = np.random.default_rng(2).uniform((-80, -180), (80, 180), (40, 2))
    at[7] = at[3] + [0.1, 0.1]
    weights["logit_scale"][...] = 1.5
    (folder / "logit_scale_weights.pth").write_bytes(pth(Tensor(weights["logit_scale"])))
    (folder / "coordinates_100K.csv").write_text("LAT,LON\n" + "".join(f"{a},{b}\n" for a, b in at.tolist()))
    return folder, at


def test_answers_as_published_without_any_training(published, weights, tmp_path):
    folder, at = published
    clip = clip_of(tmp_path / "clip", WIDTH)
    photos = checkpoints.images()
    locator = geoclip.GeoCLIPPredictor(clip, folder)
    locator.batch_size = 2
    answers = locator.predict(photos)
    tower = HuggingFace(HuggingFaceSettings(str(clip), "float32", 4))
    features = tower.images(np.stack([tower.prepare(photo) for photo in photos])).astype(float)
    w = {name.removeprefix("image_encoder.mlp."): value for name, value in weights.items()}
    image = np.maximum(features @ w["0.weight"].T + w["0.bias"], 0) @ w["2.weight"].T + w["2.bias"]
    places = published_location(weights, at)
    cosines = (image / np.linalg.norm(image, axis=1)[:, None]) @ (places / np.linalg.norm(places, axis=1)[:, None]).T
    wanted = np.exp(np.exp(1.5) * cosines)
    wanted /= wanted.sum(1, keepdims=True)
    for answer, p in zip(answers, wanted, strict=True):
        best = np.argsort(-p)[:20]
        np.testing.assert_allclose([c.probability for c in answer.candidates], p[best], rtol=1e-3)
        np.testing.assert_allclose([(c.latitude, c.longitude) for c in answer.candidates], at[best])
        assert (answer.latitude, answer.longitude) == tuple(at[best[0]]) and answer.neighbors == ()
        km = great_circle_km(*at[best[0]], *at.T)
        assert p[km <= answer.radius_km].sum() >= 0.5 > p[km < answer.radius_km].sum()
    alone = locator.predict(photos[0])
    assert (alone.latitude, alone.longitude) == (answers[0].latitude, answers[0].longitude)


def geotoken(*arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([*map(str, arguments)])
    return int(ended.value.code or 0)


def test_a_photo_is_answered_on_the_command_line(published, tmp_path, capsys):
    folder, at = published
    clip = clip_of(tmp_path / "clip", WIDTH)
    photo = tmp_path / "a.png"
    checkpoints.images()[0].save(photo)
    command = ["predict", "--method=geoclip", f"--clip={clip}", f"--geoclip={folder}"]
    assert geotoken(*command, "--json", photo) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [answer["latitude"], answer["longitude"]] in at.tolist() and len(answer["candidates"]) == 20
    assert geotoken(*command, photo, tmp_path / "missing.jpg") == cli.REFUSED
    out, err = capsys.readouterr()
    assert out == (
        f"{photo}  {answer['latitude']:.5f}, {answer['longitude']:.5f}  {answer['place']}  "
        f"50 % within {answer['radius_km']:,.0f} km, 90 % within {answer['radius_90_km']:,.0f} km\n"
    )
    assert "missing.jpg" in err


@pytest.mark.parametrize(("kind", "width", "said"), [
    ("clip", WIDTH + 2, "is CLIP of width 18, but GeoCLIP needs CLIP of width 16"),
    ("siglip", WIDTH, "is SigLIP of width 16"),
])  # fmt: skip
def test_a_checkpoint_that_geoclip_does_not_stand_on_is_refused(published, tmp_path, capsys, kind, width, said):
    clip = clip_of(tmp_path / "other", width, kind)
    assert (
        geotoken("predict", "--method=geoclip", f"--clip={clip}", f"--geoclip={published[0]}", "a.jpg") == cli.REFUSED
    )
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_what_geoclip_lacks_is_said_in_one_line(published, tmp_path, capsys):
    clip = clip_of(tmp_path / "clip", WIDTH)
    (tmp_path / "damaged.whl").write_bytes(b"no zip")
    for arguments, said in (
        (["--method=geoclip", "--model=export"], "--model and --method=geoclip name two models"),
        (["--method=geoclip", "--clip=nowhere", f"--geoclip={published[0]}"], "there is no file or folder nowhere"),
        (["--method=geoclip", f"--clip={clip}", "--geoclip=none.whl"], "there is no file or folder none.whl"),
        (
            ["--method=geoclip", f"--clip={clip}", f"--geoclip={tmp_path}/damaged.whl"],
            "damaged.whl cannot be read as GeoCLIP",
        ),
    ):
        assert geotoken("predict", *arguments, "photo.jpg") == cli.REFUSED
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
