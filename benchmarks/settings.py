"""Measures the effect of single settings of the decoder on EarthView, each a change to the demo's model.

`python -m benchmarks.settings --workdir=runs/demo` needs the finished work directory of `make demo`. It trains once per
setting, always with the same training settings, and prints a line of JSON. Differences under 0.01 nats are noise.
`--markdown` prints the table of docs/settings.md from the lines.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

#: Setting -> its changes to config.model.
CHANGES: dict[str, dict[str, Any]] = {
    "the demo's": {},
    "post-norm": dict(norm="post"),
    "sinusoidal positions": dict(positions="sinusoidal"),
    "separate token tables": dict(tie_tokens=False),
    "ReLU": dict(activation="relu"),
    "SwiGLU, as many parameters": dict(activation="swiglu", feed_forward=128),
    "GEGLU, as many parameters": dict(activation="geglu", feed_forward=128),
    "normalized queries and keys": dict(qk_norm=True),
    "full memory": dict(memory="full"),
    "no copy head": dict(copy_head=False),
    "no similarities": dict(similarities=False),
}
#: Name in metrics.jsonl -> column of the table.
COLUMNS = {
    "validation/loss": "loss",
    "validation/within_25_km": "25 km",
    "validation/within_200_km": "200 km",
    "validation/within_750_km": "750 km",
    "validation/within_2500_km": "2500 km",
}


def measure(config: Any, workdir: str, examples: int) -> dict[str, float]:
    """Returns the metrics of the best validation in a short training, the model's size, and the training's seconds."""
    from geotoken_jax import configuration
    from geotoken_jax.sharding import make_mesh
    from geotoken_jax.stages import train, training
    from geotoken_jax.workdir import Workdir

    config.train.update(examples=examples, evaluate_every=max(1, examples // config.train.batch_size // 4))
    config = configuration.read(config)
    mesh = make_mesh(config.mesh)
    task, splits, resident = train.decoder(config, Workdir(workdir), mesh)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = training.fit(task, config, "train", splits, folder, "train", mesh, resident)
        lines = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
        best = next(line for line in lines if line["step"] == result.best_step and "validation/loss" in line)
    metrics = {column: round(best[name], 4) for name, column in COLUMNS.items()}
    return {**metrics, "parameters": result.parameters, "seconds": round(time.monotonic() - began)}


def markdown(lines: list[dict[str, Any]]) -> str:
    """Returns the lines as a Markdown table."""
    rows = ["| setting | parameters | loss, nats | 25 km | 200 km | 750 km | 2500 km | seconds |", "|---" * 8 + "|"]
    for line in lines:
        shares = " | ".join(f"{100 * line[column]:.1f}" for column in list(COLUMNS.values())[1:])
        rows.append(
            f"| {line['setting']} | {line['parameters']:,} | {line['loss']:.3f} | {shares} | {line['seconds']} |"
        )
    return "\n".join(rows)


def main() -> None:
    """Trains and measures each setting, or formats printed lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workdir", default="runs/demo")
    parser.add_argument("--examples", type=int, default=40_000)
    parser.add_argument("--only", action="append", help="a setting of CHANGES (may be repeated)")
    parser.add_argument("--markdown", action="store_true", help="format lines from standard input")
    options = parser.parse_args()
    if options.markdown:
        print(markdown([json.loads(line) for line in sys.stdin if line.startswith("{")]))
        return
    if not (Path(options.workdir) / "tokens" / "manifest.json").exists():
        print(json.dumps({"skipped": f"{options.workdir} has no tokens/: `make demo` makes it"}))
        return
    from configs import demo

    for name in options.only or CHANGES:
        config: Any = demo.get_config()
        config.model.update(CHANGES[name])
        print(json.dumps({"setting": name, **measure(config, options.workdir, options.examples)}), flush=True)


if __name__ == "__main__":
    main()
