"""The published GeoToken state dict, in and out, and a check of our model against values stored from it.

`python -m geotoken_jax.interop.official ACTION`:

- `check FILE.npz`: loads a file of the form described in docs/fidelity.md and prints the largest error of memory,
  logits, loss and log-probability, and the agreement of greedy and beam tokens.
- `import WEIGHTS OUT.safetensors`: published weights become the file of parameters that `train` writes.
- `export PARAMETERS.safetensors OUT`: and the way back.

Published weights are `.pth` (needs torch), `.safetensors` or `.npz` files; nothing in them is unpickled.
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

from geotoken_jax import checkpoint, workdir
from geotoken_jax.geo.cells import MAX_GROUP
from geotoken_jax.model import loss
from geotoken_jax.model.geotoken import GeoTokenModel, ModelSettings
from geotoken_jax.model.memory import Neighbors
from geotoken_jax.predict import beam, sample

#: Published name -> array.
Weights = Mapping[str, np.ndarray]

#: Members of the published state dict that its forward pass never reads.
UNUSED = ("similarity_embedding.", "metadata_proj.", "coord_head.", "encoder_pos_encoder.", "decoder_pos_encoder.")
_PROJECTIONS = ("image_proj", "loc_proj", "text_proj")  # in our order: image, location, text


def settings(
    *, width: int, layers: int, heads: int, feed_forward: int, group: int, level: int, neighbors: int, **others: Any
) -> ModelSettings:
    """Returns the settings of the published form. Raises ValueError for a group whose tables nothing could hold.

    others: fields of ModelSettings that differ from the published code's: backbone_width (768), dropout (0.1), dtype
    ("float32"), remat ("none").
    """
    if group > MAX_GROUP:
        tables = 3 * (level // group) * 4**group * width * 4
        raise ValueError(
            f"group {group} has 4^{group} = {4**group:,} tokens a position, past an int32, and tables of "
            f"{tables / 1e12:,.0f} TB at width {width}: use a group up to {MAX_GROUP} that divides level {level}"
        )
    fixed = dict(
        norm="post", activation="relu", scheme="s2", memory="full", positions="sinusoidal", tie_tokens=False,
        copy_head=False, neighbor_tokens=True, neighbor_embeddings=True, neighbor_dropout=0.0, similarities=False,
        context="none", qk_norm=False, attention="xla",
    )  # fmt: skip
    free = {"backbone_width": 768, "dropout": 0.1, "dtype": "float32", "remat": "none", **others}
    return ModelSettings(
        width=width, heads=heads, feed_forward=feed_forward, level=level, group=group, neighbors=neighbors,
        encoder_layers=layers, decoder_layers=layers, **fixed, **free,
    )  # fmt: skip


def settings_of(weights: Weights, *, heads: int = 8, neighbors: int = 15) -> ModelSettings:
    """Returns the settings that a state dict's shapes tell; its heads and neighbors, which they do not, are given.

    Raises ValueError naming a tensor that is missing, or whose shape no settings have.
    """
    rows, width = _shape(weights, "embedding.weight", 2)
    return _settings(
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
    """Returns the settings of a file that `write_parameters` wrote of a model of the published form."""
    rows, width = _shape(parameters, "token_table", 2)
    layers, _, feed_forward = _shape(parameters, "encoder/feed_forward/up/kernel", 3)
    return _settings(
        rows=rows,
        positions=_shape(parameters, "head", 3)[0],
        width=width,
        layers=layers,
        feed_forward=feed_forward,
        backbone_width=_shape(parameters, "memory_builder/projections/up", 3)[1],
        heads=1,  # heads and neighbors shape no parameter of this form
        neighbors=1,
    )


def _shape(tensors: Weights, name: str, axes: int) -> tuple[int, ...]:
    if name not in tensors:
        raise ValueError(f"{name} is missing: this is no model of the published form")
    if tensors[name].ndim != axes:
        raise ValueError(f"{name} has the shape {tensors[name].shape}, of other than {axes} axes")
    return tensors[name].shape


def _settings(*, rows: int, positions: int, **sizes: Any) -> ModelSettings:
    """rows: of the token table, 6 for the face and 4^group for each of the other positions."""
    for group in range(1, MAX_GROUP + 1):
        if rows == 6 + (positions - 1) * 4**group:
            return settings(group=group, level=group * (positions - 1), **sizes)
    raise ValueError(f"the token table has {rows} rows, which no group gives with {positions} output positions")


def _places(s: ModelSettings, params: Any) -> dict[str, list[np.ndarray]]:
    """Returns published name -> where its numbers lie in our parameters, as views in its own layout.

    A tensor is the concatenation of its views, all of one shape, along the first axis: there are three for the
    stacked projections of queries, keys and values.
    """
    builder = params["memory_builder"]
    places = {
        "start_token_embedding": [params["start_embedding"][None]],
        "cls_token": [builder["cls"][None]],
        "embedding.weight": [params["token_table"]],
        "retrieval_embedding.weight": [params["neighbor_table"]],
    }
    for t, size in enumerate(s.cells.vocab_sizes):  # our head is as wide everywhere as the widest position
        places[f"output_layers.{t}.weight"] = [params["head"][t, :, :size].T]
        places[f"output_layers.{t}.bias"] = [params["head_bias"][t, :size]]
    for e, name in enumerate(_PROJECTIONS):
        for number, part in ((0, "up"), (2, "down")):
            places[f"{name}.{number}.weight"] = [builder["projections"][part][e].T]
            places[f"{name}.{number}.bias"] = [builder["projections"][f"{part}_bias"][e]]
    for side, depth, attentions in (
        ("encoder", s.encoder_layers, {"self_attn": "attention"}),
        ("decoder", s.decoder_layers, {"self_attn": "attention", "multihead_attn": "memory_attention"}),
    ):
        stack = params[side]
        for i in range(depth):
            layer = f"{side}.layers.{i}"
            for theirs, ours in attentions.items():
                q, k, v, out = (stack[ours][part] for part in ("q", "k", "v", "out"))
                places[f"{layer}.{theirs}.in_proj_weight"] = [part["kernel"][i].T for part in (q, k, v)]
                places[f"{layer}.{theirs}.in_proj_bias"] = [part["bias"][i] for part in (q, k, v)]
                places[f"{layer}.{theirs}.out_proj.weight"] = [out["kernel"][i].T]
                places[f"{layer}.{theirs}.out_proj.bias"] = [out["bias"][i]]
            for theirs, ours in (("linear1", "up"), ("linear2", "down")):
                places[f"{layer}.{theirs}.weight"] = [stack["feed_forward"][ours]["kernel"][i].T]
                places[f"{layer}.{theirs}.bias"] = [stack["feed_forward"][ours]["bias"][i]]
            for n in range(1 + len(attentions)):
                places[f"{layer}.norm{n + 1}.weight"] = [stack["norms"][n]["scale"][i]]
                places[f"{layer}.norm{n + 1}.bias"] = [stack["norms"][n]["bias"][i]]
    return places


def from_state_dict(s: ModelSettings, weights: Weights) -> GeoTokenModel:
    """Returns our model with the published weights, in float32.

    Raises ValueError naming a missing, extra or misshapen tensor.
    """
    model = nnx.eval_shape(lambda: GeoTokenModel(s, nnx.Rngs(0)))
    state = nnx.state(model, nnx.Param)
    params = jax.tree.map(lambda p: np.zeros(p.shape, p.dtype), nnx.to_pure_dict(state))
    places = _places(s, params)
    extra = sorted(name for name in weights if name not in places and not name.startswith(UNUSED))
    missing = sorted(name for name in places if name not in weights)
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"has an unknown tensor {extra[0]}"
        raise ValueError(
            f"the state dict {what} ({len(missing)} missing, {len(extra)} extra): is the configuration its own?"
        )
    for name, views in places.items():
        value, shape = weights[name], (len(views) * len(views[0]), *views[0].shape[1:])
        if value.shape != shape:
            raise ValueError(f"{name} has the wrong shape for this configuration: {value.shape} where {shape} fits")
        for view, part in zip(views, np.split(value, len(views)), strict=True):
            view[...] = part
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, params))
    nnx.update(model, state)
    return model


def to_state_dict(model: GeoTokenModel) -> dict[str, np.ndarray]:
    """Returns the weights under their published names, layouts included (members that nothing reads are left out)."""
    params = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    places = _places(model.settings, params)
    return {name: np.ascontiguousarray(np.concatenate(views)) for name, views in places.items()}


def read_weights(path: epath.PathLike) -> dict[str, np.ndarray]:
    """Returns the state dict of a `.pth`, `.safetensors` or `.npz` file, as float32 whatever the file has.

    The state dict may stand in a training checkpoint, as `model_state_dict`, `state_dict` or `model`, and its names may
    carry what DataParallel and torch.compile add. Raises ValueError for a file that is none of these, and
    ModuleNotFoundError for a `.pth` without torch.
    """
    path = epath.Path(path)
    read, _ = _form(path)
    try:
        found = read(path.read_bytes())
    except (FileNotFoundError, ModuleNotFoundError):
        raise
    except Exception as error:  # each form's reader has errors of its own, zipfile's and pickle's among them
        raise ValueError(f"{path} holds no state dict that can be read: {str(error).splitlines()[0]}") from error
    return {name.replace("_orig_mod.", "").removeprefix("module."): value for name, value in found.items()}


def write_weights(path: epath.PathLike, weights: Weights) -> None:
    """Writes a state dict as the `.pth`, `.safetensors` or `.npz` file that `path` ends in, whole or not at all."""
    path = epath.Path(path)
    _, write = _form(path)
    workdir.write_bytes(path, write(dict(weights)))


def _form(
    path: epath.Path,
) -> tuple[Callable[[bytes], dict[str, np.ndarray]], Callable[[dict[str, np.ndarray]], bytes]]:
    if path.suffix not in _FORMS:
        raise ValueError(f"{path} ends in {path.suffix or 'nothing'}: weights are files of {', '.join(_FORMS)}")
    return _FORMS[path.suffix]


def _torch() -> Any:
    try:
        import torch
    except ModuleNotFoundError:
        raise ModuleNotFoundError("a .pth file needs torch: pip install 'geotoken-jax[interop]'") from None
    return torch


def _read_pth(data: bytes) -> dict[str, np.ndarray]:
    torch = _torch()
    try:
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # whose own message tells how to run the file's code
        raise ValueError("it is more than tensors; save them alone: torch.save(model.state_dict(), FILE)") from None
    for name in ("model_state_dict", "state_dict", "model"):
        found = found.get(name, found)
    other = [name for name, value in found.items() if not torch.is_tensor(value)]
    if other:
        raise ValueError(f"{other[0]} in it is no tensor")
    return {name: value.float().numpy() for name, value in found.items()}


def _write_pth(weights: dict[str, np.ndarray]) -> bytes:
    torch, file = _torch(), io.BytesIO()
    torch.save({name: torch.tensor(value) for name, value in weights.items()}, file)
    return file.getvalue()


def _read_safetensors(data: bytes) -> dict[str, np.ndarray]:
    types = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64, "I64": np.int64}
    return {
        name: np.frombuffer(found["data"], types[found["dtype"]]).reshape(found["shape"]).astype(np.float32)
        for name, found in safetensors.deserialize(data)
    }


def _read_npz(data: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        return {name: file[name].astype(np.float32) for name in file.files}


def _write_npz(weights: dict[str, np.ndarray]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **weights)  # pyright: ignore[reportArgumentType]
    return file.getvalue()


_FORMS = {
    ".pth": (_read_pth, _write_pth),
    ".safetensors": (_read_safetensors, safetensors.numpy.save),
    ".npz": (_read_npz, _write_npz),
}


class _Stored(dict):
    def __missing__(self, name: str) -> np.ndarray:
        raise ValueError(f"the file lacks {name}: docs/fidelity.md says what one of this form holds")


def check(path: str) -> dict[str, float]:
    """Returns the largest absolute error of each stored quantity, and the share of greedy and beam tokens alike.

    Raises ValueError naming an array that the file lacks.
    """
    with np.load(path, allow_pickle=False) as file:
        stored = _Stored({name: file[name] for name in file.files})
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

    def run(model: GeoTokenModel, near: Neighbors, in_training: Neighbors) -> tuple:
        memory = model.encode(query, near)
        return (
            model(query, near, targets),
            model(query, in_training, targets),
            model.sequence(query, near)[0],
            sample.greedy(model, memory),
            beam.search(model, memory, stored["beam4_tokens"].shape[1]),
        )

    last = m - 1
    log_p, log_p_in_training, sequence, greedy, beams = nnx.jit(run)(model, neighbors(0), neighbors(1))
    want = jax.nn.log_softmax(stored[f"teacher_forced_logits_neighbors_0_to_{last}"])
    real = np.isfinite(want)
    states = stored[f"memory_neighbors_0_to_{last}"]  # of the first photos; the file may keep fewer, to be small
    tempered = -loss.cross_entropy(jax.nn.log_softmax(log_p / 0.7), targets).sum(1)
    per_photo = loss.weighted(
        loss.cross_entropy(log_p_in_training, targets), loss.level_weights(s.cells.length, 2.0, 1.0)
    )
    errors = {
        "memory": sequence[: len(states)] - states,
        "logits": np.where(real, np.where(real, log_p, 0) - np.where(real, want, 0), 0),
        "loss": per_photo.mean() - stored[f"train_loss_neighbors_1_to_{m}"],
        "log-probability": tempered - stored["target_logprob_temperature_0p7"],
        "beam log-probability": beams.log_probability - stored["beam4_logprob"],
    }
    found = {name: float(np.abs(np.asarray(error)).max()) for name, error in errors.items()}
    found["greedy tokens"] = float((greedy.tokens[:, 0] == stored[f"greedy_tokens_neighbors_0_to_{last}"]).mean())
    found["beam tokens"] = float((beams.tokens == stored["beam4_tokens"]).mean())
    return found


def _check(options: argparse.Namespace) -> int:
    found = check(options.file)
    for name, value in found.items():
        print(f"{name:22} {value:.1%} agree" if name.endswith("tokens") else f"{name:22} {value:.2e}")
    good = all(value == 1.0 if name.endswith("tokens") else value < 1e-4 for name, value in found.items())
    return 0 if good else 1


def _import(options: argparse.Namespace) -> int:
    weights = read_weights(options.weights)
    s = settings_of(weights, heads=options.heads, neighbors=options.neighbors)
    params = nnx.to_pure_dict(nnx.state(from_state_dict(s, weights), nnx.Param))
    checkpoint.write_parameters(options.out, params)
    changed = {
        name: value for name, value in dataclasses.asdict(s).items() if name not in ("dropout", "dtype", "remat")
    }
    print(f"{options.out}: {sum(p.size for p in jax.tree.leaves(params)):,} parameters, to be read with")
    print(" ".join(f"--config.model.{name}={value}" for name, value in changed.items()))
    return 0


def _export(options: argparse.Namespace) -> int:
    s = _settings_of_parameters(safetensors.numpy.load(epath.Path(options.parameters).read_bytes()))
    weights = to_state_dict(checkpoint.read_module(options.parameters, lambda rngs: GeoTokenModel(s, rngs)))
    write_weights(options.out, weights)
    print(f"{options.out}: {len(weights)} tensors, {sum(value.size for value in weights.values()):,} numbers")
    return 0


def main() -> None:
    """Runs one action; exits with 1 where a check is past its tolerance and with 2 where a file is not what it is to
    be."""
    parser = argparse.ArgumentParser(
        prog="python -m geotoken_jax.interop.official", description="The published GeoToken weights, in and out."
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    action = actions.add_parser("check", help="compare our model with stored values of the published one")
    action.add_argument("file", metavar="FILE.npz")
    action.set_defaults(run=_check)
    action = actions.add_parser("import", help="published weights to parameters as `geotoken train` writes them")
    action.add_argument("weights", metavar="WEIGHTS", help=f"one of {', '.join(_FORMS)}")
    action.add_argument("out", metavar="OUT.safetensors")
    action.add_argument("--heads", type=int, default=8, help="not to be seen in the weights (default: 8)")
    action.add_argument("--neighbors", type=int, default=15, help="not to be seen in the weights (default: 15)")
    action.set_defaults(run=_import)
    action = actions.add_parser("export", help="parameters as `geotoken train` writes them to published weights")
    action.add_argument("parameters", metavar="PARAMETERS.safetensors")
    action.add_argument("out", metavar="OUT", help=f"one of {', '.join(_FORMS)}")
    action.set_defaults(run=_export)
    options = parser.parse_args()
    try:
        sys.exit(options.run(options))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
