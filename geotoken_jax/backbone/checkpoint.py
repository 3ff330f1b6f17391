"""Reads and writes checkpoint folders in Hugging Face's format: config.json and safetensors files, never pickles.

A checkpoint is named by its folder or by its name on the Hugging Face hub, ORG/NAME or ORG/NAME@REVISION.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
import safetensors.numpy
from etils import epath
from flax import nnx, traverse_util
from jax.sharding import Mesh

from geotoken_jax import hub, manifests, sharding
from geotoken_jax.settings import SettingsError

M = TypeVar("M", bound=nnx.Module)
#: Supported values of the key model_type in config.json.
KINDS = ("clip", "siglip")
#: Files besides config.json that a backbone reads. Only these are downloaded, so pickles never are.
_FILE_PATTERNS = (
    "preprocessor_config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json", "vocab.json",
    "merges.txt", "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors",
)  # fmt: skip
#: A checkpoint's hash covers this number of bytes at the start of each file, and the same number at its end.
_HASHED_BYTES = 1 << 20
#: Last part of a parameter's name in this package -> last part of its name in a published checkpoint.
_PUBLISHED_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
#: Names of tensors in old files that contain the numbers 0, 1, 2, ... and are not parameters.
_UNUSED = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")


def folder(path: str) -> pathlib.Path:
    """Returns the folder of a checkpoint. A checkpoint on the hub is downloaded at its first use.

    path: folder of a checkpoint, or its name on the hub, ORG/NAME or ORG/NAME@REVISION. Raises SettingsError if there
    is no such checkpoint, if it is neither CLIP nor SigLIP, or if the download fails.
    """
    found = _folder(path, _CHECKPOINT)
    if not pathlib.Path(path).exists():
        _files(found)  # raises SettingsError if the model has only pickles
    return found


def read_config(path: str) -> dict[str, Any]:
    """Returns the contents of a checkpoint's config.json. Only this file is downloaded from the hub.

    path: see `folder`. Raises SettingsError as `folder` does.
    """
    return read_json(_folder(path, _CONFIG), "config.json")


def identity(path: str) -> str:
    """Returns a text that identifies a checkpoint: ORG/NAME@COMMIT, or a hash of a local folder's files.

    If the checkpoint is on the hub, only config.json is downloaded. The hash covers all JSON, text and safetensors
    files: the name and size of each, and its first and last 1 MiB. Hashing whole files would take seconds. Checkpoints
    with different parameters differ in these bytes too.

    path: see `folder`. Raises SettingsError if there is no checkpoint.
    """
    found = _folder(path, _CONFIG)
    if not pathlib.Path(path).exists():
        return str(hub.pinned(found))
    files = sorted(file for ending in ("*.json", "*.txt", "*.safetensors") for file in found.glob(ending))
    if not files:
        raise SettingsError(
            f"config.embed.huggingface.path is {path!r}, which has no checkpoint: set it to a folder with a CLIP "
            "or SigLIP 2 checkpoint, or to its name on the Hugging Face hub"
        )
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            size = file.stat().st_size
            digest.update(f"{file.name} {size} ".encode() + opened.read(_HASHED_BYTES))
            opened.seek(max(0, size - _HASHED_BYTES))
            digest.update(opened.read(_HASHED_BYTES))
    return digest.hexdigest()


def kind(name: str, config: dict[str, Any]) -> str:
    """Returns the model_type in a config.json. Raises SettingsError if it is not one of KINDS.

    name: name or folder of the checkpoint, for the message. config: contents of config.json.
    """
    found = str(config.get("model_type"))
    if found not in KINDS:
        raise SettingsError(
            f"{name} has a checkpoint of model_type {found!r}: choose a checkpoint of model_type {' or '.join(KINDS)} "
            "(SigLIP 2 with a fixed image size is siglip)"
        )
    return found


def _patterns(name: str, first: epath.Path) -> tuple[str, ...]:
    kind(name, read_json(pathlib.Path(first), "config.json"))
    return _FILE_PATTERNS


_CHECKPOINT = hub.Kind("config.json", "it is not a checkpoint of CLIP or SigLIP 2; name another model", _patterns)
_CONFIG = dataclasses.replace(_CHECKPOINT, patterns=lambda name, first: ())


@functools.cache  # a process always uses the same commit, and checks the files' hashes only once
def _download(name: str, kind: hub.Kind) -> pathlib.Path:
    return pathlib.Path(hub.resolve(name, kind))


def _folder(path: str, kind: hub.Kind) -> pathlib.Path:
    if pathlib.Path(path).exists():
        return pathlib.Path(path)
    return _download(str(hub.pinned(_download(path, _CONFIG))), kind)


def read_json(folder: pathlib.Path, name: str) -> dict[str, Any]:
    """Returns the object in a JSON file. Raises SettingsError if the file is missing, is damaged or has no object."""
    try:
        value = json.loads((folder / name).read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(
            f"{folder / name} cannot be read ({error.strerror}): choose a checkpoint folder as Hugging Face "
            "publishes it"
        ) from None
    except ValueError as error:
        raise SettingsError(f"{folder / name} is damaged ({error}): download it again") from None
    if not isinstance(value, dict):
        raise SettingsError(f"{folder / name} is not a JSON object: download it again")
    return value


def needed(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files of a checkpoint folder that a backbone reads: both towers, tokenizer, image preprocessing.

    Raises SettingsError if the folder has no parameters that can be read.
    """
    names = ["config.json", "tokenizer_config.json", "model.safetensors.index.json"]
    names += ["tokenizer.json"] if (folder / "tokenizer.json").exists() else ["vocab.json", "merges.txt"]
    one, other = "preprocessor_config.json", "processor_config.json"
    names.append(one if (folder / one).exists() else other)
    parameters = _files(folder)
    if len(parameters) == 1:
        names.remove("model.safetensors.index.json")
    return [*(folder / name for name in names if (folder / name).exists()), *parameters]


