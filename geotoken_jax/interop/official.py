"""Imports, exports and checks the published GeoToken weights.

`python -m geotoken_jax.interop.official ACTION`:

- `check FILE.npz`: compares our model with stored outputs of the published model. docs/fidelity.md lists the arrays of
  the file. Prints the largest error of the encoder's memory, the logits, the loss and the log-probabilities, and the
  agreement of greedy and beam tokens.
- `import WEIGHTS OUT.safetensors`: converts published weights to a parameter file, as `geotoken train` writes it.
- `export PARAMETERS.safetensors OUT`: converts a parameter file to published weights.

Published weights are `.pth` (needs torch), `.safetensors` or `.npz` files. Reading a file never runs code in it.
"""

import argparse
import dataclasses
import io
import pickle
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath
from flax import nnx

from geotoken_jax import checkpoint, manifests
from geotoken_jax.geo.cells import MAX_GROUP
from geotoken_jax.model import loss
from geotoken_jax.model.geotoken import GeoTokenModel, ModelSettings
from geotoken_jax.model.memory import Neighbors
from geotoken_jax.predict import beam, sample

#: Arrays of a state dict, by name of the tensor.
Weights = Mapping[str, np.ndarray]

#: Name prefixes of tensors in the published state dict that the published forward pass never reads.
UNUSED = ("similarity_embedding.", "metadata_proj.", "coord_head.", "encoder_pos_encoder.", "decoder_pos_encoder.")
_PROJECTIONS = ("image_proj", "loc_proj", "text_proj")  # in the order of our kinds: image, location, text


