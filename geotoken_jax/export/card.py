"""Writes README.md (the model card), LICENSE and provenance.json of an export, from the work directory's manifests."""

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from geotoken_jax import __version__
from geotoken_jax.configuration import Config
from geotoken_jax.manifests import write_bytes, write_json
from geotoken_jax.preparation import source_name
from geotoken_jax.workdir import Workdir

#: Provenance if the photos' manifest has none, because an old version prepared the photos.
_UNSTATED = {
    "license": "unknown",
    "origin": "The manifest of the photos does not state their origin.",
    "terms": "Their license is not stated: name it here before you pass this folder on.",
    "citation": "",
}


def write(
    folder: epath.Path, workdir: Workdir, config: Config, variant: str, reference: Mapping[str, Any] | None, cost: Any
) -> None:
    """Writes README.md, LICENSE and provenance.json in the folder of an export.

    variant: name of the model variant. config: configuration with the variant's changes applied. reference: name and
    SHA-256 sums of the backbone's checkpoint, or None if the backbone has no checkpoint. cost: size and accuracy of the
    int8 gallery, or None if the gallery is bfloat16.
    """
    stated = source(workdir, config)
    chain = dict(sorted(_chain(workdir, [f"geotoken/{variant}", "gallery", "report"])))
    provenance = {"photos": stated, "backbone": reference, "made_by": f"geotoken-jax {__version__}", "manifests": chain}
    write_json(folder / "provenance.json", provenance)
    write_bytes(folder / "LICENSE", _license(stated, reference).encode())
    write_bytes(folder / "README.md", _card(folder, workdir, config, variant, stated, reference, cost).encode())


def source(workdir: Workdir, config: Config) -> dict[str, Any]:
    """Returns the name of the photos' source with its license, origin, terms and citation.

    See data_prep.sources.Provenance for the fields. If the photos' manifest lacks them, the license is "unknown".
    """
    photos = workdir.manifest("photos")
    name = source_name(photos.settings.get("photos", {})) or config.photos.source
    return {"source": name, **photos.facts.get("provenance", _UNSTATED)}


