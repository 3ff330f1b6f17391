"""A checkpoint folder as Hugging Face publishes it: config.json and safetensors files. Nothing in it is unpickled."""

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

from geotoken_jax import sharding, workdir
from geotoken_jax.settings import SettingsError

M = TypeVar("M", bound=nnx.Module)
#: Our last name of a parameter -> the published one.
_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
#: What old files hold beside parameters: 0, 1, 2, ...
_UNUSED = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")


def read_json(folder: pathlib.Path, name: str) -> dict[str, Any]:
    """Returns a JSON file of the folder. Raises SettingsError if it is not there or not a JSON object."""
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(
            f"{folder} has no {name} ({error.strerror}): give a checkpoint folder as Hugging Face publishes it"
        ) from None
    except ValueError as error:
        raise SettingsError(f"{folder / name} is damaged ({error}): download it again") from None
    if not isinstance(found, dict):
        raise SettingsError(f"{folder / name} is not a JSON object: download it again")
    return found


def needed(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files of a folder that a backbone is opened from: both towers, the tokenizer, the image settings.

    Raises SettingsError if it holds no parameters that can be read.
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
    """Returns what a checkpoint is called on the Hugging Face hub, as far as its folder tells; else the folder's name.

    A folder in the hub's cache is models--ORG--NAME/snapshots/COMMIT; config.json may say whence it was loaded.
    """
    for part in folder.absolute().parts:
        if part.startswith("models--"):
            return "/".join(part.split("--")[1:])
    said = str(read_json(folder, "config.json").get("_name_or_path", ""))
    return said if re.fullmatch(r"[\w.-]+/[\w.-]+", said) else folder.absolute().name


def read_module(folder: pathlib.Path, make: Callable[[nnx.Rngs], M], mesh: Mesh) -> M:
    """Returns the module that `make` describes with the folder's parameters, in float32, laid over the mesh.

    The module's parameters have the published names; a stack of layers is read layer by layer. Raises SettingsError
    naming a tensor that is missing, of another shape, or not the module's.
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    places: dict[tuple, Any] = traverse_util.flatten_dict(sharding.shardings(state, mesh))
    filled = []
    with _tensors(folder) as tensors:
        for path, variable in nnx.to_flat_state(state):
            array = _read(folder, tensors, tuple(map(str, path)), variable.shape)
            placed = jax.make_array_from_callback(array.shape, places[path], lambda index, array=array: array[index])
            filled.append((path, variable.replace(placed)))
        if left := sorted(tensors.keys() - set(_UNUSED)):
            raise SettingsError(
                f"{folder} holds {len(left)} tensors that its config.json does not describe, such as {left[0]}: "
                "give a folder whose files belong together"
            )
    return nnx.merge(graph, nnx.from_flat_state(filled))


def write_module(folder: pathlib.Path, source: pathlib.Path, module: nnx.Module) -> None:
    """Writes a folder like `source` with a module's parameters in the place of those of their names: what `read_module`
    reads, and transformers too. The module's arrays are this process's; all tensors are float32."""
    folder.mkdir(exist_ok=True)
    for path in (path for ending in ("*.json", "*.txt") for path in sorted(source.glob(ending))):
        if path.name != "model.safetensors.index.json":  # there is one file
            workdir.write_bytes(epath.Path(folder / path.name), path.read_bytes())
    with _tensors(source) as tensors:
        whole = {name: np.asarray(read(), np.float32) for name, read in tensors.items() if name not in _UNUSED}
    whole.update(published(nnx.state(module)))
    data = safetensors.numpy.save(whole, {"format": "pt"})  # which transformers asks for
    workdir.write_bytes(epath.Path(folder / "model.safetensors"), data)


def published(state: nnx.State) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors that a module's parameters are published as, by name."""
    for path, variable in nnx.to_flat_state(state):
        array = np.asarray(variable[...])
        for name, index in _published(tuple(map(str, path)), array.shape):
            yield name, np.array(_turned(path[-1], array[index], (3, 2, 0, 1)), order="C")


def _published(path: tuple[str, ...], shape: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
    """Yields the published names of a parameter's tensors and where in it they are: one, or one a stacked layer."""
    name = ".".join((*path[:-1], _NAMES.get(path[-1], path[-1])))
    if "layers" not in path:
        yield name, ...
        return
    for i in range(shape[0]):
        yield name.replace(".layers.", f".layers.{i}."), i


def _turned(last: Any, tensor: np.ndarray, window: tuple[int, ...]) -> np.ndarray:
    """Returns a tensor with its axes in the other order: torch keeps outputs first, and a convolution's window last."""
    if last != "kernel":
        return tensor
    return tensor.transpose(window) if tensor.ndim == 4 else tensor.T


def _read(folder: pathlib.Path, tensors: dict[str, Any], path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
    """Returns one parameter, its tensors taken out of the dict."""
    array = np.empty(shape, np.float32)
    for one, index in _published(path, shape):
        if one not in tensors:
            raise SettingsError(f"{folder} has no tensor {one}: its config.json and its safetensors do not fit")
        tensor = _turned(path[-1], tensors.pop(one)(), (2, 3, 1, 0))
        if tensor.shape != array[index].shape:
            asked = list(array[index].shape)
            raise SettingsError(f"{folder}: {one} has shape {list(tensor.shape)} where config.json asks {asked}")
        array[index] = tensor
    return array


@contextlib.contextmanager
def _tensors(folder: pathlib.Path) -> Iterator[dict[str, Callable[[], np.ndarray]]]:
    """Gives name -> what reads that tensor, of all files of the folder."""
    with contextlib.ExitStack() as files:
        found = {}
        for path in _files(folder):
            try:
                file = files.enter_context(safetensors.safe_open(path, "numpy"))
            except (OSError, safetensors.SafetensorError) as error:
                raise SettingsError(f"{path} is damaged or cut short ({error}): download it again") from None
            found |= {name: lambda file=file, name=name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        yield found


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the folder's safetensors files: one, or all those that its index names."""
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if (folder / "model.safetensors.index.json").exists():
        named = set(read_json(folder, "model.safetensors.index.json")["weight_map"].values())
        shards = sorted(folder.glob("model-*-of-*.safetensors"))
        if missing := sorted(named - {path.name for path in shards}):
            raise SettingsError(f"{folder} has no {missing[0]}, which its index names: download it")
        return [path for path in shards if path.name in named]
    if (folder / "pytorch_model.bin").exists():
        raise SettingsError(
            f"{folder} holds its parameters only as a pickle, which can run code: where torch is, convert it with "
            f'`python -c "from transformers import AutoModel as M; M.from_pretrained({str(folder)!r})'
            f'.save_pretrained({str(folder)!r})"`'
        )
    raise SettingsError(f"{folder} has no model.safetensors: give a checkpoint folder as Hugging Face publishes it")