def settings(
    *, width: int, layers: int, heads: int, feed_forward: int, group: int, level: int, neighbors: int, **others: Any
) -> ModelSettings:
    """Returns ModelSettings with the published architecture.

    others: values of backbone_width, dropout, dtype and remat. Their defaults are 768, 0.1, "float32" and "none".
    Raises ValueError if the group is above MAX_GROUP, because its tables would be too large.
    """
    if group > MAX_GROUP:
        tables = 3 * (level // group) * 4**group * width * 4
        raise ValueError(
            f"group {group} has 4^{group} = {4**group:,} tokens per position, more than an int32 holds, and tables of "
            f"{tables / 1e12:,.0f} TB at width {width}: use a group up to {MAX_GROUP} that divides level {level}"
        )
    fixed = dict(
        norm="post", activation="relu", scheme="s2", memory="full", positions="sinusoidal", tie_tokens=False,
        copy_head=False, neighbor_tokens=True, neighbor_embeddings=True, neighbor_dropout=0.0, similarities=False,
        context="none", qk_norm=False, attention="auto", parametrization="standard", base_width=512, base_heads=8,
        base_layers=10,
    )  # fmt: skip
    free = {"backbone_width": 768, "dropout": 0.1, "dtype": "float32", "remat": "none", **others}
    free["attention_dropout"] = free["dropout"]  # PyTorch's layers have one rate
    return ModelSettings(
        width=width, heads=heads, feed_forward=feed_forward, level=level, group=group, neighbors=neighbors,
        encoder_layers=layers, decoder_layers=layers, **fixed, **free,
    )  # fmt: skip


def settings_of(weights: Weights, *, heads: int = 8, neighbors: int = 15) -> ModelSettings:
    """Returns the settings of a published state dict, read from the shapes of its tensors.

    heads, neighbors: settings that do not affect the shapes. Raises ValueError if a tensor is missing, or if its
    shape fits no settings.
    """
    rows, width = _shape(weights, "embedding.weight", 2)
    return _settings_of_sizes(
        rows=rows,
        positions=len([name for name in weights if re.fullmatch(r"output_layers\.\d+\.weight", name)]),
        width=width,
        layers=len([name for name in weights if re.fullmatch(r"encoder\.layers\.\d+\.linear1\.weight", name)]),
        feed_forward=_shape(weights, "encoder.layers.0.linear1.weight", 2)[0],
        backbone_width=_shape(weights, "image_proj.0.weight", 2)[1],
        heads=heads,
        neighbors=neighbors,
    )


def _settings_of_parameters(parameters: Weights) -> ModelSettings:
    """Returns the settings of a parameter file of the published architecture.

    The numbers of heads and of neighbors are set to 1, because the shapes of tensors do not depend on them.
    """
    rows, width = _shape(parameters, "token_table", 2)
    layers, _, feed_forward = _shape(parameters, "encoder/feed_forward/up/kernel", 3)
    return _settings_of_sizes(
        rows=rows,
        positions=_shape(parameters, "head", 3)[0],
        width=width,
        layers=layers,
        feed_forward=feed_forward,
        backbone_width=_shape(parameters, "memory_builder/projections/up", 3)[1],
        heads=1,
        neighbors=1,
    )


def _shape(tensors: Weights, name: str, axes: int) -> tuple[int, ...]:
    if name not in tensors:
        raise ValueError(f"{name} is missing: only models of the published architecture can be converted")
    if tensors[name].ndim != axes:
        raise ValueError(f"{name} has the shape {tensors[name].shape}, but {axes} axes are needed")
    return tensors[name].shape


def _settings_of_sizes(*, rows: int, positions: int, **sizes: Any) -> ModelSettings:
    """Returns the settings with the group that fits the size of the token table.

    rows: number of rows of the token table: 6 for the face, and 4^group for each of the other positions. positions:
    number of output positions. sizes: arguments of `settings` other than group and level.
    """
    for group in range(1, MAX_GROUP + 1):
        if rows == 6 + (positions - 1) * 4**group:
            return settings(group=group, level=group * (positions - 1), **sizes)
    raise ValueError(
        f"the token table has {rows} rows, but a published model with {positions} output positions has 6 + "
        f"{positions - 1} * 4^group rows, with a group from 1 to {MAX_GROUP}: use weights of the published architecture"
    )


def _views(s: ModelSettings, params: Any) -> dict[str, list[np.ndarray]]:
    """Returns views of our parameters in the published layout, by name of the published tensor.

    A published tensor is the concatenation of its views along the first axis. All views of a tensor have the same
    shape. A tensor with the projections of queries, keys and values has three views. Other tensors have one view.
    """
    builder = params["memory_builder"]
    views_of = {
        "start_token_embedding": [params["start_embedding"][None]],
        "cls_token": [builder["cls"][None]],
        "embedding.weight": [params["token_table"]],
        "retrieval_embedding.weight": [params["neighbor_table"]],
    }
    for t, size in enumerate(s.cells.vocab_sizes):  # our head is padded to the largest vocabulary
        views_of[f"output_layers.{t}.weight"] = [params["head"][t, :, :size].T]
        views_of[f"output_layers.{t}.bias"] = [params["head_bias"][t, :size]]
    for e, name in enumerate(_PROJECTIONS):
        for number, part in ((0, "up"), (2, "down")):
            views_of[f"{name}.{number}.weight"] = [builder["projections"][part][e].T]
            views_of[f"{name}.{number}.bias"] = [builder["projections"][f"{part}_bias"][e]]
    for side, depth, attentions in (
        ("encoder", s.encoder_layers, {"self_attn": "attention"}),
        ("decoder", s.decoder_layers, {"self_attn": "attention", "multihead_attn": "memory_attention"}),
    ):
        stack = params[side]
        for i in range(depth):
            layer = f"{side}.layers.{i}"
            for theirs, ours in attentions.items():
                q, k, v, out = (stack[ours][part] for part in ("q", "k", "v", "out"))
                views_of[f"{layer}.{theirs}.in_proj_weight"] = [part["kernel"][i].T for part in (q, k, v)]
                views_of[f"{layer}.{theirs}.in_proj_bias"] = [part["bias"][i] for part in (q, k, v)]
                views_of[f"{layer}.{theirs}.out_proj.weight"] = [out["kernel"][i].T]
                views_of[f"{layer}.{theirs}.out_proj.bias"] = [out["bias"][i]]
            for theirs, ours in (("linear1", "up"), ("linear2", "down")):
                views_of[f"{layer}.{theirs}.weight"] = [stack["feed_forward"][ours]["kernel"][i].T]
                views_of[f"{layer}.{theirs}.bias"] = [stack["feed_forward"][ours]["bias"][i]]
            for n in range(1 + len(attentions)):
                views_of[f"{layer}.norm{n + 1}.weight"] = [stack["norms"][n]["scale"][i]]
                views_of[f"{layer}.norm{n + 1}.bias"] = [stack["norms"][n]["bias"][i]]
    return views_of


def from_state_dict(s: ModelSettings, weights: Weights) -> GeoTokenModel:
    """Returns our model with published weights, in float32.

    s: settings of the model. Raises ValueError if a tensor is missing, unknown or of the wrong shape.
    """
    model = nnx.eval_shape(lambda: GeoTokenModel(s, nnx.Rngs(0)))
    state = nnx.state(model, nnx.Param)
    params = jax.tree.map(lambda p: np.zeros(p.shape, p.dtype), nnx.to_pure_dict(state))
    views_of = _views(s, params)
    extra = sorted(name for name in weights if name not in views_of and not name.startswith(UNUSED))
    missing = sorted(name for name in views_of if name not in weights)
    if missing or extra:
        problem = f"lacks {missing[0]}" if missing else f"has an unknown tensor {extra[0]}"
        raise ValueError(
            f"the state dict {problem} ({len(missing)} missing, {len(extra)} extra): use the settings of the published "
            "model"
        )
    for name, views in views_of.items():
        value, shape = weights[name], (len(views) * len(views[0]), *views[0].shape[1:])
        if value.shape != shape:
            raise ValueError(
                f"{name} has the shape {value.shape}, but the model settings need {shape}: use the weights and "
                "the settings of the same published model"
            )
        for view, part in zip(views, np.split(value, len(views)), strict=True):
            view[...] = part
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, params))
    nnx.update(model, state)
    return model