def _chain(workdir: Workdir, folders: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the name and the digests of each of these folders and, recursively, of their input folders.

    "sha256" is the SHA-256 of the folder's manifest. "inputs" maps the name of each input folder to the SHA-256 of its
    manifest.
    """
    seen, waiting = set(), list(folders)
    while waiting:
        folder = waiting.pop()
        if folder not in seen:
            seen.add(folder)
            inputs = workdir.manifest(folder).inputs
            yield folder, {"sha256": workdir.digest(folder), "inputs": inputs}
            waiting += inputs


def _license(source: Mapping[str, Any], reference: Mapping[str, Any] | None) -> str:
    parts = [
        "Contents of this folder and their licenses",
        _wrapped(f"Parameters and gallery were computed from photos. {source['origin']} {source['terms']}"),
        f"License identifier on the Hugging Face hub: {source['license']}",
    ]
    if source["citation"]:
        parts.append(_wrapped(f"Cite: {source['citation']}"))
    if reference:
        parts.append(_wrapped(f"The backbone, {reference['name']}, has its own license: see its publisher."))
    parts.append(
        "standalone.py, if present, is part of geotoken-jax and licensed under the Apache License, Version 2.0."
    )
    return "\n\n".join(parts) + "\n"


def _main_scores(metrics: Mapping[str, Any], variant: str) -> dict[str, Any]:
    """Returns the scores of the variant's main method, by split. Splits without such scores are left out."""
    methods_by_split = {
        split: [m for m in scored["methods"] if m["variant"] == variant and m.get("main")]
        for split, scored in metrics["splits"].items()
    }
    return {split: methods[0] for split, methods in methods_by_split.items() if methods}


def _card(
    folder: epath.Path,
    workdir: Workdir,
    config: Config,
    variant: str,
    source: Mapping[str, Any],
    reference: Mapping[str, Any] | None,
    cost: Any,
) -> str:
    trained, photos, metrics = workdir.manifest(f"geotoken/{variant}"), workdir.manifest("photos"), workdir.metrics()
    label, scores = config.evaluate.labels.get(variant, variant), _main_scores(metrics, variant)
    standalone = _standalone(folder) if (folder / "standalone.py").exists() else ""
    tower = "none, the model reads thumbnails of the photos"
    if reference:
        tower = reference["name"] + (" (included)" if (folder / "backbone").exists() else " (not included)")
    cite = f"\n{_wrapped('Cite: ' + source['citation'])}\n" if source["citation"] else ""
    limit = "less than" if metrics["strict"] else "at most"
    rows = (
        (split, f"{metrics['splits'][split]['photos']:,}", *map(_percent, m["accuracy"])) for split, m in scores.items()
    )
    return f"""{_metadata(label, source, scores)}
# {label}

Predicts where on Earth a photo was taken, as a cell ({config.model.scheme}) of about the size of an S2 cell of level
{config.model.level}. Inputs are the photo and its {config.model.neighbors} nearest neighbors in a gallery of
{photos.counts["train"]:,} photos. Backbone: {tower}.

{trained.facts["parameters"]:,} parameters; trained on {trained.counts["examples"]:,} examples; validation loss
{trained.facts["best_loss"]:.4f} at step {trained.facts["best_step"]:,}.

## Use

```python
from geotoken_jax import GeoToken
GeoToken.load("FOLDER").predict("photo.jpg")  # or the name of this model on the hub
```
{standalone}
The model was trained and measured on the photos named below. Expect lower accuracy on other photos, and measure it. The
model predicts coordinates even if a photo gives no hint of its location: read the radii of each prediction. Do not use
the model to find people or to make decisions about them.

## Accuracy

Percentage of photos with an error of {limit} each distance, with the 95 % interval in parentheses:

| split | photos | 1 km | 25 km | 200 km | 750 km | 2500 km |
|---|---|---|---|---|---|---|
{_rows(rows)}
{_cost(cost)}
## Uncertainty

{_uncertainty(workdir, variant, metrics)}

## Data and license

{_wrapped(f"{source['origin']} {source['terms']} See LICENSE.")}
{cite}
`provenance.json` lists the SHA-256 of the manifests of all folders that this export was made from. `SHA256SUMS` lists
the SHA-256 of the files in this folder. `GeoToken.load` checks parameters and settings, with `verify=True` all files.
"""


def _standalone(folder: epath.Path) -> str:
    """Returns the section about standalone.py and the program that it runs, from signature.json."""
    signature = json.loads((folder / "signature.json").read_text())
    photos = signature["photos"]
    rows = [
        (f"`{name}`", " x ".join(map(str, one["shape"])), one["type"], one["meaning"].partition("] ")[2])
        for name, one in signature["outputs"].items()
    ]
    return f"""
Without the package, with jax, numpy, pillow and flatbuffers:

```
pip install -r standalone-requirements.txt
python standalone.py photo.jpg folder/
```

`program.stablehlo` is the program that standalone.py runs, for {", ".join(signature["platforms"])}. Its input is
`{photos["name"]}`, {" x ".join(map(str, photos["shape"]))} {photos["type"]}, for B photos. Its arguments are the
parameters in `program.safetensors`, the gallery's arrays, and the photos. `signature.json` lists all of them. The
outputs:

| output | shape | type | meaning |
|---|---|---|---|
{_rows(rows)}
"""


def _metadata(label: str, source: Mapping[str, Any], scores: Mapping[str, Any]) -> str:
    """Returns the YAML metadata that the Hugging Face hub reads. Nested values are JSON, which is valid YAML."""
    results = [
        {
            "task": {"type": "image-classification", "name": "Image geolocation"},
            "dataset": {"type": source["source"], "name": source["source"], "split": split},
            "metrics": [
                {"type": "accuracy", "name": f"Photos within {a['km']} km", "value": a["value"]} for a in m["accuracy"]
            ],
        }
        for split, m in scores.items()
    ]
    lines = [f"license: {source['license']}"]
    if source["license"] == "other":
        lines += [f"license_name: {source['source'].replace('_', '-')}", "license_link: LICENSE"]
    lines += ["library_name: geotoken-jax", "pipeline_tag: image-classification"]
    lines += ["tags:", *(f"- {tag}" for tag in ("image-geolocation", "geolocation", "s2", "retrieval", "jax"))]
    lines += ["model-index:", f"- name: {json.dumps(label)}", "  results:"]
    lines += [f"  - {json.dumps(result)}" for result in results]
    return "\n".join(["---", *lines, "---"])


def _uncertainty(workdir: Workdir, variant: str, metrics: Mapping[str, Any]) -> str:
    if not workdir.manifest(f"predictions/{variant}").facts["calibrated"]:
        return "The radii of the predictions are not calibrated."
    rows = [
        (split, f"{radius['percent']} %", f"{radius['median_km']:,.0f} km", _percent(radius["holds"]))
        for split, scores in metrics["splits"].items()
        for radius in (scores["uncertainty"] or {}).get("radii", ())
        if radius
    ]
    return f"""Each prediction has two radii, which should contain the true location for 50 % and 90 % of photos. They
are calibrated on validation photos and measured on all splits:

| split | radius | median | percentage of photos within the radius |
|---|---|---|---|
{_rows(rows)}"""


def _cost(cost: Any) -> str:
    if cost is None:
        return ""
    before, after = (f"{n / 1e6:,.1f} MB" for n in cost["bytes"])
    original, quantized = (f"{100 * r:.2f} %" for r in cost["recall"])
    whole, difference = cost["bfloat16"]["accuracy"], cost["difference"]["accuracy"]
    rows = [
        ("bfloat16", *(f"{100 * a['value']:.1f}" for a in whole)),
        ("int8 minus bfloat16", *(_percent(a, "+.2f") for a in difference)),
    ]
    summary = _wrapped(
        f"Vectors have one byte per number: the gallery and its index take {after} instead of {before}. The index "
        f"finds {quantized} of a photo's 15 nearest neighbors instead of {original}. Both galleries were compared on "
        f"the {cost['photos']:,} photos of {cost['split']}: percentage of photos within each distance, and its change "
        "in percentage points with the paired 95 % interval."
    )
    return f"""
## The gallery in int8

{summary}

| gallery | 1 km | 25 km | 200 km | 750 km | 2500 km |
|---|---|---|---|---|---|
{_rows(rows)}
"""


def _percent(estimate: Mapping[str, float], form: str = ".1f") -> str:
    value, low, high = (format(100 * estimate[key], form) for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _rows(rows: Any) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
