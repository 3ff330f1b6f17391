"""Last step of the stage `index`: one record per photo for training the decoder.

Records are made shard by shard, by one or more processes (data_prep/sharded.py). The memory of a process holds one
shard, 0.5 GB.
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
    """Makes tokens/: one record per photo (records.token_layout), in the order of its split's table.

    A record contains the photo's row in this table, its tokens and the gallery rows of its neighbors. Returns an empty
    list if shards of other processes are missing.
    """
    stage = workdir.begin(config, "tokens", (), ["neighbors"])
    if stage.manifest:
        return [stage.manifest]
    neighbors = workdir.manifest("neighbors")
    count = neighbors.settings["index"]["neighbors"]["count"]
    layout = records.token_layout(count)
    parts = sharded.divide(stage, workdir.counts("neighbors"), _SHARD)

    def write(part: Shard) -> None:
        here = slice(part.rows.start, part.rows.stop)
        columns = {
            "row": np.array(part.rows),
            "tokens": workdir.table(part.split).tokens(here),
            "neighbors": workdir.neighbors(part.split, rows=here)[0],
        }
        file = records.shard_path(stage.path, part.split, part.number, part.count)
        records.write_shard(file, layout.encode(columns))
        part.finish([file])

    def finish() -> Manifest:
        write_json(stage.path / "schema.json", records.schema(layout, records.SHARD_FILES))
        return stage.finish(neighbors.counts, neighbors=count)

    needed = [part for part in sharded.own(parts) if not part.ledger]
    sharded.make(parts, needed, "tokens", write)
    if not sharded.wait(stage, parts):
        return []
    return [sharded.complete(workdir, stage, finish)]