def to_state_dict(model: GeoTokenModel) -> dict[str, np.ndarray]:
    """Returns the published state dict of a model, without the entries that the published forward pass never reads."""
    params = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    views_of = _views(model.settings, params)
    return {name: np.ascontiguousarray(np.concatenate(views)) for name, views in views_of.items()}


def read_weights(path: epath.PathLike) -> dict[str, np.ndarray]:
    """Returns the state dict of a `.pth`, `.safetensors` or `.npz` file, converted to float32.

    A `.pth` may be a training checkpoint with the state dict under `model_state_dict`, `state_dict` or `model`. Name
    prefixes of DataParallel and torch.compile are removed. Raises ValueError if the file has another suffix or no
    readable state dict, and ModuleNotFoundError for a `.pth` if torch is not installed.
    """
    path = epath.Path(path)
    read, _ = _format(path)
    try:
        weights = read(path.read_bytes())
    except (FileNotFoundError, ModuleNotFoundError):
        raise
    except Exception as error:  # readers raise many types, from zipfile and pickle too
        raise ValueError(f"{path} has no state dict that can be read: {str(error).splitlines()[0]}") from error
    return {name.replace("_orig_mod.", "").removeprefix("module."): value for name, value in weights.items()}


def write_weights(path: epath.PathLike, weights: Weights) -> None:
    """Writes a state dict atomically. The suffix of `path` selects the format: `.pth`, `.safetensors` or `.npz`."""
    path = epath.Path(path)
    _, write = _format(path)
    manifests.write_bytes(path, write(dict(weights)))


def _format(
    path: epath.Path,
) -> tuple[Callable[[bytes], dict[str, np.ndarray]], Callable[[dict[str, np.ndarray]], bytes]]:
    if path.suffix not in _FORMATS:
        raise ValueError(f"{path} has the suffix {path.suffix!r}: give a file with one of {', '.join(_FORMATS)}")
    return _FORMATS[path.suffix]


def _torch() -> Any:
    try:
        import torch
    except ModuleNotFoundError:
        raise ModuleNotFoundError("a .pth file needs torch: pip install 'geotoken-jax[interop]'") from None
    return torch