def name(folder: pathlib.Path) -> tuple[str, str | None]:
    """Returns the name of a checkpoint on the Hugging Face hub, ORG/NAME, and its commit.

    If the folder is not in the hub's cache, the commit is None. The name is then _name_or_path in config.json or, if
    that is no name on the hub, the name of the folder.
    """
    if found := hub.pinned(folder):
        reference, _, commit = found.partition("@")
        return reference, commit
    recorded = str(read_json(folder, "config.json").get("_name_or_path", ""))
    return (recorded if hub.is_name(recorded) else folder.absolute().name), None


def read_module(folder: pathlib.Path, make: Callable[[nnx.Rngs], M], mesh: Mesh) -> M:
    """Returns the module that `make` creates, with the folder's parameters in float32, sharded over the mesh.

    The module's parameters must have the names of the published tensors. The tensors of stacked layers are read layer
    by layer. Raises SettingsError with the tensor's name if a tensor is missing, has another shape or is not in the
    module.
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    places: dict[tuple, Any] = traverse_util.flatten_dict(sharding.shardings(state, mesh))
    filled = []
    with _tensors(folder) as tensors:
        for path, variable in nnx.to_flat_state(state):
            array = _read(folder, tensors, tuple(map(str, path)), variable.shape)
            placed = jax.make_array_from_callback(array.shape, places[path], lambda index, array=array: array[index])
            filled.append((path, variable.replace(placed)))
        if unused := sorted(tensors.keys() - set(_UNUSED)):
            raise SettingsError(
                f"{folder} contains {len(unused)} tensors that its config.json does not describe, such as {unused[0]}: "
                "download config.json and the safetensors files again, from one checkpoint"
            )
    return nnx.merge(graph, nnx.from_flat_state(filled))


def write_module(folder: pathlib.Path, source: pathlib.Path, module: nnx.Module) -> None:
    """Writes a copy of a checkpoint with other parameters. `read_module` and transformers can read the copy.

    The module's parameters replace the tensors of the same names. All other tensors are copied, except tensors that are
    not parameters. Files *.json and *.txt are copied too. All tensors are written as float32.

    folder: folder of the copy. source: folder of the original checkpoint. module: module with the new parameters; this
    process must have all of its arrays.
    """
    folder.mkdir(exist_ok=True)
    for path in (path for ending in ("*.json", "*.txt") for path in sorted(source.glob(ending))):
        if path.name != "model.safetensors.index.json":  # all tensors are written to one file
            manifests.write_bytes(epath.Path(folder / path.name), path.read_bytes())
    with _tensors(source) as tensors:
        whole = {name: np.asarray(read(), np.float32) for name, read in tensors.items() if name not in _UNUSED}
    whole.update(published(nnx.state(module)))
    data = safetensors.numpy.save(whole, {"format": "pt"})  # transformers requires this metadata
    manifests.write_bytes(epath.Path(folder / "model.safetensors"), data)


def published(state: nnx.State) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the name and the tensor of each parameter of a module, as a published checkpoint has them."""
    for path, variable in nnx.to_flat_state(state):
        array = np.asarray(variable[...])
        for name, index in _published(tuple(map(str, path)), array.shape):
            yield name, np.array(_transposed(path[-1], array[index], (3, 2, 0, 1)), order="C")


