"""Every configuration and each of its variants is read without an error; the paper's model has the published size."""

import importlib
import pathlib
import re

import jax
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from geotoken_jax import configuration, settings
from geotoken_jax.model.geotoken import GeoTokenModel
from geotoken_jax.stages.baselines import BASELINES
from geotoken_jax.train.optimizer import make_schedule

FOLDER = pathlib.Path(__file__).parents[1] / "configs"
CONFIGS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


def load(name):
    return importlib.import_module(f"configs.{name}").get_config()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_section_of_every_variant_is_read(name):
    config = configuration.read(load(name))
    assert config.name == name and len(config.variants) > 0
    for variant in config.variants:
        changed = config.variant(variant)
        assert changed.train.steps > 0 and changed.align.train.steps > 0
        assert max(changed.model.neighbors, changed.baselines.knn.neighbors) <= changed.index.neighbors.count
        assert changed.model.cells.level <= 20  # the level of tokens in features/
        for options in (changed.train, changed.align.train, changed.baselines.train):
            assert np.isfinite(float(make_schedule(options.optimizer, options.steps, 10)(options.steps)))


@pytest.mark.parametrize("key", ["workers", "folder.photos_per_shard", "mp16_pro.photos_per_shard"])
def test_a_count_of_zero_in_photos_is_refused(key):
    config = load("demo")
    config.photos.update_from_flattened_dict({key: 0})
    with pytest.raises(settings.SettingsError, match=rf"config\.photos\.{key} is 0: use 1 or more"):
        configuration.read(config)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_key_that_nothing_reads_is_refused_wherever_it_is(name):
    def sections(of, where=""):
        yield where, of
        for key, value in of.items():
            # These sections may have any key: names, and fields of a request.
            if isinstance(value, ConfigDict) and key not in ("variants", "experiments", "labels", "options"):
                yield from sections(value, f"{where}.{key}")

    found = load(name)
    named = (".benchmarks.photos", ".benchmarks.exclude", ".photos.sources")  # whose keys are names of sections
    for where in (where for where, _ in list(sections(found)) if where not in named):
        config = load(name).unlock()
        section = config
        for key in filter(None, where.split(".")):
            section = section[key]
        section.odd = 1
        with pytest.raises(settings.SettingsError, match=re.escape(f"config{where}.odd is not a known key")):
            configuration.read(config)
    config = configuration.read(found)
    assert config.evaluate.reference in config.variants
    assert set(config.evaluate.labels) == {*BASELINES, *config.variants}


@pytest.mark.parametrize("name", ["mp16_siglip2", "best"])
def test_a_backbone_sets_the_width_of_the_decoders_input(name):
    get_config = importlib.import_module(f"configs.{name}").get_config
    for backbone, width in (("so400m", 1152), ("giant", 1536)):
        config = configuration.read(get_config(backbone))
        assert backbone in config.embed.huggingface.path and config.model.backbone_width == width
    with pytest.raises(ValueError, match="backbone 'large' is unknown: use one of so400m, giant"):
        get_config("large")


EXPERIMENTS = load("experiments").experiments


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_run_of_every_experiment_is_read(name):
    config = configuration.read(load("experiments"))
    experiment, labels = config.experiments[name], []
    for label, changes, *trained_by in experiment.runs:
        changed = config.changed(changes, name)
        assert changed.model.neighbors <= changed.index.neighbors.count
        assert set(trained_by) <= set(labels)
        labels.append(label)
    assert len(set(labels)) == len(labels) and experiment.question.endswith("?")


def test_the_papers_model_has_its_size():
    s = configuration.read(load("common")).model
    state = nnx.state(nnx.eval_shape(lambda: GeoTokenModel(s, nnx.Rngs(0))), nnx.Param)
    parameters = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state))
    assert parameters == pytest.approx(54.8e6, rel=0.003)  # arXiv 2511.01082, section 4
