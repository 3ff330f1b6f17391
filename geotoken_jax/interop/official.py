"""The published GeoToken state dict, in and out, and a check of our model against values stored from it.

`python -m geotoken_jax.interop.official check FILE.npz` loads a file of the form described in docs/fidelity.md and
prints the largest error of memory, logits, loss and log-probability, and the agreement of greedy and beam tokens.
"""

import argparse
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from geotoken_jax.model import loss
from geotoken_jax.model.geotoken import GeoTokenModel, ModelSettings
from geotoken_jax.model.memory import Neighbors
from geotoken_jax.predict import beam, sample

#: Members of the published state dict that its forward pass never reads.
UNUSED = ("similarity_embedding.", "metadata_proj.", "coord_head.", "encoder_pos_encoder.", "decoder_pos_encoder.")
_PROJECTIONS = ("image_proj", "loc_proj", "text_proj")  # in our order: image, location, text


def settings(
    *, width: int, layers: int, heads: int, feed_forward: int, group: int, level: int, neighbors: int,
    backbone_width: int = 768, dropout: float = 0.1, dtype: str = "float32", remat: str = "none",
) -> ModelSettings:  # fmt: skip
    """Returns the settings of the published form."""
    return ModelSettings(
        width=width, heads=heads, feed_forward=feed_forward, dropout=dropout, norm="post", activation="relu",
        dtype=dtype, remat=remat, level=level, group=group, backbone_width=backbone_width, neighbors=neighbors,
        encoder_layers=layers, decoder_layers=layers, memory="full", positions="sinusoidal", tie_tokens=False,
        copy_head=False, neighbor_tokens=True, similarities=False,
    )  # fmt: skip


def _table(s: ModelSettings) -> dict[str, tuple[tuple, ...]]:
    """Returns published name -> where it goes: our path, then how to index it (an axis-0 slice or None).

    Linear weights are transposed; `in_proj` is cut in three.
    """
    table: dict[str, tuple[tuple, ...]] = {
        "start_token_embedding": ((("start_embedding",), "row"),),
        "cls_token": ((("memory_builder", "cls"), "row"),),
        "embedding.weight": ((("token_table",), "same"),),
        "retrieval_embedding.weight": ((("neighbor_table",), "same"),),
    }
    for t in range(s.cells.length):
        table[f"output_layers.{t}.weight"] = ((("head", t), "head"),)
        table[f"output_layers.{t}.bias"] = ((("head_bias", t), "head_bias"),)
    for e, name in enumerate(_PROJECTIONS):
        for number, part in ((0, "up"), (2, "down")):
            table[f"{name}.{number}.weight"] = ((("memory_builder", "projections", part, e), "transpose"),)
            table[f"{name}.{number}.bias"] = ((("memory_builder", "projections", f"{part}_bias", e), "same"),)
    for side, depth, attentions, norms in (
        ("encoder", s.encoder_layers, {"self_attn": "attention"}, 2),
        ("decoder", s.decoder_layers, {"self_attn": "attention", "multihead_attn": "memory_attention"}, 3),
    ):
        for i in range(depth):
            prefix = f"{side}.layers.{i}"
            for theirs, ours in attentions.items():
                for kind, leaf, how in (("weight", "kernel", "transpose"), ("bias", "bias", "same")):
                    table[f"{prefix}.{theirs}.in_proj_{kind}"] = tuple(
                        ((side, ours, part, leaf, i), f"{how} {k}") for k, part in enumerate("qkv")
                    )
                    table[f"{prefix}.{theirs}.out_proj.{kind}"] = (((side, ours, "out", leaf, i), how),)
            for theirs, ours in (("linear1", "up"), ("linear2", "down")):
                table[f"{prefix}.{theirs}.weight"] = (((side, "feed_forward", ours, "kernel", i), "transpose"),)
                table[f"{prefix}.{theirs}.bias"] = (((side, "feed_forward", ours, "bias", i), "same"),)
            for n in range(norms):
                table[f"{prefix}.norm{n + 1}.weight"] = (((side, "norms", n, "scale", i), "same"),)
                table[f"{prefix}.norm{n + 1}.bias"] = (((side, "norms", n, "bias", i), "same"),)
    return table


def from_state_dict(s: ModelSettings, weights: Mapping[str, np.ndarray]) -> GeoTokenModel:
    """Returns our model with the published weights.

    weights: published name -> array. Raises ValueError naming a missing, extra or misshapen tensor.
    """
    table = _table(s)
    extra = sorted(name for name in weights if name not in table and not name.startswith(UNUSED))
    missing = sorted(name for name in table if name not in weights)
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"has an unknown tensor {extra[0]}"
        raise ValueError(
            f"the state dict {what} ({len(missing)} missing, {len(extra)} extra): is the configuration its own?"
        )
    model = nnx.eval_shape(lambda: GeoTokenModel(s, nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    params = jax.tree.map(lambda p: np.zeros(p.shape, p.dtype), params)
    for name, places in table.items():
        value = np.asarray(weights[name], np.float32)
        for place, how in places:
            target, index = _target(params, place)
            target = target if index is None else target[index]
            if how.startswith("head"):
                # The face's has 6 columns of the widest vocabulary.
                target = target[..., : s.cells.vocab_sizes[place[-1]]]
            part = _ours(value, how, len(places))
            if part.shape != target.shape:
                raise ValueError(
                    f"{name} has the wrong shape for this configuration: {part.shape} where {target.shape} fits"
                )
            target[...] = part
    state = nnx.state(model, nnx.Param)
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, params))
    nnx.update(model, state)
    return model


def to_state_dict(model: GeoTokenModel) -> dict[str, np.ndarray]:
    """Returns the weights under their published names, layouts included (members that nothing reads are left out)."""
    params = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    sizes = model.settings.cells.vocab_sizes
    weights = {}
    for name, places in _table(model.settings).items():
        parts = []
        for place, how in places:
            target, index = _target(params, place)
            value = target if index is None else target[index]
            if how.startswith("head"):
                value = value[..., : sizes[place[-1]]]
            if how.split()[0] in ("transpose", "head"):
                value = value.T
            parts.append(value[None] if how == "row" else value)
        weights[name] = np.ascontiguousarray(np.concatenate(parts) if len(parts) > 1 else parts[0])
    return weights


def _target(params: Any, place: tuple) -> tuple[np.ndarray, int | None]:
    index = place[-1] if isinstance(place[-1], int) else None
    for part in place if index is None else place[:-1]:
        params = params[part]
    return params, index


def _ours(value: np.ndarray, how: str, parts: int) -> np.ndarray:
    if parts > 1:
        value = np.split(value, parts)[int(how.split()[1])]
    return value.T if how.split()[0] in ("transpose", "head") else value[0] if how == "row" else value


def check(path: str) -> dict[str, float]:
    """Returns the largest absolute error of each stored quantity, and the share of greedy and beam tokens alike."""
    with np.load(path, allow_pickle=False) as file:
        stored = {name: file[name] for name in file.files}
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


def main() -> None:
    """Checks one file; exits with 1 past the tolerance."""
    parser = argparse.ArgumentParser(
        prog="python -m geotoken_jax.interop.official", description="Checks our model against a file of stored values."
    )
    parser.add_argument("action", choices=["check"])
    parser.add_argument("file")
    found = check(parser.parse_args().file)
    for name, value in found.items():
        print(f"{name:22} {value:.1%} agree" if name.endswith("tokens") else f"{name:22} {value:.2e}")
    good = all(value == 1.0 if name.endswith("tokens") else value < 1e-4 for name, value in found.items())
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