def _published(path: tuple[str, ...], shape: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
    """Yields the published name of each tensor of a parameter, and the tensor's index in the parameter.

    A parameter of stacked layers has one tensor per layer. Any other parameter has one tensor, with the index `...`.
    path, shape: path and shape of the parameter.
    """
    name = ".".join((*path[:-1], _PUBLISHED_NAMES.get(path[-1], path[-1])))
    if "layers" not in path:
        yield name, ...
        return
    for i in range(shape[0]):
        yield name.replace(".layers.", f".layers.{i}."), i


def _transposed(last: Any, tensor: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    """Returns a kernel with its axes in the order of torch or of flax. Other tensors are returned unchanged.

    A kernel of torch begins with the output axis, and a convolution's kernel ends with the two spatial axes. last: last
    part of the parameter's name. order: new order of the four axes of a convolution's kernel.
    """
    if last != "kernel":
        return tensor
    return tensor.transpose(order) if tensor.ndim == 4 else tensor.T


def _read(folder: pathlib.Path, tensors: dict[str, Any], path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
    """Returns a parameter and removes its tensors from `tensors`. tensors: function that reads each tensor, by name."""
    array = np.empty(shape, np.float32)
    for name, index in _published(path, shape):
        if name not in tensors:
            raise SettingsError(
                f"{folder} has no tensor {name}, which its config.json describes: download config.json and the "
                "safetensors files again, from one checkpoint"
            )
        tensor = _transposed(path[-1], tensors.pop(name)(), (2, 3, 1, 0))
        if tensor.shape != array[index].shape:
            raise SettingsError(
                f"{folder}: {name} has shape {list(tensor.shape)}, but config.json asks for "
                f"{list(array[index].shape)}: download config.json and the safetensors files again, from one checkpoint"
            )
        array[index] = tensor
    return array


@contextlib.contextmanager
def _tensors(folder: pathlib.Path) -> Iterator[dict[str, Callable[[], np.ndarray]]]:
    """Opens the safetensors files of a folder. Yields a dict with a function that reads each tensor, by name."""
    with contextlib.ExitStack() as files:
        readers = {}
        for path in _files(folder):
            try:
                file = files.enter_context(safetensors.safe_open(path, "numpy"))
            except (OSError, safetensors.SafetensorError) as error:
                raise SettingsError(f"{path} is damaged or cut short ({error}): download it again") from None
            readers |= {name: lambda file=file, name=name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        yield readers


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the safetensors files of a folder: model.safetensors, or the files in model.safetensors.index.json."""
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if (folder / "model.safetensors.index.json").exists():
        named = set(read_json(folder, "model.safetensors.index.json")["weight_map"].values())
        shards = sorted(folder.glob("model-*-of-*.safetensors"))
        if missing := sorted(named - {path.name for path in shards}):
            raise SettingsError(f"{folder} has no {missing[0]}, which model.safetensors.index.json names: download it")
        return [path for path in shards if path.name in named]
    if (folder / "pytorch_model.bin").exists():
        raise SettingsError(
            f"{folder} contains its parameters only as a pickle, which can run code: with torch and transformers "
            f'installed, convert it with `python -c "from transformers import AutoModel as M; '
            f'M.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"`'
        )
    if found := hub.pinned(folder):
        raise SettingsError(
            f"{found} has no model.safetensors on the hub, and pickles are not read, because they can run code: "
            "name a model or a revision that has it"
        )
    raise SettingsError(f"{folder} has no model.safetensors: choose a checkpoint folder as Hugging Face publishes it")
