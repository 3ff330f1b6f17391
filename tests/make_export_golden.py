"""Writes an export of the present format and its answers to tests/golden: python -m tests.make_export_golden

Run it once per format, with the last code that writes it, and keep the files: tests/test_export_format.py shows that
later releases answer alike with them. export_1 is from commit f0c8505.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from geotoken_jax import GeoToken, Prediction
from tests import exports

GOLDEN = Path(__file__).with_name("golden")


def small(config: Any) -> None:
    """Makes the export smaller, and lets it choose by a selector that is not trained."""
    config.predict.update(selectors=("greedy", "log_probability"), choice="log_probability")
    config.embed.thumbnail.size = 2
    config.align.model.update(hidden=8)
    config.align.model.location.update(fourier=4, hidden=4, out=4)
    config.model.update(backbone_width=12, group=2, width=8, feed_forward=8)


def photos() -> list[np.ndarray]:
    """Returns photos that no library draws."""
    row, column, channel = np.ogrid[:24, :32, :3]
    return [((40 * k + 5 * row + 3 * k * column + 60 * channel) % 256).astype(np.uint8) for k in range(4)]


def answers(predictions: list[Prediction]) -> list[dict[str, Any]]:
    fields = "latitude", "longitude", "radius_km", "radius_90_km"
    return [{name: getattr(p, name) for name in fields} | {"within": list(p.within.values())} for p in predictions]


if __name__ == "__main__":
    from geotoken_jax.predict import export_format

    name = f"export_{export_format.FORMAT}"
    exports.write(GOLDEN / name, small)
    found = answers(GeoToken.load(GOLDEN / name).predict(photos()))
    (GOLDEN / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
