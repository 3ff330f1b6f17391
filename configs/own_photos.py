"""Trains a model on your own photos: the demo's small decoder, with features from CLIP ViT-L/14.

Only the folder of the photos has to be set:
`geotoken all --config=configs/own_photos.py --workdir=DIR --config.photos.folder.path=PHOTOS`. The configuration is for
60 to about 100,000 photos. A batch is never larger than the number of photos, and each training ends after at most 10
to 20 epochs. docs/recipes/own-photos.md explains each step.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import demo


def get_config() -> ConfigDict:
    """Returns the configuration. config.photos.folder.path has to be set."""
    config: Any = demo.get_config()
    config.name = "own_photos"
    config.photos.source = "folder"
    # The shares of validation and test are twice the default: a twentieth of 60 photos would often be no photo at all.
    config.photos.folder.update(train=0.8, validation=0.1, test=0.1, photos_per_shard=500)
    # Many photos of a user's folder have no coordinates. They are dropped and counted.
    config.photos.max_dropped = 0.5
    config.embed.backbone = "huggingface"
    config.embed.huggingface.update(path="openai/clip-vit-large-patch14", batch_size=32)
    config.embed.views.count = config.channels.views.count = 0  # each view costs a pass through the backbone
    config.embed.threads = 2
    # Exact search works with any number of photos. ScaNN divides the photos into partitions and needs thousands.
    config.index.search.kind = "exact"
    trainings = (
        (config.align.train, 10),
        (config.train, 15),
        (config.reward.train, 20),
        (config.channels.train, 20),
        (config.baselines.train, 20),
    )
    for train, epochs in trainings:
        # The parameters with the lowest validation loss are kept, so more epochs than needed do no harm.
        train.update(batch_size=128, epochs=epochs, evaluate_every=20, log_every=10)
    return config
