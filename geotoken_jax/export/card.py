"""What an export says of itself: its model card, its license, and where it comes from, from the run's own files."""

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from geotoken_jax import __version__
from geotoken_jax.artifacts import Workdir
from geotoken_jax.configuration import Config
from geotoken_jax.workdir import write_bytes, write_json

#: What is known of photos that were prepared before sources stated it.
_UNSTATED = {
    "license": "unknown",
    "origin": "The photos' manifest does not say.",
    "terms": "Not stated: say here under what license the photos are before you give this away.",
    "citation": "",
}

#: What the card says of standalone.py.
_ALONE = """
Without the package: `pip install jax flatbuffers`, then `python standalone.py FEATURES.npy > answers.jsonl`; its first
lines say what it takes, and what it leaves out.
"""


def write(
    folder: epath.Path, workdir: Workdir, config: Config, variant: str, referred: Mapping[str, Any] | None, cost: Any
) -> None:
    """Writes README.md, LICENSE and provenance.json in the folder of an export.

    config: with the variant's changes made. referred: the backbone's checkpoint, None where
    there is none. cost: of the int8 gallery, None where it is not.
    """
    stated = source(workdir, config)
    chain = dict(sorted(_chain(workdir, [f"geotoken/{variant}", "gallery", "report"])))
    made = {"photos": stated, "backbone": referred, "made_by": f"geotoken-jax {__version__}", "manifests": chain}
    write_json(folder / "provenance.json", made)
    write_bytes(folder / "LICENSE", _license(stated, referred).encode())
    write_bytes(folder / "README.md", _card(folder, workdir, config, variant, stated, referred, cost).encode())


def source(workdir: Workdir, config: Config) -> dict[str, Any]:
    """Returns the name of the source of a work directory's photos, and what it states of them
    (data_prep.sources.Provenance)."""
    photos = workdir.manifest("photos")
    name = photos.settings.get("photos", {}).get("source", config.photos.source)
    return {"source": name, **photos.facts.get("provenance", _UNSTATED)}


