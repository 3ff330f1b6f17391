"""report/index.html: one page that opens from disk and needs nothing else.

Text that comes from data (ids, names of places and variants) is escaped. Nothing depends on the clock or the machine.
"""

import base64
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath
from jaxtyping import Float
from PIL import Image, ImageOps

from geotoken_jax import records
from geotoken_jax import workdir as stages
from geotoken_jax.analysis import charts, frame, reliability, worldmap
from geotoken_jax.gallery.table import Table
from geotoken_jax.geo import distance

if TYPE_CHECKING:
    from geotoken_jax.analysis.evaluate import Method, Points
    from geotoken_jax.configuration import EvaluateSettings

#: Photos on the map: at most so many a split, and so many on all (2 KB each).
_MAP_SPLIT, _MAP_ALL = 300, 1200
#: The split whose photos are shown one by one, and how many of each kind.
_SHOWN_SPLIT, _SHOWN = "test", 10
#: Neighbors and candidates on a photo's card.
_NEIGHBORS, _CANDIDATES = 6, 5
#: A predicted place is named by the nearest gallery photo up to so far.
_NEAR_KM = 100.0
#: The split that the gallery is made of.
_GALLERY = "train"


def page(
    workdir: epath.Path,
    name: str,
    metrics: Mapping[str, Any],
    truths: Mapping[str, "Points"],
    methods: Mapping[str, Sequence["Method"]],
    options: "EvaluateSettings",
) -> str:
    """Returns the page. name: of the configuration. truths, methods: by split, in the order to show; metrics: of
    `evaluate.run`."""
    uncertainty = {split: scores["uncertainty"] for split, scores in metrics["splits"].items()}
    shown = _SHOWN_SPLIT if _SHOWN_SPLIT in truths else next(iter(truths))
    sections = [
        frame.Section("world-map", "Map", "On the map", _map(workdir, truths, methods, options)),
        frame.Section("accuracy", "Accuracy", "Accuracy", _accuracy(metrics, options.reference)),
        frame.Section("differences", "Differences", "Differences", _differences(metrics)),
        frame.Section("distance", "Distance", "Accuracy against distance", _distance(methods, options.reference)),
        frame.Section("sure", "How sure", "How sure it is", reliability.html(uncertainty)),
        frame.Section("area", "Area", "How much must be searched", reliability.area_html(uncertainty)),
        frame.Section("continents", "Continents", "By continent", _continents(metrics, options.reference)),
        frame.Section(
            "clean", "New photos", "Without photos that the gallery knows", _clean(metrics, options.reference)
        ),
        frame.Section(
            "photos",
            "Photos",
            "Best, median and worst",
            _photos(workdir, shown, truths[shown], methods[shown], options.reference),
        ),
        frame.Section("training", "Training", "Training", _training(workdir, options.labels)),
        frame.Section("made", "How it was made", "How it was made", _made(workdir, metrics)),
    ]
    headline = _headline(workdir, name, metrics, shown, options)
    return frame.page("GeoToken: where were these photos taken?", headline, sections)


