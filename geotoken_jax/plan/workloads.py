"""The programs of training, alignment, embedding and prediction, with the shapes and shardings of their arguments."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from geotoken_jax import randomness, sharding
from geotoken_jax.align.task import AlignTask
from geotoken_jax.backbone import checkpoint, huggingface, preprocess
from geotoken_jax.batch import Spec
from geotoken_jax.configuration import Config
from geotoken_jax.gallery import placement
from geotoken_jax.model import batch
from geotoken_jax.model.geotoken import GeoTokenModel
from geotoken_jax.model.memory import Neighbors
from geotoken_jax.model.task import GeoTokenTask
from geotoken_jax.predict import beam, sample
from geotoken_jax.settings import SettingsError
from geotoken_jax.train.loop import TrainSettings, make_trainer

#: Number of photos in the paper's gallery, the usable photos of MP16-Pro.
GALLERY = 4_120_000
#: The paper's backbone, CLIP ViT-L/14: its name on the hub, and its config.json, which a plan must not download.
_L14_NAME = "openai/clip-vit-large-patch14"
_L14 = {
    "model_type": "clip", "projection_dim": 768,
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    "vision_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "patch_size": 14,
    },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Workload:
    """A program that a pod runs repeatedly, one step at a time.

    mesh: devices that run one step. function: jitted function of the step. arguments: arguments of the function, as
    trees of ShapeDtypeStructs with shardings. arrays: the arguments that stay on the chips between two steps, and the
    batch, by name. parameters: number of the model's parameters. photos: photos per step on one mesh. copies: number of
    meshes in the pod; meshes process different photos. flops: the model's floating-point operations per photo; 0 if
    they are unknown before compilation. examples: photos of the whole job; 0 if it has no end.
    """

    mesh: Mesh
    function: Any
    arguments: tuple[Any, ...]
    arrays: Mapping[str, Any]
    parameters: int
    photos: int
    copies: int = 1
    flops: float = 0.0
    examples: int = 0

    def resident_bytes(self) -> dict[str, int]:
        """Returns the bytes per chip of `arrays`, by name."""
        return {name: bytes_per_chip(arrays) for name, arrays in self.arrays.items()}


def bytes_per_chip(tree: Any) -> int:
    """Returns the bytes that arrays take on one device. tree: sharded arrays or ShapeDtypeStructs with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def train(config: Config, rows: int, devices: Sequence[Any]) -> Workload:
    """Returns the workload of the decoder's train step."""
    mesh = sharding.make_mesh(config.mesh, devices)
    task = GeoTokenTask(config.model, config.loss, placement.lookup(config.gallery, mesh))
    gallery = placement.layout(rows, config.model.backbone_width, config.model.cells, config.gallery, mesh)
    arrays = batch.spec(config.model, config.train.batch_size, config.gallery.on_device)
    return _training(task, config.train, "train", mesh, arrays, gallery, rows)


def align(config: Config, rows: int, devices: Sequence[Any]) -> Workload:
    """Returns the workload of the alignment's train step on stored features."""
    if config.align.pixels.tower != "cached":
        raise SettingsError(
            f"config.align.pixels.tower is {config.align.pixels.tower!r}: set it to 'cached' to plan alignment; steps "
            "with the image tower cannot be planned"
        )
    mesh = sharding.make_mesh(config.mesh, devices)
    task = AlignTask(config.align.model, config.model.backbone_width, config.align.loss)
    settings = config.align.train
    return _training(task, settings, "align.train", mesh, task.batch(settings.batch_size), {}, rows)


def _training(
    task: Any, settings: TrainSettings, section: str, mesh: Mesh, arrays: Spec, gallery: Spec, rows: int
) -> Workload:
    unit = settings.accumulate * math.prod(mesh.shape[axis] for axis in sharding.RULES["batch"])
    if settings.batch_size % unit:
        raise SettingsError(
            f"config.{section}.batch_size is {settings.batch_size}: choose a multiple of {unit}, which is "
            f"config.{section}.accumulate = {settings.accumulate} times data x fsdp = {unit // settings.accumulate} "
            "devices"
        )
    trainer = make_trainer(task, settings, mesh)
    key = jax.eval_shape(lambda: randomness.key(0))
    whole = NamedSharding(mesh, PartitionSpec())
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole)
    rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    photos, state = _placed(arrays, trainer.batch_sharding), trainer.abstract
    return Workload(
        mesh,
        trainer.step,
        (state, photos, key, rate, gallery),
        {
            "parameters": [state["params"], state["constants"], state.get("ema")],
            "optimizer": state["optimizer"],
            "gallery": gallery,
            "batch": photos,
        },
        _count(state["params"]),
        settings.batch_size,
        flops=task.flops,
        examples=settings.examples,
    )


