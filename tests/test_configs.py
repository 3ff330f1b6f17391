"""Every configuration is read by its modules without an error, in each of its variants; the paper's has its size."""

import importlib
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

from data_prep.embed import EmbedSettings
from data_prep.neighbors import NeighborsSettings
from data_prep.photos import PhotosSettings
from geotoken_jax import settings
from geotoken_jax.align import loss as align_loss
from geotoken_jax.align.heads import AlignSettings
from geotoken_jax.align.pixels import PixelsSettings
from geotoken_jax.analysis.audit import AuditSettings
from geotoken_jax.analysis.evaluate import EvaluateSettings
from geotoken_jax.analysis.experiment import Experiment
from geotoken_jax.data.join import DataSettings
from geotoken_jax.export import ExportSettings
from geotoken_jax.gallery.index import IndexSettings
from geotoken_jax.gallery.placement import GallerySettings
from geotoken_jax.interop import geoclip
from geotoken_jax.model.geotoken import GeoTokenModel, ModelSettings
from geotoken_jax.model.reward import RewardSettings
from geotoken_jax.model.task import LossSettings
from geotoken_jax.predict.baselines import BASELINES, GeoClipSettings, KnnSettings
from geotoken_jax.predict.classifier import ClassifierSettings
from geotoken_jax.predict.decode import PredictSettings
from geotoken_jax.predict.judge import JudgeSettings
from geotoken_jax.predict.learn import PoolsSettings
from geotoken_jax.predict.verify import VerifierSettings
from geotoken_jax.processes import WatchSettings
from geotoken_jax.sharding import MeshSettings
from geotoken_jax.train.loop import TrainSettings
from geotoken_jax.train.optimizer import make_schedule

FOLDER = pathlib.Path(__file__).parents[1] / "configs"
CONFIGS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
READERS = {
    "mesh": MeshSettings,
    "watch": WatchSettings,
    "photos": PhotosSettings,
    "embed": EmbedSettings,
    "align.model": AlignSettings,
    "align.loss": align_loss.LossSettings,
    "align.init": geoclip.InitSettings,
    "align.pixels": PixelsSettings,
    "align.train": TrainSettings,
    "index.neighbors": NeighborsSettings,
    "index.search": IndexSettings,
    "gallery": GallerySettings,
    "data": DataSettings,
    "model": ModelSettings,
    "loss": LossSettings,
    "train": TrainSettings,
    "pools": PoolsSettings,
    "reward.model": RewardSettings,
    "reward.train": TrainSettings,
    "verifier.model": VerifierSettings,
    "verifier.train_comparator": TrainSettings,
    "verifier.train_judge": TrainSettings,
    "predict": PredictSettings,
    "judge": JudgeSettings,
    "baselines.knn": KnnSettings,
    "baselines.geoclip": GeoClipSettings,
    "baselines.classifier": ClassifierSettings,
    "baselines.train": TrainSettings,
    "evaluate": EvaluateSettings,
    "audit": AuditSettings,
    "export": ExportSettings,
}


def load(name):
    return importlib.import_module(f"configs.{name}").get_config()


def section(config, place):
    for part in place.split("."):
        config = config[part]
    return config


@pytest.mark.parametrize("name", CONFIGS)
def test_every_section_of_every_variant_is_read(name):
    config = load(name)
    assert config.name == name and len(config.variants) > 0
    for variant in config.variants:
        changed = settings.variant(config, variant)
        found = {place: settings.read(kind, section(changed, place), place) for place, kind in READERS.items()}
        model, train = found["model"], found["train"]
        assert train.steps > 0 and found["align.train"].steps > 0
        assert max(model.neighbors, found["baselines.knn"].neighbors) <= found["index.neighbors"].count
        assert model.cells.level <= 20  # what features/ hold
        for options in (train, found["align.train"], found["baselines.train"]):
            assert np.isfinite(float(make_schedule(options.optimizer, options.steps, 10)(options.steps)))


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_in_a_configuration_is_unread(name):
    config = load(name)
    read = {place.split(".")[0] for place in READERS} | {"name", "variants"}
    assert set(config) - {"experiments", "scaling"} == read
    for parent in ("align", "index", "reward", "verifier", "baselines"):
        assert {f"{parent}.{key}" for key in config[parent]} == {p for p in READERS if p.startswith(f"{parent}.")}
    assert config.evaluate.reference in config.variants
    assert set(config.evaluate.labels) == {*BASELINES, *config.variants}


EXPERIMENTS = load("experiments").experiments


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_run_of_every_experiment_is_read(name):
    config = load("experiments")
    experiment = settings.read(Experiment, config.experiments[name], name)
    labels = []
    for label, changes, *trained_by in experiment.runs:
        changed = settings.changed(config, changes, name)
        found = {place: settings.read(kind, section(changed, place), place) for place, kind in READERS.items()}
        assert found["model"].neighbors <= found["index.neighbors"].count
        assert set(trained_by) <= set(labels)
        labels.append(label)
    assert len(set(labels)) == len(labels) and experiment.question.endswith("?")


def test_the_papers_model_has_its_size():
    s = settings.read(ModelSettings, load("common").model, "model")
    state = nnx.state(nnx.eval_shape(lambda: GeoTokenModel(s, nnx.Rngs(0))), nnx.Param)
    parameters = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state))
    assert parameters == pytest.approx(54.8e6, rel=0.003)  # arXiv 2511.01082, section 4