def _headline(
    workdir: epath.Path, name: str, metrics: Mapping[str, Any], split: str, options: "EvaluateSettings"
) -> str:
    scores = metrics["splits"][split]
    main = next((m for m in scores["methods"] if m["main"] and m["variant"] == options.reference), scores["methods"][0])
    rivals = [m for m in scores["methods"] if m["baseline"] and m["main"] and m is not main]
    rival = max(rivals, key=lambda m: m["accuracy"][1]["value"], default=None)  # the best within 25 km
    tiles = []
    for i, a in enumerate(main["accuracy"]):
        tick = versus = ""
        if rival:
            other = rival["accuracy"][i]["value"]
            gain = 100 * (a["value"] - other)
            tick = f'<b style="left:{100 * other:.1f}%"></b>'
            sign = "up" if gain > 0 else "down" if gain < 0 else ""
            points = f'<span class="{sign}">{frame.signed(gain)} points</span>'
            versus = f"<small>{points} against {escape(rival['name'])}</small>"
        tiles.append(
            f"<li><small>within {a['km']:,} km</small><strong>{100 * a['value']:.1f} %</strong>"
            f'<div class="bar"><i style="width:{100 * a["value"]:.1f}%"></i>{tick}</div>{versus}</li>'
        )
    city = main["accuracy"][1]
    tick = f"; the tick on each bar is {escape(rival['name'])}" if rival else ""
    photos = stages.read_manifest(workdir, "photos")
    source = photos.settings.get("photos", {}).get("source", "")
    facts = {
        "Configuration": name,
        "Photos": f"{source} " + ", ".join(f"{part} {count:,}" for part, count in photos.counts.items()),
        "Median error": f"{frame.km(main['median_km'])} on {split}",
        "Seeds": ", ".join(f"{part} {seed}" for part, seed in _seeds(workdir, options.reference).items()),
    }
    return (
        "<h1>A photo goes in, a place on Earth comes out</h1>"
        "<p>GeoToken looks at a photo and at the places of photos like it, and writes down where it was taken as a "
        "sequence of ever smaller cells of the globe. This page shows how well it does.</p>"
        f'<p class="lead">On the {scores["photos"]:,} photos of <b>{escape(split)}</b>, <b>{escape(main["name"])}</b> '
        f"named a place within {city['km']} km of the true one for {100 * city['value']:.1f} % of them{tick}.</p>"
        f'<ul class="tiles">{"".join(tiles)}</ul><dl class="facts">'
        + "".join(f"<div><dt>{fact}</dt><dd>{escape(value.strip())}</dd></div>" for fact, value in facts.items())
        + "</dl>"
    )


def _seeds(workdir: epath.Path, variant: str) -> dict[str, int]:
    """Returns the seeds on the way to one variant's predictions, by folder."""

    def find(value: Any) -> int | None:
        if not isinstance(value, Mapping):
            return None
        return (
            value["seed"] if "seed" in value else next(filter(lambda s: s is not None, map(find, value.values())), None)
        )

    folders = ["photos", "align", f"geotoken/{variant}", f"predictions/{variant}"]
    made = [folder for folder in folders if (workdir / folder / "manifest.json").exists()]
    seeds = {folder.split("/")[0]: find(stages.read_manifest(workdir, folder).settings) for folder in made}
    return {folder: seed for folder, seed in seeds.items() if seed is not None}


def _accuracy(metrics: Mapping[str, Any], reference: str) -> str:
    columns = ["Method", *frame.thresholds(), "median km", "mean km", "GeoScore"]
    parts, notes = [], []
    for split, scores in metrics["splits"].items():
        honest = [m for m in scores["methods"] if not m["bound"]]
        best = [max(m["accuracy"][i]["value"] for m in honest) for i in range(len(distance.THRESHOLDS_KM))]
        rows = []
        for m in scores["methods"]:
            look = "bound" if m["bound"] else "reference" if m["main"] and m["variant"] == reference else ""
            cells = [
                frame.percents(a, "best" if not m["bound"] and a["value"] == top > 0 else "")
                for a, top in zip(m["accuracy"], best, strict=True)
            ]
            g = m["geoscore"]
            cells += [
                f"<td>{m['median_km']:,.1f}</td><td>{m['mean_km']['value']:,.0f}</td>"
                f"<td>{g['value']:,.0f}<small>{g['low']:,.0f}&ndash;{g['high']:,.0f}</small></td>"
            ]
            rows.append(frame.row(m["name"] + (" (bound)" if m["bound"] else ""), cells, look))
            if m["missing"]:
                notes.append(
                    f"{split}: {m['name']} has no prediction for {m['missing']:,} photos; they count as wrong."
                )
        parts.append((split, _size(scores), frame.table(columns, [frame.body(len(columns), rows)])))
    return (
        f"<p>Percent of photos placed {'less than' if metrics['strict'] else 'within'} a distance of the truth, on the "
        f"{metrics['earth']}, with 95 % bootstrap intervals, resampled by "
        "author where authors are known. The best choice of each column is bold. A bound knows the truth: it shows "
        "what a perfect choice among the same candidates would reach.</p>"
        + frame.folded(parts)
        + "".join(f"<p>{escape(note)}</p>" for note in notes)
    )