def _read_pth(data: bytes) -> dict[str, np.ndarray]:
    torch = _torch()
    try:
        tensors = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's message explains how to run the file's code
        raise ValueError(
            "it contains objects other than tensors, or torch.save did not write it: save the weights alone, with "
            "torch.save(model.state_dict(), FILE)"
        ) from None
    for name in ("model_state_dict", "state_dict", "model"):
        tensors = tensors.get(name, tensors)
    other = [name for name, value in tensors.items() if not torch.is_tensor(value)]
    if other:
        raise ValueError(
            f"the entry {other[0]} is not a tensor: save the weights alone, with torch.save(model.state_dict(), FILE)"
        )
    return {name: value.float().numpy() for name, value in tensors.items()}


def _write_pth(weights: dict[str, np.ndarray]) -> bytes:
    torch, file = _torch(), io.BytesIO()
    torch.save({name: torch.tensor(value) for name, value in weights.items()}, file)
    return file.getvalue()


def _read_safetensors(data: bytes) -> dict[str, np.ndarray]:
    types = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64, "I64": np.int64}
    return {
        name: np.frombuffer(entry["data"], types[entry["dtype"]]).reshape(entry["shape"]).astype(np.float32)
        for name, entry in safetensors.deserialize(data)
    }


def _read_npz(data: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        return {name: file[name].astype(np.float32) for name in file.files}


def _write_npz(weights: dict[str, np.ndarray]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **weights)  # pyright: ignore[reportArgumentType]
    return file.getvalue()


_FORMATS = {
    ".pth": (_read_pth, _write_pth),
    ".safetensors": (_read_safetensors, safetensors.numpy.save),
    ".npz": (_read_npz, _write_npz),
}


class _StoredArrays(dict):
    """Arrays of a file with outputs of the published model. A missing array raises ValueError with advice."""

    def __missing__(self, name: str) -> np.ndarray:
        raise ValueError(f"the .npz file lacks {name}: write it, as docs/fidelity.md describes")


def check(path: str) -> dict[str, float]:
    """Compares outputs of our model with stored outputs of the published model.

    Returns the largest absolute error of each output, by name. For greedy and beam tokens, returns the share of equal
    tokens instead. path: `.npz` file with the arrays that docs/fidelity.md lists. Raises ValueError if one is missing.
    """
    with np.load(path, allow_pickle=False) as file:
        stored = _StoredArrays({name: file[name] for name in file.files})
    d, depth, heads, feed_forward, group, level, m = (int(v) for v in stored["config"])
    s = settings(
        width=d, layers=depth, heads=heads, feed_forward=feed_forward, group=group, level=level, neighbors=m,
        backbone_width=stored["query_image"].shape[1],
    )  # fmt: skip
    model = from_state_dict(s, {name[2:]: value for name, value in stored.items() if name.startswith("w/")})
    query = jnp.stack([stored[f"query_{kind}"] for kind in ("image", "location", "text")], 1)
    gallery = np.stack([stored[f"gallery_{kind}"] for kind in ("image", "location", "text")], 1)
    targets = jnp.asarray(stored["target_tokens"], jnp.int32)

    def neighbors(first: int) -> Neighbors:
        rows = stored["neighbor_index"][:, first : first + m]
        tokens = jnp.asarray(stored["gallery_tokens"][rows], jnp.int32)
        return Neighbors(jnp.asarray(gallery[rows]), tokens, jnp.full(len(rows), rows.shape[1]))

    def run(model: GeoTokenModel, first: Neighbors, in_training: Neighbors) -> tuple:
        memory = model.encode(query, first)
        return (
            model(query, first, targets),
            model(query, in_training, targets),
            model.sequence(query, first)[0],
            sample.greedy(model, memory),
            beam.search(model, memory, stored["beam4_tokens"].shape[1]),
        )

    last = m - 1
    log_p, log_p_in_training, sequence, greedy, beams = nnx.jit(run)(model, neighbors(0), neighbors(1))
    expected = jax.nn.log_softmax(stored[f"teacher_forced_logits_neighbors_0_to_{last}"])
    real = np.isfinite(expected)
    # To save space, the file can contain the encoder's memory of only the first photos.
    states = stored[f"memory_neighbors_0_to_{last}"]
    tempered = -loss.cross_entropy(jax.nn.log_softmax(log_p / 0.7), targets).sum(1)
    per_photo = loss.weighted(
        loss.cross_entropy(log_p_in_training, targets), loss.level_weights(s.cells.length, 2.0, 1.0)
    )
    errors = {
        "memory": sequence[: len(states)] - states,
        "logits": np.where(real, np.where(real, log_p, 0) - np.where(real, expected, 0), 0),
        "loss": per_photo.mean() - stored[f"train_loss_neighbors_1_to_{m}"],
        "log-probability": tempered - stored["target_logprob_temperature_0p7"],
        "beam log-probability": beams.log_probability - stored["beam4_logprob"],
    }
    results = {name: float(np.abs(np.asarray(error)).max()) for name, error in errors.items()}
    results["greedy tokens"] = float((greedy.tokens[:, 0] == stored[f"greedy_tokens_neighbors_0_to_{last}"]).mean())
    results["beam tokens"] = float((beams.tokens == stored["beam4_tokens"]).mean())
    return results


def _check(options: argparse.Namespace) -> int:
    results = check(options.file)
    for name, value in results.items():
        print(f"{name:22} {value:.1%} agree" if name.endswith("tokens") else f"{name:22} {value:.2e}")
    passed = all(value == 1.0 if name.endswith("tokens") else value < 1e-4 for name, value in results.items())
    print("passed" if passed else "failed: a difference is 1e-4 or more, or tokens differ")
    return 0 if passed else 1


def _import(options: argparse.Namespace) -> int:
    weights = read_weights(options.weights)
    s = settings_of(weights, heads=options.heads, neighbors=options.neighbors)
    params = nnx.to_pure_dict(nnx.state(from_state_dict(s, weights), nnx.Param))
    checkpoint.write_parameters(options.out, params)
    unused = ("base_width", "base_heads", "base_layers")  # by the parametrization "standard"
    free = ("attention", "attention_dropout", "dropout", "dtype", "remat", *unused)
    changed = {name: value for name, value in dataclasses.asdict(s).items() if name not in free}
    print(f"{options.out}: {sum(p.size for p in jax.tree.leaves(params)):,} parameters. Load them with these settings:")
    print(" ".join(f"--config.model.{name}={value}" for name, value in changed.items()))
    return 0


def _export(options: argparse.Namespace) -> int:
    s = _settings_of_parameters(safetensors.numpy.load(epath.Path(options.parameters).read_bytes()))
    weights = to_state_dict(checkpoint.read_module(options.parameters, lambda rngs: GeoTokenModel(s, rngs)))
    write_weights(options.out, weights)
    print(f"{options.out}: {len(weights)} tensors, {sum(value.size for value in weights.values()):,} numbers")
    return 0


def main() -> None:
    """Runs the action named on the command line.

    The exit status is 1 if `check` finds an error of 1e-4 or more or a different token, and 2 if a file cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog="python -m geotoken_jax.interop.official",
        description="Imports, exports and checks the published GeoToken weights.",
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    action = actions.add_parser("check", help="compare our model with stored outputs of the published model")
    action.add_argument("file", metavar="FILE.npz")
    action.set_defaults(run=_check)
    action = actions.add_parser(
        "import", help="convert published weights to a parameter file, as `geotoken train` writes it"
    )
    action.add_argument("weights", metavar="WEIGHTS", help=f"published weights, one of {', '.join(_FORMATS)}")
    action.add_argument("out", metavar="OUT.safetensors")
    action.add_argument(
        "--heads", type=int, default=8, help="number of attention heads, not stored in the weights (default: 8)"
    )
    action.add_argument(
        "--neighbors", type=int, default=15, help="number of neighbors, not stored in the weights (default: 15)"
    )
    action.set_defaults(run=_import)
    action = actions.add_parser("export", help="convert a parameter file of `geotoken train` to published weights")
    action.add_argument("parameters", metavar="PARAMETERS.safetensors")
    action.add_argument("out", metavar="OUT", help=f"file to write, one of {', '.join(_FORMATS)}")
    action.set_defaults(run=_export)
    options = parser.parse_args()
    try:
        sys.exit(options.run(options))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
