"""The stage `predict`: candidates and choice of every photo of every split, as JSON lines.

What imports jax is imported once a stage is known to have work to do: a finished one answers at once.
"""

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from geotoken_jax import records, settings, workdir
from geotoken_jax.backbone import views
from geotoken_jax.gallery.table import Table
from geotoken_jax.progress import Progress
from geotoken_jax.workdir import Manifest

if TYPE_CHECKING:
    from geotoken_jax.data.join import Tokens
    from geotoken_jax.predict.decode import Decoder


def run(config: Any, path: epath.PathLike, variant: str) -> Manifest:
    """Makes predictions/VARIANT/SPLIT.jsonl for every split that has a table under queries/, but views."""
    path = epath.Path(path)
    config = settings.variant(config, variant)
    stage = workdir.begin(
        path, f"predictions/{variant}", {"predict": config.predict}, ["tokens", f"geotoken/{variant}"]
    )
    if stage.manifest:
        return stage.manifest
    from geotoken_jax import checkpoint
    from geotoken_jax.data.join import Tokens
    from geotoken_jax.model.geotoken import GeoTokenModel, ModelSettings
    from geotoken_jax.predict.decode import Decoder, PredictSettings

    options = settings.read(PredictSettings, config.predict, "predict")
    model_settings = settings.read(ModelSettings, config.model, "model")
    model = checkpoint.read_module(
        path / "geotoken" / variant / "parameters.safetensors", lambda rngs: GeoTokenModel(model_settings, rngs)
    )
    decoder = Decoder(model, options)
    layout = records.token_layout(workdir.read_manifest(path, "tokens").facts["neighbors"])
    gallery = Table(path / "gallery")
    counts = asked(path)
    with Progress(f"predict {variant}", sum(counts.values()), "photos") as progress:
        for split, photos in counts.items():
            file = stage.path / f"{split}.jsonl"
            if not file.exists():
                own = Table(path / "queries" / split)
                read = Tokens(
                    records.Records(path / "tokens", split, layout),
                    own,
                    gallery,
                    decoder.cells,
                    model_settings.neighbors,
                )
                rows = records.open_array(path / "neighbors" / f"{split}.rows.npy")
                write(file, _predict(decoder, read, own, gallery, rows, progress))
            else:
                progress.add(photos)
    return stage.finish(counts)


def asked(path: epath.Path) -> dict[str, int]:
    """Returns the splits that are to be answered, and how many photos they have: not the views that are trained on."""
    return {split: n for split, n in workdir.read_manifest(path, "queries").counts.items() if split != views.SPLIT}


def _predict(
    decoder: "Decoder", read: "Tokens", own: Table, gallery: Table, neighbor_rows: np.ndarray, progress: Progress
) -> Iterable[dict[str, Any]]:
    from geotoken_jax.data import pipeline
    from geotoken_jax.predict.decode import answers

    size = decoder.settings.batch_size
    for number, batch in enumerate(pipeline.evaluation(len(own), read, size)):
        rows = np.arange(number * size, number * size + int(batch["valid"].sum()))
        real = {name: values[: len(rows)] for name, values in batch.items()}
        found = answers(decoder(real, rows), decoder.cells, decoder.settings.choice)
        for row, answer in zip(rows, found, strict=True):
            near = neighbor_rows[row, : batch["neighbors"].shape[1]]
            yield {"id": own.ids(row).item().decode(), **answer, "neighbors": described(near, gallery)}
        progress.add(len(rows))


def described(rows: np.ndarray, gallery: Table) -> list[dict[str, Any]]:
    """Returns the neighbors of gallery rows [k], those of -1 left out, as JSON has them."""
    rows = rows[rows >= 0]
    coordinates = gallery.coordinates(rows)
    return [
        {"id": i.decode(), "latitude": float(latitude), "longitude": float(longitude)}
        for i, (latitude, longitude) in zip(gallery.ids(rows), coordinates, strict=True)
    ]


def write(file: epath.Path, lines: Iterable[dict[str, Any]]) -> None:
    """Writes a file of JSON lines, whole or not at all."""
    workdir.write_bytes(file, "".join(json.dumps(line) + "\n" for line in lines).encode())