def _differences(metrics: Mapping[str, Any]) -> str:
    parts = []
    for split, scores in metrics["splits"].items():
        rows = [frame.row(m["name"], map(frame.points, m["accuracy"])) for m in scores["differences"]]
        if rows:
            table = frame.table(["Method", *frame.thresholds()], [frame.body(6, rows)])
            parts.append((split, _size(scores), table))
    if not parts:
        return "<p>There is nothing to compare the reference with.</p>"
    reference = next(scores["reference"] for scores in metrics["splits"].values() if scores["reference"])
    return (
        f"<p>Points above (+) or below (&minus;) <b>{escape(reference)}</b>, over the same resamples of the same "
        "photos. Color marks the differences whose 95 % interval excludes zero.</p>"
        + frame.folded(parts)
        + _comparisons(metrics)
    )


def _comparisons(metrics: Mapping[str, Any]) -> str:
    bodies = []
    for split, scores in metrics["splits"].items():
        rows = [
            frame.row(f"{pair['name']}, against {pair['against']}", map(frame.points, pair["accuracy"]))
            for pair in scores["comparisons"]
        ]
        if rows:
            bodies.append(frame.body(6, rows, split, _size(scores)))
    return f"<h3>Other pairs</h3>{frame.table(['Pair', *frame.thresholds()], bodies)}" if bodies else ""


def _continents(metrics: Mapping[str, Any], reference: str) -> str:
    parts = []
    for split, scores in metrics["splits"].items():
        bodies = []
        for i, method in enumerate(scores["continents"][0]["methods"] if scores["continents"] else ()):
            rows = [
                frame.row(
                    part["name"],
                    [
                        f"<td>{part['photos']:,}</td>",
                        *map(frame.percents, part["methods"][i]["accuracy"]),
                        f"<td>{part['methods'][i]['geoscore']['value']:,.0f}</td>",
                    ],
                    "reference" if method["variant"] == reference else "",
                )
                for part in scores["continents"]
            ]
            bodies.append(frame.body(8, rows, method["name"]))
        if bodies:
            table = frame.table(["Continent", "Photos", *frame.thresholds(), "GeoScore"], bodies)
            parts.append((split, _size(scores), table))
    if not parts:
        return "<p>No photo here has a country or a continent.</p>"
    return (
        "<p>Percent of the photos of each continent that were placed within a distance. A photo whose source names no "
        f"country counts as unknown.</p>{frame.folded(parts)}"
    )


def _clean(metrics: Mapping[str, Any], reference: str) -> str:
    bodies, notes = [], []
    for split, scores in metrics["splits"].items():
        clean, every = scores["clean"], {m["variant"]: m for m in scores["methods"] if m["main"]}
        counts = ", ".join(f"{kind} {count:,}" for kind, count in clean["left_out"].items() if count)
        left = f"{clean['photos']:,} of {scores['photos']:,} photos left" + (f"; left out: {counts}" if counts else "")
        if not counts or not clean["methods"]:
            notes.append(f"<p>{escape(split)}: {left}.</p>")
            continue
        rows = []
        for method in clean["methods"]:
            cells = [
                f"<td>{100 * a['value']:.1f}<small>of all {100 * b['value']:.1f}</small></td>"
                for a, b in zip(method["accuracy"], every[method["variant"]]["accuracy"], strict=True)
            ]
            rows.append(frame.row(method["name"], cells, "reference" if method["variant"] == reference else ""))
        bodies.append(frame.body(6, rows, split, left))
    return (
        "<p>A photo is easier if the gallery has another by its author, or one that looks the same. Here are the "
        "photos left without those that share id or author with a gallery photo, or whose image embedding has a cosine "
        f"above {metrics['cosine_above']:g} with one; below each figure, that of all photos.</p>"
        + (frame.table(["Method", *frame.thresholds()], bodies) if bodies else "")
        + "".join(notes)
    )


