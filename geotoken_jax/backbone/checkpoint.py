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
#: Supported values of model_type in config.json.
KINDS = ("clip", "siglip")
#: Files besides config.json that a backbone reads. No others are downloaded, and so no pickles.
_READ = (
    "preprocessor_config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json", "vocab.json",
    "merges.txt", "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors",
)  # fmt: skip
#: Bytes at the start and at the end of a file that the hash of a folder covers.
_END = 1 << 20
#: Last part of a parameter's name here -> in the published checkpoint.
_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
#: Tensors of old files that are no parameters: the numbers 0, 1, 2, ...
_UNUSED = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")


def folder(path: str) -> pathlib.Path:
    """Returns the folder of a checkpoint, downloaded at its first use if `path` is a name on the hub.

    path: folder, or ORG/NAME or ORG/NAME@REVISION. Raises SettingsError if there is no such checkpoint, if it is
    neither CLIP nor SigLIP, or if the download fails.
    """
    found = _folder(path, _CHECKPOINT)
    if not pathlib.Path(path).exists():
        _files(found)  # a model on the hub may have pickles alone
    return found


def read_config(path: str) -> dict[str, Any]:
    """Returns the object in a checkpoint's config.json. Of a checkpoint on the hub, only this file is downloaded.

    path: see `folder`. Raises SettingsError as `folder` does.
    """
    return read_json(_folder(path, _CONFIG), "config.json")


def identity(path: str) -> str:
    """Returns a text that is the same for the same parameters: ORG/NAME@COMMIT, or a hash of a local folder's files.

    path: see `folder`. Of a checkpoint on the hub, only config.json is downloaded. Hashed are the names, the sizes, and
    the first and last 1 MiB of all JSON, text and safetensors files. Whole files would take seconds, and checkpoints
    with other parameters differ in these bytes too. Raises SettingsError if there is no checkpoint.
    """
    found = _folder(path, _CONFIG)
    if not pathlib.Path(path).exists():
        return str(hub.pinned(found))
    files = sorted(file for ending in ("*.json", "*.txt", "*.safetensors") for file in found.glob(ending))
    if not files:
        raise SettingsError(
            f"config.embed.huggingface.path is {path!r}, where there is no checkpoint: set it to a folder with a CLIP "
            "or SigLIP 2 checkpoint, or to its name on the Hugging Face hub"
        )
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            size = file.stat().st_size
            digest.update(f"{file.name} {size} ".encode() + opened.read(_END))
            opened.seek(max(0, size - _END))
            digest.update(opened.read(_END))
    return digest.hexdigest()


def kind(name: str, config: dict[str, Any]) -> str:
    """Returns the model_type of a config.json, one of KINDS. Raises SettingsError for any other.

    name: name or folder of the checkpoint, for the message.
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
    return _READ


_CHECKPOINT = hub.Kind("config.json", "it is not a checkpoint of CLIP or SigLIP 2; name another model", _patterns)
_CONFIG = dataclasses.replace(_CHECKPOINT, patterns=lambda name, first: ())


@functools.cache  # one process uses one commit, and compares the files with their hashes once
def _download(name: str, kind: hub.Kind) -> pathlib.Path:
    return pathlib.Path(hub.resolve(name, kind))


def _folder(path: str, kind: hub.Kind) -> pathlib.Path:
    if pathlib.Path(path).exists():
        return pathlib.Path(path)
    return _download(str(hub.pinned(_download(path, _CONFIG))), kind)


def read_json(folder: pathlib.Path, name: str) -> dict[str, Any]:
    """Returns the object in a JSON file of the folder. Raises SettingsError if it is missing, damaged or no object."""
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
    """Returns the name of a checkpoint on the Hugging Face hub, ORG/NAME, and its commit there.

    If the folder is not in the hub's cache, the name is taken from config.json, which may have _name_or_path; else it
    is the name of the folder. The commit is None then.
    """
    if found := hub.pinned(folder):
        reference, _, commit = found.partition("@")
        return reference, commit
    recorded = str(read_json(folder, "config.json").get("_name_or_path", ""))
    return (recorded if hub.is_name(recorded) else folder.absolute().name), None


def read_module(folder: pathlib.Path, make: Callable[[nnx.Rngs], M], mesh: Mesh) -> M:
    """Returns the module that `make` creates, with the folder's parameters in float32, sharded over the mesh.

    Parameters of the module have the published names; stacked layers are read one by one. Raises SettingsError naming a
    tensor that is missing, has another shape, or is not in the module.
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
    """Writes a copy of the checkpoint folder `source` with a module's parameters, for `read_module` and transformers.

    Parameters of the module replace the tensors of the same names. All other tensors are copied, except those that are
    no parameters; of the other files, *.json and *.txt are copied. All tensors become float32. All of the module's
    arrays must be in this process.
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
    """Yields names and tensors of a module's parameters in the published format."""
    for path, variable in nnx.to_flat_state(state):
        array = np.asarray(variable[...])
        for name, index in _published(tuple(map(str, path)), array.shape):
            yield name, np.array(_transposed(path[-1], array[index], (3, 2, 0, 1)), order="C")


def _published(path: tuple[str, ...], shape: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
    """Yields the published name of each tensor of a parameter, and the tensor's index in the parameter.

    A parameter of stacked layers has one tensor per layer. Any other has one tensor, with the index `...`.
    path, shape: path and shape of the parameter.
    """
    name = ".".join((*path[:-1], _NAMES.get(path[-1], path[-1])))
    if "layers" not in path:
        yield name, ...
        return
    for i in range(shape[0]):
        yield name.replace(".layers.", f".layers.{i}."), i


def _transposed(last: Any, tensor: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    """Returns a kernel with its axes reordered between torch's layout and flax's; other tensors as they are.

    In torch the output axis is first, and the two spatial axes of a convolution's kernel are last. order: new order
    of a convolution's four axes. last: last part of the parameter's name.
    """
    if last != "kernel":
        return tensor
    return tensor.transpose(order) if tensor.ndim == 4 else tensor.T


def _read(folder: pathlib.Path, tensors: dict[str, Any], path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
    """Returns a parameter read from its tensors, which are removed from the dict."""
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
    """Opens the safetensors files of a folder. Yields name of a tensor -> function that reads it."""
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
    """Returns the folder's safetensors files: model.safetensors, or all that model.safetensors.index.json names."""
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
            f"{found} has no model.safetensors on the hub, and pickles are not read, as they can run code: name a "
            "model or a revision that has it"
        )
    raise SettingsError(f"{folder} has no model.safetensors: choose a checkpoint folder as Hugging Face publishes it")
