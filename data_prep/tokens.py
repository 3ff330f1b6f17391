"""Last step of the stage `index`: makes the records on which the decoder is trained, one per photo.

One or more processes make them, shard by shard (data_prep/sharded.py). A process holds one shard in memory, 0.5 GB.
"""

import numpy as np

from data_prep import sharded
from data_prep.sharded import Shard
from geotoken_jax import records
from geotoken_jax.configuration import Config
from geotoken_jax.manifests import Manifest, write_json
from geotoken_jax.workdir import Workdir

#: Photos per shard.
_SHARD = 1 << 20


def run(config: Config, workdir: Workdir) -> list[Manifest]:
    """Makes tokens/, with one record per photo (records.token_layout). Records are in the order of the split's table.

    A record contains the photo's row in the split's table, the photo's tokens, and the gallery rows of its neighbors.
    Returns an empty list if shards of other processes are missing.
    """
    stage = workdir.begin(config, "tokens", (), ["neighbors"])
    if stage.manifest:
        return [stage.manifest]
    neighbors = workdir.manifest("neighbors")
    count = neighbors.settings["index"]["neighbors"]["count"]
    layout = records.token_layout(count)
    shards = sharded.divide(stage, workdir.counts("neighbors"), _SHARD)

    def write(shard: Shard) -> None:
        here = slice(shard.rows.start, shard.rows.stop)
        columns = {
            "row": np.array(shard.rows),
            "tokens": workdir.table(shard.split).tokens(here),
            "neighbors": workdir.neighbors(shard.split, rows=here)[0],
        }
        file = records.shard_path(stage.path, shard.split, shard.number, shard.count)
        records.write_shard(file, layout.encode(columns))
        shard.finish([file])

    def finish() -> Manifest:
        write_json(stage.path / "schema.json", records.schema(layout, records.SHARD_FILES))
        return stage.finish(neighbors.counts, neighbors=count)

    needed = [shard for shard in sharded.own(shards) if not shard.ledger]
    sharded.make(shards, needed, "tokens", write)
    if not sharded.wait(stage, shards):
        return []
    return [sharded.complete(workdir, stage, finish)]