def _size(scores: Mapping[str, Any]) -> str:
    authors = f", {scores['authors']:,} authors" if scores["authors"] else ""
    return f"{scores['photos']:,} photos{authors}"


def _distance(methods: Mapping[str, Sequence["Method"]], reference: str) -> str:
    """Draws a panel a split: a color a variant; of the bounds, only those of the baselines and of the reference."""
    drawn = {
        split: [m for m in found if not m.bound or m.baseline or m.variant == reference]
        for split, found in methods.items()
    }
    each = {(m.variant, m.choice): m for found in drawn.values() for m in found}
    variants = sorted({m.variant for m in each.values()}, key=lambda variant: (variant != reference, variant))
    colors = {variant: i for i, variant in enumerate(variants)}
    grid = np.geomspace(0.1, 20_000, 160)
    figures = []
    for split, found in drawn.items():
        within = [100 * np.searchsorted(np.sort(m.km), grid, side="right") / len(m.km) for m in found]
        series = [
            charts.Series(m.name, colors[m.variant], _look(m), grid, y) for m, y in zip(found, within, strict=True)
        ]
        panel = charts.chart(
            series[::-1],  # the first is drawn last, over the others
            title=f"Percent of the photos of {split} within a distance, one curve a method",
            x_label="distance from the truth, km",
            y_label="percent of photos",
            log_x=True,
            marks=distance.THRESHOLDS_KM,
        )
        figures.append(frame.figure(split, panel))
    legend = frame.legend(
        (m.name + (" (bound)" if m.bound else ""), colors[m.variant], _look(m)) for m in each.values()
    )
    return (
        "<p>How many photos are within a distance of the truth, at every distance; the dotted lines are the "
        f'thresholds of the table.</p>{legend}<div class="charts">{"".join(figures)}</div>'
    )


def _look(method: "Method") -> str:
    return "dashed" if method.bound else "solid" if method.main else "dotted"


def _training(workdir: epath.Path, labels: Mapping[str, str]) -> str:
    """Draws train/loss* and validation/loss* of every model that kept its metrics; the parts of a loss are faint."""
    paths = [workdir / "align" / "metrics.jsonl", *sorted((workdir / "geotoken").glob("*/metrics.jsonl"))]
    figures = []
    for path in paths:
        curves = _curves(path) if path.exists() else {}
        series = [
            charts.Series(key, int(key.startswith("validation")), "solid" if key.endswith("/loss") else "faint", *curve)
            for key, curve in sorted(curves.items(), key=lambda item: item[0].endswith("/loss"))
        ]
        if series:
            name = "Alignment" if path.parent.name == "align" else labels.get(path.parent.name, path.parent.name)
            title = f"Loss of {name} on train and validation photos over training steps"
            figures.append(frame.figure(name, charts.chart(series, title=title, x_label="step", y_label="loss")))
    if not figures:
        return "<p>No model here kept its training metrics.</p>"
    legend = frame.legend([("train", 0, "solid"), ("validation", 1, "solid"), ("parts of either loss", 7, "faint")])
    return f'<p>Loss over training steps.</p>{legend}<div class="charts">{"".join(figures)}</div>'


