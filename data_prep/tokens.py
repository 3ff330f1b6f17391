"""Last step of the stage `index`: one record per photo for training the decoder."""

import numpy as np

from geotoken_jax import records
from geotoken_jax.configuration import Config
from geotoken_jax.manifests import Manifest
from geotoken_jax.workdir import Workdir

_SHARD = 1 << 20


def run(config: Config, workdir: Workdir) -> list[Manifest]:
    """Makes tokens/: one record per photo (records.token_layout), in the order of its split's table.

    A record contains the photo's row in this table, its tokens and the gallery rows of its neighbors.
    """
    stage = workdir.begin(config, "tokens", (), ["neighbors"])
    if stage.manifest:
        return [stage.manifest]
    neighbors = workdir.manifest("neighbors")
    count = neighbors.settings["index"]["neighbors"]["count"]
    layout = records.token_layout(count)
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
    return [stage.finish(neighbors.counts, neighbors=count)]
