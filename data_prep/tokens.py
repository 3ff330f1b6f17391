"""The last part of the stage `index`: records of what the decoder reads of each photo, joined by row numbers."""

import numpy as np

from geotoken_jax import records
from geotoken_jax.artifacts import Workdir
from geotoken_jax.configuration import Config
from geotoken_jax.workdir import Manifest

_SHARD = 1 << 20


def run(config: Config, workdir: Workdir) -> list[Manifest]:
    """Makes tokens/: one fixed-layout record a photo (records.token_layout), in the order of its split's table."""
    stage = workdir.begin(config, "tokens", (), ["neighbors"])
    if stage.manifest:
        return [stage.manifest]
    neighbors = workdir.manifest("neighbors")
    kept = neighbors.settings["index"]["neighbors"]["count"]
    layout = records.token_layout(kept)
    for split, photos in neighbors.counts.items():
        table = workdir.table(split)
        rows, _ = workdir.neighbors(split)
        shards = max(1, -(-photos // _SHARD))
        for shard in range(shards):
            part = slice(shard * _SHARD, (shard + 1) * _SHARD)
            columns = {
                "row": np.arange(photos)[part],
                "tokens": table.tokens(part),
                "neighbors": rows[part],
            }
            records.write_shard(records.shard_path(stage.path, split, shard, shards), layout.encode(columns))
    return [stage.finish(neighbors.counts, neighbors=kept)]