def _curves(path: epath.Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns key -> steps and finite values, at most about 500. A step that was run again counts once, as last run."""
    values: dict[str, dict[int, float]] = {}
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # a run that was killed may have left half a line
        for key, value in row.items():
            if key.startswith(("train/loss", "validation/loss")) and math.isfinite(value):
                values.setdefault(key, {})[row["step"]] = value
    curves = {}
    for key, by_step in values.items():
        steps = np.array(sorted(by_step))
        steps = steps[np.unique(np.linspace(0, len(steps) - 1, 500).round().astype(int))]
        curves[key] = steps, np.array([by_step[step] for step in steps.tolist()])
    return curves


def _map(
    workdir: epath.Path,
    truths: Mapping[str, "Points"],
    methods: Mapping[str, Sequence["Method"]],
    options: "EvaluateSettings",
) -> str:
    """Returns the map, with what its script draws as JSON that is safe inside <script>."""
    names = {m.variant: m.name for split in methods.values() for m in split if m.main}
    splits = {}
    for split, truth in truths.items():
        photos = records.Photos(workdir / "photos", split)
        count = min(_MAP_SPLIT, _MAP_ALL // len(truths), len(truth.ids))
        rows = np.sort(np.random.default_rng(options.seed).choice(len(truth.ids), count, replace=False))
        main = {m.variant: m for m in methods[split] if m.main}
        splits[split] = {
            "total": len(truth.ids),
            "photos": [
                {
                    "id": truth.ids[row],
                    "place": _place(truth.extra[row]),
                    "truth": _rounded(truth.coordinates[row], 4),
                    "image": _data_uri(photos[row]["image"], 64),
                    "guesses": [_guess(main.get(variant), row) for variant in names],
                }
                for row in rows.tolist()
            ],
        }
    data = {
        "thresholds": list(distance.THRESHOLDS_KM),
        "methods": list(names.values()),
        "reference": list(names).index(options.reference),
        "splits": splits,
    }
    listed = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return frame.fill("map.html", {"data": listed})


def _guess(method: "Method | None", row: int) -> list[float] | None:
    if method is None or np.isnan(method.coordinates[row, 0]):
        return None
    return [*_rounded(method.coordinates[row], 4), *_rounded(method.km[row : row + 1], 3)]


def _photos(workdir: epath.Path, split: str, truth: "Points", methods: Sequence["Method"], reference: str) -> str:
    """Draws the photos of one split that the reference placed best, in the middle, and worst."""
    method = next((m for m in methods if m.main and m.variant == reference), None)
    if method is None:
        return f"<p>{escape(reference)} has no predictions for {escape(split)}.</p>"
    order = np.argsort(method.km, kind="stable")[: len(method.km) - method.missing]
    middle = max(0, (len(order) - _SHOWN) // 2)
    kinds = {
        "best": order[:_SHOWN],
        "median": order[middle : middle + _SHOWN],
        "worst": order[::-1][:_SHOWN],
    }
    wanted = {truth.ids[row] for rows in kinds.values() for row in rows}
    rows_of = _predictions(workdir / "predictions" / reference / f"{split}.jsonl", wanted)
    neighbors = [n["id"] for row in rows_of.values() for n in row.get("neighbors", ())[:_NEIGHBORS]]
    gallery = Gallery(workdir, neighbors)
    photos = records.Photos(workdir / "photos", split)
    parts = [
        f"<p>The {_SHOWN} photos of {escape(split)} that {escape(method.name)} placed best, in the middle of its "
        "ranking, and worst. Under each photo, the gallery photos that it resembles most, with their distance from the "
        "truth, and the places that were weighed. Scroll sideways for more.</p>"
        '<p class="key muted"><i style="background:#118a4b"></i>truth <i style="background:#c4174f"></i>prediction '
        '<i style="background:#e3a008"></i>other candidates <i style="background:#777"></i>neighbors</p>'
    ]
    for kind, rows in kinds.items():
        cards = [_card(photos[int(row)], rows_of[truth.ids[row]], gallery) for row in rows]
        row = f'<div class="cards" tabindex="0" role="region" aria-label="The {kind}">{"".join(cards)}</div>'
        parts.append(f"<h3>The {len(cards)} {kind}</h3>{row}")
    return "".join(parts)


class Gallery:
    """The photos that neighbors are: ids and coordinates of gallery/, and of those asked for what photos/ has.

    Those of another split and its table in the same way, where one is named.
    """

    def __init__(self, workdir: epath.Path, wanted: Iterable[str], split: str = _GALLERY):
        """wanted: ids of those that are to be shown."""
        self._photos = records.Photos(workdir / "photos", split)
        table = Table(workdir / "gallery" if split == _GALLERY else workdir / "queries" / split)
        self._ids = np.asarray(table.ids())
        self._vectors = distance.to_unit_vectors(*table.coordinates().T)
        rows = np.flatnonzero(np.isin(self._ids, np.array([name.encode() for name in wanted], self._ids.dtype)))
        self._row = {bytes(self._ids[row]).decode(): int(row) for row in rows}

    def near(self, at: Float[np.ndarray, "2"]) -> str:
        """Returns the place of the nearest photo, or "" where there is none nearby."""
        similarity = self._vectors @ distance.to_unit_vectors(*at)
        nearest = int(np.argmax(similarity))
        near = similarity[nearest] >= math.cos(_NEAR_KM / distance.EARTH_RADIUS_KM)
        return _place(self._photo(nearest)) if near else ""

    def image(self, name: str) -> str:
        """Returns a thumbnail as an HTML element; an empty square for a photo that is not in the gallery."""
        if name not in self._row:
            return '<span class="none"></span>'
        photo = self._photo(self._row[name])
        place = escape(_place(photo) or name)
        return f'<img alt="{place}" title="{place}" src="{_data_uri(photo["image"], 72)}">'

    def _photo(self, row: int) -> dict[str, Any]:
        """Returns the photo of a row; photos/ has the same order, and also the few photos that `embed` dropped."""
        name = bytes(self._ids[row]).decode()
        while (photo := self._photos[row])["id"] != name:
            row += 1
        return photo


def _card(photo: Mapping[str, Any], row: Mapping[str, Any], gallery: Gallery) -> str:
    truth, guess = np.asarray(photo["coordinates"]), np.array([row["latitude"], row["longitude"]])
    neighbors, candidates = row.get("neighbors", []), row.get("candidates", [])
    place, near = _place(photo), gallery.near(guess)
    points = {
        "neighbor": _coordinates(neighbors),
        "candidate": _coordinates(candidates),
        "halo": np.stack([truth, guess]),
        "truth": truth[None],
        "guess": guess[None],
    }
    small = worldmap.small_map(points, "Map of truth, prediction, candidates and neighbors", ("truth", "guess"))
    strip = "".join(
        f"<li>{gallery.image(n['id'])}<small>{frame.number(_off(n, truth))}</small></li>"
        for n in neighbors[:_NEIGHBORS]
    )
    strip = f'<h5>Neighbors, and their km from the truth</h5><ul class="strip">{strip}</ul>' if strip else ""
    return (
        f'<article class="card"><header><h4>{escape(place or "Place not named")}</h4>'
        f"<b>{frame.km(distance.great_circle_km(*truth, *guess))} off</b></header>"
        f'<p class="at">{_degrees(truth)} &rarr; {_degrees(guess)}{f", near {escape(near)}" if near else ""}<br>'
        f"id {escape(photo['id'])}</p>"
        f'<div class="pair"><img alt="Photo taken at {escape(place) or _degrees(truth)}" '
        f'src="{_data_uri(photo["image"], 256)}">{small}</div>{strip}{_candidates(row, truth, gallery)}</article>'
    )


def _candidates(row: Mapping[str, Any], truth: Float[np.ndarray, "2"], gallery: Gallery) -> str:
    """Draws the likeliest places among a model's candidates, best first; "" for a file that gives no probabilities."""
    candidates = row.get("candidates", [])
    if not candidates or "log_probability" not in candidates[0]:
        return ""
    places = {(c["latitude"], c["longitude"]): c["log_probability"] for c in candidates}  # samples repeat
    chosen_by: dict[tuple[float, float], list[str]] = {}
    for choice, k in row.get("choices", {}).items():
        chosen = (candidates[k]["latitude"], candidates[k]["longitude"]) if isinstance(k, int) else tuple(k)
        chosen_by.setdefault(chosen, []).append(choice.replace("_", " "))
    lines = []
    for place in sorted(places, key=lambda place: -places[place])[:_CANDIDATES]:
        probability = math.exp(places[place])
        names = f" <b>{escape(', '.join(chosen_by[place]))}</b>" if place in chosen_by else ""
        at = np.array(place)
        near = escape(gallery.near(at))
        lines.append(
            f'<tr><td title="{_degrees(at)}">{near or _degrees(at)}{names}</td>'
            f"<td>{frame.km(distance.great_circle_km(*at, *truth))}</td>"
            f'<td><meter value="{probability:.6f}" aria-label="probability"></meter> '
            f"{frame.percent(probability)}</td></tr>"
        )
    return (
        f"<h5>Likeliest {len(lines)} of {len(places)} places, and their probability</h5>"
        f"<table><tbody>{''.join(lines)}</tbody></table>"
    )


def _made(workdir: epath.Path, metrics: Mapping[str, Any]) -> str:
    folders = [path.parent for pattern in ("*", "*/*") for path in sorted(workdir.glob(f"{pattern}/manifest.json"))]
    names = [folder.relative_to(workdir).as_posix() for folder in folders]
    listed = frame.made(workdir, [name for name in names if name.split("/")[0] not in ("report", "audit")])
    return (
        "<p>Each folder of the work directory, with the settings it was made with, what it holds, and what was "
        f"dropped on the way.</p>{listed}"
        "<p>A missing prediction counts as wrong at every threshold, and as half the Earth's circumference in medians "
        f"and means. {frame.intervals(metrics['resamples'])} Every number of this page is in metrics.json beside it."
        "</p>"
    )


def _predictions(path: epath.Path, wanted: set[str]) -> dict[str, dict[str, Any]]:
    """Returns the rows of the wanted ids, whole."""
    rows = (json.loads(line) for line in path.read_text().split("\n") if line.strip())
    return {row["id"]: row for row in rows if row["id"] in wanted}


def _data_uri(image: bytes, side: int) -> str:
    """Returns a photo as a data URI of JPEG, at most `side` pixels on its longer side; an empty one if it is broken."""
    try:
        with Image.open(io.BytesIO(image)) as opened:
            if opened.format != "JPEG" or max(opened.size) > side:
                opened.draft("RGB", (2 * side, 2 * side))
                small = ImageOps.exif_transpose(opened).convert("RGB")
                small.thumbnail((side, side))
                out = io.BytesIO()
                small.save(out, "JPEG", quality=75)
                image = out.getvalue()
    except (OSError, Image.DecompressionBombError):
        return "data:,"  # what `embed` could not read either: the page shows the alternative text
    return f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"


def _coordinates(points: Sequence[Mapping[str, Any]]) -> Float[np.ndarray, "n 2"]:
    return np.array([(point["latitude"], point["longitude"]) for point in points]).reshape(-1, 2)


def _off(point: Mapping[str, Any], truth: Float[np.ndarray, "2"]) -> float:
    return float(distance.great_circle_km(point["latitude"], point["longitude"], *truth))


def _place(names: Mapping[str, Any]) -> str:
    return ", ".join(str(names[part]) for part in ("city", "country") if names.get(part))


def _degrees(at: Float[np.ndarray, "2"]) -> str:
    return f"{at[0]:.3f}, {at[1]:.3f}".replace("-", "&minus;")


def _rounded(values: Float[np.ndarray, "n"], digits: int) -> list[float]:
    return [round(float(value), digits) for value in values]
