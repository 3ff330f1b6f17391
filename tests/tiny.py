"""A configuration of all stages that takes seconds, as a file for `--config`."""

from typing import Any

from ml_collections import ConfigDict

from configs import demo


def get_config() -> ConfigDict:
    config = demo.get_config()
    config.name = "tiny"
    config.photos.earthview.update(
        places=60, train=240, validation=30, test=40, test_unseen=20, test_shift=20, photos_per_shard=60
    )
    config.embed.thumbnail.size = 4
    config.embed.views.count = 1
    config.align.train.update(batch_size=32, examples=640, evaluate_every=5, log_every=5)
    config.index.search.update(kind="exact", sample=50)
    shrink(config, width=48)
    config.train.update(batch_size=32, examples=640, evaluate_every=5, log_every=5)
    config.variants = dict(
        geotoken=dict(),
        paper=dict(
            model=dict(
                norm="post",
                activation="relu",
                positions="sinusoidal",
                memory="full",
                tie_tokens=False,
                copy_head=False,
                similarities=False,
                dropout=0.0,
            ),
            loss=dict(last_weight=1.0),
            train=dict(examples=320, optimizer=dict(learning_rate=3e-4)),
            predict=dict(samples=0, choice="greedy", selectors=("greedy",), search=dict(expansions=0)),
        ),
    )
    config.evaluate.labels["paper"] = "GeoToken, the paper's architecture"
    config.pools.photos = 60
    config.reward.train.update(batch_size=16, examples=160, evaluate_every=5, log_every=5)
    config.channels.train.update(batch_size=16, examples=160, evaluate_every=5, log_every=5)
    return config


def shrink(config: Any, width: int) -> None:
    """Makes all models of a configuration tiny. width: width of the backbone's features."""
    config.align.model.hidden = 32
    config.align.model.location.update(fourier=16, hidden=32, out=32)
    config.index.neighbors.count = 6
    config.model.update(
        backbone_width=width, width=16, heads=2, encoder_layers=1, decoder_layers=1, feed_forward=16, neighbors=4,
        group=4,
    )  # fmt: skip
    config.predict.update(samples=5, batch_size=32)
    config.predict.search.update(expansions=16, leaves=4, width=4)
    config.baselines.knn.neighbors = 6
    config.reward.model.hidden = 8
    config.channels.comparator.update(hidden=16, width=8)
    config.channels.views.count = 1
    config.reranker.model.update(depth=33, candidates=4, cells=2)
    config.reranker.fit.update(epochs=2, folds=2)
    config.evaluate.resamples = 100