def embed(config: Config, rows: int, devices: Sequence[Any]) -> Workload:
    """Returns the workload of the backbone's image tower, on the chips of one host. Hosts embed different photos."""
    options = config.embed.huggingface
    if config.embed.backbone != "huggingface":
        raise SettingsError(
            f"config.embed.backbone is {config.embed.backbone!r}, which uses no accelerator: set it to 'huggingface' "
            "to plan --workload=embed"
        )
    described = _L14 if options.path in ("", _L14_NAME) else checkpoint.read_config(options.path)
    kind = huggingface.KINDS[checkpoint.kind(options.path, described)]
    model: Any = nnx.eval_shape(lambda: kind(described, jnp.dtype(options.dtype), nnx.Rngs(0)))
    side = model.image_shape.image_size
    # Mean and standard deviation are arbitrary, because they are only constants of the program.
    processor = preprocess.Processor(side, side, preprocess.Image.Resampling.BICUBIC, 1 / 255, (0.5,) * 3, (0.5,) * 3)

    def features(model: Any, pixels: jax.Array) -> jax.Array:
        with huggingface.precision(options.dtype):
            return model.image_features(processor.normalize(pixels)).astype(jnp.float32)

    pixels = {"pixels": jax.ShapeDtypeStruct((side, side, 3), jnp.uint8)}
    return _inference(model, features, pixels, options.batch_size, devices, rows)


def predict(config: Config, rows: int, devices: Sequence[Any]) -> Workload:
    """Returns the workload of decoding candidates, on the chips of one host. Hosts decode different photos.

    The exact search of places is not part of it, because its number of steps depends on the photos.
    """
    del rows
    model = nnx.eval_shape(lambda: GeoTokenModel(config.model, nnx.Rngs(0)))
    options, s = config.predict, config.model

    def run(model: GeoTokenModel, query: Any, neighbors: Any, tokens: Any, count: Any, numbers: Any) -> Any:
        memory = model.encode(query, Neighbors(neighbors, tokens, count))
        if options.beam:
            return beam.search(model, memory, options.beam)
        keys = jax.vmap(lambda number: jax.random.fold_in(randomness.key(options.seed), number))(numbers)
        return sample.sample(model, memory, keys, options.samples, options.temperature, options.top_p)

    arguments = {
        "query": jax.ShapeDtypeStruct((3, s.backbone_width), jnp.bfloat16),
        "neighbors": jax.ShapeDtypeStruct((s.neighbors, 3, s.backbone_width), jnp.bfloat16),
        "neighbor_tokens": jax.ShapeDtypeStruct((s.neighbors, s.cells.length), jnp.int32),
        "neighbor_count": jax.ShapeDtypeStruct((), jnp.int32),
        "numbers": jax.ShapeDtypeStruct((), jnp.uint32),
    }
    return _inference(model, run, arguments, options.batch_size, devices)


def _inference(
    model: nnx.Module,
    run: Callable[..., Any],
    arguments: Mapping[str, jax.ShapeDtypeStruct],
    photos: int,
    devices: Sequence[Any],
    examples: int = 0,
) -> Workload:
    """Returns the workload of a program that does not train, such as prediction, on the devices of the first host.

    run: function of the model and the arguments. arguments: shape and type of each argument for one photo, by name.
    photos: photos per batch. examples: photos of the whole job; 0 if it has no end.
    """
    host = [d for d in devices if d.process_index == devices[0].process_index]
    mesh = sharding.make_mesh(sharding.MeshSettings(len(host), 1, 1), host)
    if photos % len(host):
        raise SettingsError(f"batch_size is {photos}: choose a multiple of {len(host)}, the number of chips per host")
    graph, state = nnx.split(model)
    parameters = _placed(nnx.to_pure_dict(state), NamedSharding(mesh, PartitionSpec()))
    batch_arrays = {name: jax.ShapeDtypeStruct((photos, *x.shape), x.dtype) for name, x in arguments.items()}
    batch_arrays = _placed(batch_arrays, sharding.batch_sharding(mesh))

    @functools.partial(jax.jit, out_shardings=sharding.batch_sharding(mesh))
    def function(parameters: Any, *arrays: jax.Array) -> Any:
        variables = jax.tree.map(lambda x: x, state)
        nnx.replace_by_pure_dict(variables, parameters)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return run(nnx.merge(graph, variables), *arrays)

    return Workload(
        mesh,
        function,
        (parameters, *(batch_arrays[name] for name in arguments)),
        {"parameters": parameters, "batch": batch_arrays},
        _count(parameters),
        photos,
        copies=len(devices) // len(host),
        examples=examples,
    )


def _count(parameters: Any) -> int:
    return sum(p.size for p in jax.tree.leaves(parameters))


def _placed(tree: Any, layout: NamedSharding) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout), tree)


#: Value of --workload -> function that returns the workload. Its arguments are a configuration, the number of gallery
#: photos and the devices. It raises SettingsError if the settings do not fit the devices.
WORKLOADS: dict[str, Callable[[Config, int, Sequence[Any]], Workload]] = {
    "train": train,
    "align": align,
    "embed": embed,
    "predict": predict,
}
