"""The last part of the stage `index`: records of what the decoder reads of each photo, joined by row numbers."""

from typing import Any

import numpy as np
from etils import epath

from data_prep.gallery import open_table
from geotoken_jax import records, workdir
from geotoken_jax.workdir import Manifest

_SHARD = 1 << 20


def run(config: Any, path: epath.PathLike) -> Manifest:
    """Makes tokens/: one fixed-layout record a photo (records.token_layout), in the order of its split's table."""
    del config
    path = epath.Path(path)
    stage = workdir.begin(path, "tokens", {}, ["neighbors"])
    if stage.manifest:
        return stage.manifest
    neighbors = workdir.read_manifest(path, "neighbors")
    kept = neighbors.settings["index"]["neighbors"]["count"]
    layout = records.token_layout(kept)
    for split, photos in neighbors.counts.items():
        table = open_table(path, split)
        rows = records.open_array(path / "neighbors" / f"{split}.rows.npy")
        shards = max(1, -(-photos // _SHARD))
        for shard in range(shards):
            part = slice(shard * _SHARD, (shard + 1) * _SHARD)
            columns = {
                "row": np.arange(photos)[part],
                "tokens": table.tokens(part),
                "neighbors": rows[part],
            }
            records.write_shard(records.shard_path(stage.path, split, shard, shards), layout.encode(columns))
    return stage.finish(neighbors.counts, neighbors=kept)
