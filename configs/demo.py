"""The demo: all stages on EarthView, in half an hour of processor time.

docs/settings.md has the effect of each setting of the model. Further settings were tried in one run each, before views
of the training photos were added. Their validation losses:
- neighbors: 1.673 with 20, 1.694 with 10.
- products of the projected embeddings as additional similarities: 1.722 with them, 1.694 without.
- dropout of embeddings: 1.670 with 0.3, 1.673 without. This gain is too small for a setting of its own.

Without views the model overfits after 100,000 examples. With two views of each photo the validation loss falls up to
150,000 examples, from 1.679 to 1.655. The demo ends after 96,000, for its time.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """Returns the demo's configuration."""
    config: Any = common.get_config()
    config.name = "demo"
    config.embed.views.count = 2
    config.embed.threads = 1  # one thread takes 0.5 ms per view of such small photos; two block each other and take 1.0
    # Two cores train this location encoder in seconds. The paper's rate, 3e-5, is for 41 million examples. From the
    # second epoch the heads overfit: training photos then have better neighbors than new photos, and the decoder would
    # rely on neighbors too much.
    config.align.model.location.update(fourier=64, hidden=128, out=128)
    config.align.train.update(batch_size=512, examples=48_000, evaluate_every=31, log_every=10)
    config.align.train.optimizer.update(learning_rate=1e-3, schedule="cosine", warmup=0.1, weight_decay=1e-4)
    # In EarthView the other photos of an author show the same place on the same map. A new photo has no such neighbors.
    config.index.neighbors.exclude.author = True
    config.model.update(
        width=96,
        heads=4,
        encoder_layers=2,
        decoder_layers=2,
        feed_forward=192,
        neighbors=20,
        norm="pre",
        activation="gelu",
        positions="factored",
        memory="compact",
        tie_tokens=True,
        copy_head=True,
        similarities=True,
        dtype="float32",
        remat="none",
    )
    # Photos are about a kilometer from their place, so tokens after level 12 are noise: each has a loss of 2.78 nats,
    # and a uniform guess has log 16 = 2.77. With the paper's weight of 1.0 the model memorizes this noise.
    config.loss.last_weight = 0.1
    config.train.update(batch_size=256, examples=96_000, evaluate_every=75, log_every=15)
    config.train.optimizer.update(learning_rate=1e-3, schedule="cosine", warmup=0.05, weight_decay=0.01, clip=1.0)
    _set_selectors(config)
    # The best of 42 pairs (temperature 0.01..0.1, sigma 5..1500 km) by GeoScore on validation: 2,712. The first
    # neighbor alone has 2,695.
    config.baselines.knn.update(temperature=0.05, sigma_km=800.0)
    # Gives 1,421 cells. Training takes a minute and a half.
    config.baselines.classifier.update(max_photos=50, min_photos=5, hidden=512, dropout=0.5)
    config.baselines.train.update(batch_size=512, examples=720_000, evaluate_every=282, log_every=25)
    config.evaluate.labels = dict(
        top1_neighbor="Top-1 neighbor",
        knn="kNN vote",
        geoclip="GeoCLIP retrieval",
        classifier="Cell classifier",
        geotoken="GeoToken",
    )
    return config


def _set_selectors(config: Any) -> None:
    """Sets which selectors are used, and shortens their training for two cores."""
    config.predict.selectors = (*config.predict.selectors, "reranker")
    config.predict.choice = "reranker"
    config.pools.photos = 3_000
    config.reward.model.update(hidden=256, dropout=0.2)
    config.reward.train.update(batch_size=128, examples=60_160, evaluate_every=94, log_every=25)
    config.reward.train.optimizer.learning_rate = 3e-3
    # For so few photos, exact search takes less time than building the indexes would.
    config.channels.update(kind="exact", dtype="int8")
    config.channels.views.count = 6
    config.channels.train.update(examples=307_200, evaluate_every=200, log_every=25)
