"""Counts the bytes that each device sends per step to look up neighbors in a sharded gallery. Prints one JSON line.

The lookup is compiled but not run: for `--devices` CPU devices, or with --topology=v5e:16x16 for TPUs that need not
exist. Figures are bytes per device in one round of the exchange. In most steps, one round serves all rows if they are
random. `needed` is the size of the rows that a device reads.
"""

import argparse
import json
import os
from typing import Any

import jax

from configs import common
from geotoken_jax import settings, sharding
from geotoken_jax.gallery import placement
from geotoken_jax.geo.cells import CellScheme
from geotoken_jax.model import batch
from geotoken_jax.model.geotoken import ModelSettings
from geotoken_jax.plan import hlo, topology, workloads


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the collectives of the compiled lookup: number of instructions, and bytes sent per device."""
    config: Any = common.get_config()
    config.gallery.update(placement=options.placement, shards=options.shards)
    gallery = settings.read(placement.GallerySettings, config.gallery, "gallery")
    model = settings.read(ModelSettings, config.model, "model")
    devices = topology.devices(topology.read(options.topology)) if options.topology else jax.devices()
    mesh = sharding.make_mesh(sharding.MeshSettings(-1, 1, options.tensor), devices)
    photos = options.photos * mesh.size // options.tensor if options.photos else options.batch
    rows = batch.spec(model, photos, True)["neighbor_rows"]
    cells = CellScheme(model.level, model.group)
    arguments = {
        "neighbor_rows": jax.ShapeDtypeStruct(rows.shape, rows.dtype, sharding=sharding.batch_sharding(mesh)),
        **placement.layout(workloads.GALLERY, model.backbone_width, cells, gallery, mesh),
    }
    compiled = jax.jit(placement.lookup(gallery, mesh)).lower(arguments).compile()
    program = hlo.Program(compiled.as_text() or "")
    costs = program.costs()
    instructions = [i.opcode for computation in program.computations.values() for i in computation.values()]
    row_bytes = sum(x.dtype.itemsize * x.shape[1] for name, x in arguments.items() if name != "neighbor_rows")
    return {
        **vars(options),
        "devices": mesh.size,
        "batch": photos,
        "needed": rows.shape[1] * photos * options.tensor // mesh.size * row_bytes,
        "sent": {kind: round(sent) for kind, sent in costs.sent.items()},
        "sent_total": round(sum(costs.sent.values())),
        "memory_traffic": round(costs.traffic),
        "collectives": {kind: instructions.count(kind) for kind in costs.sent},
        "temporary": getattr(compiled.memory_analysis(), "temp_size_in_bytes", 0),
    }


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=16, help="number of CPU devices")
    parser.add_argument("--topology", default="", help="absent TPUs to compile for, in place of --devices")
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--photos", type=int, default=0, help="photos per device, in place of --batch")
    parser.add_argument("--tensor", type=int, default=1, help="size of the mesh axis tensor")
    parser.add_argument("--placement", default="sharded")
    parser.add_argument("--shards", type=int, default=-1, help="config.gallery.shards")
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_num_cpu_devices", options.devices)
    print(json.dumps(measure(options)))


if __name__ == "__main__":
    main()
