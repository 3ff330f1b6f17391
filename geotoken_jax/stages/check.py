"""`geotoken check`: tests whether a configuration fits the prepared photos, before the stages that take long."""

from collections.abc import Iterator

from jax.sharding import Mesh

from geotoken_jax import backbone
from geotoken_jax.backbone.views import SOURCE_SPLIT
from geotoken_jax.configuration import Config
from geotoken_jax.manifests import Manifest, StageError
from geotoken_jax.settings import SettingsError
from geotoken_jax.sharding import batch_shards, local_rows, make_mesh
from geotoken_jax.stages import train
from geotoken_jax.train.loop import TrainSettings
from geotoken_jax.workdir import TOP1, VALIDATION, Workdir


def run(config: Config, workdir: Workdir) -> list[Manifest]:
    """Checks the settings of all stages against the prepared photos, and prints the size of each training.

    Returns no manifest, because it makes no folder. Raises SettingsError or StageError for the first setting that does
    not fit.
    """
    photos = workdir.manifest("photos")
    _check_splits(workdir, photos)
    features = workdir.finished("features")
    width = features.facts["width"] if features else backbone.make(config.embed).width
    known = {TOP1, *config.variants}
    if config.evaluate.reference not in known:
        raise SettingsError(
            f"config.evaluate.reference is {config.evaluate.reference!r}: set it to one of {', '.join(sorted(known))}"
        )
    for name in config.variants:
        variant = config.variant(name)
        train.check_model(variant.model, width)
        _check_neighbors(variant)
        train.check_context(variant, workdir)
        mesh = make_mesh(variant.mesh)
        for key, settings, count in _trainings(variant, photos.counts[SOURCE_SPLIT]):
            fitted = _fitted(key, settings, count, mesh)
            print(f"{name}: config.{key} has {fitted.steps:,} steps of {fitted.batch_size:,} photos", flush=True)
    return []


def _check_splits(workdir: Workdir, photos: Manifest) -> None:
    for split in (SOURCE_SPLIT, VALIDATION):
        if not photos.counts.get(split):
            counts = ", ".join(f"{name} {count:,}" for name, count in photos.counts.items()) or "no photos"
            raise StageError(
                f"{workdir.path / 'photos'} has no {split} photos ({counts}): change the shares of the splits in "
                f"config.photos.{photos.settings['photos']['source']}, add photos of more authors, or leave out a "
                "column `author` that has one name only, then run `geotoken all` again with --remake=prepare"
            )


def _check_neighbors(config: Config) -> None:
    stored = config.index.neighbors.count
    if config.model.neighbors > stored:
        raise SettingsError(
            f"config.model.neighbors is {config.model.neighbors}, but config.index.neighbors.count is {stored}, the "
            f"number of neighbors stored per photo: set config.model.neighbors to at most {stored}, or "
            f"config.index.neighbors.count to at least {config.model.neighbors}"
        )


def _trainings(config: Config, photos: int) -> Iterator[tuple[str, TrainSettings, int]]:
    """Yields the trainings of alignment model and decoder, each as configuration key, settings and number of photos."""
    yield "align.train", config.align.train, photos
    chosen = config.data.photos or photos
    if chosen > photos:
        raise SettingsError(
            f"config.data.photos is {chosen:,}, but there are {photos:,} training photos: set it to at most {photos}, "
            "or to 0 for all"
        )
    yield "train", config.train, chosen * (1 + config.embed.views.count)


def _fitted(key: str, settings: TrainSettings, photos: int, mesh: Mesh) -> TrainSettings:
    """Returns the settings that a training on this many photos uses. Raises SettingsError if they do not fit."""
    try:
        fitted = settings.for_photos(photos, batch_shards(mesh) * settings.accumulate)
        local_rows(mesh, fitted.batch_size)
    except SettingsError as error:
        raise SettingsError(f"config.{key}.{error}") from None
    return fitted
