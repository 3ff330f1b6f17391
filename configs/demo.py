"""The demo: all stages on the small data set EarthView, in half an hour of processor time.

docs/settings.md shows the effect of each setting of the model. Three more settings were tried in one run each, before
augmented views of the training photos were added. These are the validation losses, in nats:
- Number of neighbors: 1.673 with 20, 1.694 with 10.
- Products of the projected embeddings as additional similarities: 1.722 with them, 1.694 without.
- Dropout of embeddings: 1.670 with 0.3, 1.673 without. The gain is too small to justify a new key.

Without views the model overfits after 100,000 examples. With two views of each photo the validation loss falls until
150,000 examples, from 1.679 to 1.655. The demo ends after 96,000 examples to save time.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """Returns the demo's configuration."""
    config: Any = common.get_config()
    config.name = "demo"
    config.embed.views.count = 2
    # For photos as small as these, one thread takes 0.5 ms per view. Two threads block each other and take 1.0 ms.
    config.embed.threads = 1
    # This location encoder is small enough to be trained in seconds on two cores. The learning rate is higher than the
    # paper's 3e-5, which is for 41 million examples. The training is short because the heads overfit from the second
    # epoch on. Training photos would then have better neighbors than new photos, and the decoder would learn to trust
    # neighbors too much.
    config.align.model.location.update(fourier=64, hidden=128, out=128)
    config.align.train.update(batch_size=512, examples=48_000, evaluate_every=31, log_every=10)
    config.align.train.optimizer.update(learning_rate=1e-3, schedule="cosine", warmup=0.1, weight_decay=1e-4)
    # In EarthView, other photos by the same author show the same place on the same map. A new photo has no such
    # neighbors, so they are excluded in training.
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
    # Photos are at random positions within about a kilometer of their place, so tokens after level 12 (2 km) are noise.
    # The loss of each such token is 2.78 nats, and the loss of a uniform guess is log 16 = 2.77. If the weight of the
    # last token were 1.0, as in the paper, the model would memorize this noise.
    config.loss.last_weight = 0.1
    config.train.update(batch_size=256, examples=96_000, evaluate_every=75, log_every=15)
    config.train.optimizer.update(learning_rate=1e-3, schedule="cosine", warmup=0.05, weight_decay=0.01, clip=1.0)
    _set_choice(config)
    # Of 42 pairs (temperature 0.01 to 0.1, sigma 5 to 1500 km), this one has the best GeoScore on `validation`: 2,712.
    # The first neighbor alone has 2,695.
    config.baselines.knn.update(temperature=0.05, sigma_km=800.0)
    # The classifier then has 1,421 cells. Its training takes a minute and a half.
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


def _set_choice(config: Any) -> None:
    """Adds the reranker to the selectors and makes it choose the answer. Shortens all training for selection."""
    config.predict.selectors = (*config.predict.selectors, "reranker")
    config.predict.choice = "reranker"
    config.pools.photos = 3_000
    config.reward.model.update(hidden=256, dropout=0.2)
    config.reward.train.update(batch_size=128, examples=60_160, evaluate_every=94, log_every=25)
    config.reward.train.optimizer.learning_rate = 3e-3
    # The gallery is small. Exact search takes less time than building indexes.
    config.channels.update(kind="exact", dtype="int8")
    config.channels.views.count = 6
    config.channels.train.update(examples=307_200, evaluate_every=200, log_every=25)