def _chain(workdir: Workdir, folders: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each folder that these were made from, with the SHA-256 of its manifest and of those it was made from."""
    seen, waiting = set(), list(folders)
    while waiting:
        folder = waiting.pop()
        if folder not in seen:
            seen.add(folder)
            inputs = workdir.manifest(folder).inputs
            yield folder, {"sha256": workdir.digest(folder), "inputs": inputs}
            waiting += inputs


def _license(source: Mapping[str, Any], referred: Mapping[str, Any] | None) -> str:
    parts = [
        "What this folder holds, and on what terms",
        _wrapped(f"Parameters and gallery are made of photos. {source['origin']} {source['terms']}"),
        f"License, as the Hugging Face hub names it: {source['license']}",
    ]
    if source["citation"]:
        parts.append(_wrapped(f"Cite: {source['citation']}"))
    if referred:
        parts.append(
            _wrapped(f"The backbone, {referred['name']}, is under a license of its own, which its publisher states.")
        )
    parts.append("standalone.py, where it is here, is part of geotoken-jax, under the Apache License, Version 2.0.")
    return "\n\n".join(parts) + "\n"


def _own(metrics: Mapping[str, Any], variant: str) -> dict[str, Any]:
    """Returns split -> figures of the variant's main method, for the splits that have them."""
    found = {
        split: [m for m in scored["methods"] if m["variant"] == variant and m.get("main")]
        for split, scored in metrics["splits"].items()
    }
    return {split: methods[0] for split, methods in found.items() if methods}


def _card(
    folder: epath.Path,
    workdir: Workdir,
    config: Config,
    variant: str,
    source: Mapping[str, Any],
    referred: Mapping[str, Any] | None,
    cost: Any,
) -> str:
    trained, photos = workdir.manifest(f"geotoken/{variant}"), workdir.manifest("photos")
    metrics = workdir.metrics()
    label, own = config.evaluate.labels.get(variant, variant), _own(metrics, variant)
    alone = _ALONE if (folder / "standalone.py").exists() else ""
    tower = "thumbnails of the photos themselves"
    if referred:
        tower = referred["name"] + (", which is here" if (folder / "backbone").exists() else ", which is not here")
    cite = f"\n{_wrapped('Cite: ' + source['citation'])}\n" if source["citation"] else ""
    exact = "less than" if metrics["strict"] else "within"
    return f"""{_front(label, source, own)}
# {label}

Tells where on Earth a photo was taken, as cells ({config.model.scheme}) as fine as S2's of level {config.model.level},
from the photo and its {config.model.neighbors} nearest neighbors in a gallery of {photos.counts["train"]:,} photos.
Backbone: {tower}.

{trained.facts["parameters"]:,} parameters; trained on {trained.counts["examples"]:,} examples; validation loss
{trained.facts["best_loss"]:.4f} at step {trained.facts["best_step"]:,}.

## Use

```python
from geotoken_jax import GeoToken
GeoToken.load("FOLDER").predict("photo.jpg")  # or the name of this model on the hub
```
{alone}
It was trained and measured on the photos named below: on others expect less, and measure. It answers every photo, also
one that shows nothing of where it is: look at the radii. Do not use it to find people, or to decide anything about one.

## Accuracy

Percent of photos {exact} a distance, in brackets the 95 % interval:

| split | photos | 1 km | 25 km | 200 km | 750 km | 2500 km |
|---|---|---|---|---|---|---|
{_rows((split, f"{metrics['splits'][split]['photos']:,}", *map(_percent, m["accuracy"])) for split, m in own.items())}
{_cost(cost)}
## How sure it is

{_sure(workdir, variant, metrics)}

## Data and license

{_wrapped(f"{source['origin']} {source['terms']} See LICENSE.")}
{cite}
`provenance.json` has the SHA-256 of the manifest of every folder that this was made from, `SHA256SUMS` those of the
files here, which `GeoToken.load` compares.
"""


def _front(label: str, source: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """Returns the metadata that the Hugging Face hub reads: YAML, of which JSON is a part."""
    results = [
        {
            "task": {"type": "image-classification", "name": "Image geolocation"},
            "dataset": {"type": source["source"], "name": source["source"], "split": split},
            "metrics": [
                {"type": "accuracy", "name": f"Photos within {a['km']} km", "value": a["value"]} for a in m["accuracy"]
            ],
        }
        for split, m in own.items()
    ]
    lines = [f"license: {source['license']}"]
    if source["license"] == "other":
        lines += [f"license_name: {source['source'].replace('_', '-')}", "license_link: LICENSE"]
    lines += ["library_name: geotoken-jax", "pipeline_tag: image-classification"]
    lines += ["tags:", *(f"- {tag}" for tag in ("image-geolocation", "geolocation", "s2", "retrieval", "jax"))]
    lines += ["model-index:", f"- name: {json.dumps(label)}", "  results:"]
    lines += [f"  - {json.dumps(result)}" for result in results]
    return "\n".join(["---", *lines, "---"])


def _sure(workdir: Workdir, variant: str, metrics: Mapping[str, Any]) -> str:
    if not workdir.manifest(f"predictions/{variant}").facts["calibrated"]:
        return "The radii given with an answer are not calibrated."
    rows = [
        (split, f"{radius['percent']} %", f"{radius['median_km']:,.0f} km", _percent(radius["holds"]))
        for split, found in metrics["splits"].items()
        for radius in (found["uncertainty"] or {}).get("radii", ())
        if radius
    ]
    return f"""Each answer has two radii, which should hold the photo's place in 50 and in 90 % of cases: calibrated on
validation photos, measured on all:

| split | radius | median | percent of photos that it holds |
|---|---|---|---|
{_rows(rows)}"""


def _cost(cost: Any) -> str:
    if cost is None:
        return ""
    before, after = (f"{n / 1e6:,.1f} MB" for n in cost["bytes"])
    kept, quantized = (f"{100 * r:.2f} %" for r in cost["recall"])
    whole, difference = cost["bfloat16"]["accuracy"], cost["difference"]["accuracy"]
    rows = [
        ("bfloat16", *(f"{100 * a['value']:.1f}" for a in whole)),
        ("int8 less bfloat16", *(_percent(a, "+.2f") for a in difference)),
    ]
    said = _wrapped(
        f"Vectors have one byte a number: gallery, index and views are {after} instead of {before}. The index finds "
        f"{quantized} of a photo's 15 nearest instead of {kept}. Both galleries answered the {cost['photos']:,} photos "
        f"of {cost['split']}: percent, and points of percent with the paired 95 % interval."
    )
    return f"""
## The gallery in int8

{said}

| gallery | 1 km | 25 km | 200 km | 750 km | 2500 km |
|---|---|---|---|---|---|
{_rows(rows)}
"""


def _percent(found: Mapping[str, float], form: str = ".1f") -> str:
    value, low, high = (format(100 * found[key], form) for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _rows(rows: Any) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
