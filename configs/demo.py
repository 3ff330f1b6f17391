"""EarthView on two CPU cores in some minutes: the whole path, with the ablation and the paper's form beside it."""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.get_config()
    config.name = "demo"
    # Heads and location encoder of a size that two cores train in a minute; 3e-5 is for a pod's 41 million examples.
    config.align.model.location.update(fourier=128, hidden=256, out=256)
    config.align.train.update(batch_size=512, examples=192_000, evaluate_every=75, log_every=15)
    config.align.train.optimizer.update(learning_rate=2e-3, schedule="cosine", warmup=0.1, weight_decay=1e-4)
    # A photo's author took others around the same place on the same film: a new photo has no such neighbors.
    config.index.neighbors.exclude_author = True
    config.model.update(
        width=96, heads=4, encoder_layers=2, decoder_layers=2, feed_forward=192, dropout=0.1, neighbors=10,
        norm="pre", activation="gelu", positions="factored", tie_tokens=True, copy_head=True, dtype="float32",
        memory="compact", remat="none",
    )  # fmt: skip
    config.train.update(batch_size=256, examples=100_000, evaluate_every=50, log_every=10)
    config.train.optimizer.update(learning_rate=1e-3, schedule="cosine", warmup=0.05, weight_decay=0.01, clip=1.0)
    config.variants = dict(
        geotoken=dict(),
        without_neighbor_tokens=dict(model=dict(neighbor_tokens=False, copy_head=False)),
        paper=dict(
            model=dict(
                norm="post", activation="relu", positions="sinusoidal", memory="full", tie_tokens=False, copy_head=False
            )
        ),
    )
    config.predict.choice = "greedy"
    config.evaluate.labels = dict(
        top1_neighbor="Top-1 neighbor",
        geotoken="GeoToken",
        without_neighbor_tokens="GeoToken without neighbor tokens",
        paper="GeoToken, the paper's form",
    )
    return config
