"""Reads and writes checkpoint folders in Hugging Face's format: config.json and safetensors files, never pickles."""

import contextlib
import json
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
import safetensors.numpy
from etils import epath
from flax import nnx, traverse_util
from jax.sharding import Mesh

from geotoken_jax import manifests, sharding
from geotoken_jax.settings import SettingsError

M = TypeVar("M", bound=nnx.Module)
#: Last part of a parameter's name here -> in the published checkpoint.
_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
#: Tensors of old files that are no parameters: the numbers 0, 1, 2, ...
_UNUSED = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")


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


def name(folder: pathlib.Path) -> str:
    """Returns the name of a checkpoint on the Hugging Face hub, ORG/NAME; if unknown, the name of its folder.

    The hub's cache names folders models--ORG--NAME/snapshots/COMMIT. Elsewhere config.json may have _name_or_path.
    """
    for part in folder.absolute().parts:
        if part.startswith("models--"):
            return "/".join(part.split("--")[1:])
    recorded = str(read_json(folder, "config.json").get("_name_or_path", ""))
    return recorded if re.fullmatch(r"[\w.-]+/[\w.-]+", recorded) else folder.absolute().name


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
    raise SettingsError(f"{folder} has no model.safetensors: choose a checkpoint folder as Hugging Face publishes it")
