"""A model of your own photos: the demo's small decoder on the features of CLIP ViT-L/14.

Only the photos have to be named:
`geotoken all --config=configs/own_photos.py --workdir=DIR --config.photos.folder.path=PHOTOS`. It suits 60 to about
100,000 photos: batches are never larger than the number of photos, and each training ends after some passes over them.
docs/recipes/own-photos.md explains each step.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import demo


def get_config() -> ConfigDict:
    """Returns the configuration. config.photos.folder.path has to be set."""
    config: Any = demo.get_config()
    config.name = "own_photos"
    config.photos.source = "folder"
    # Twice the default shares: a twentieth of 60 photos would often be no photo at all.
    config.photos.folder.update(train=0.8, validation=0.1, test=0.1, photos_per_shard=500)
    config.photos.max_dropped = 0.5  # a folder of one's own has photos without a place; each drop is counted
    config.embed.backbone = "huggingface"
    config.embed.huggingface.update(path="openai/clip-vit-large-patch14", batch_size=32)
    config.embed.views.count = config.channels.views.count = 0  # views cost a pass through the backbone each
    config.embed.threads = 2
    # Exact search works with any number of photos. ScaNN's partitions need thousands.
    config.index.search.kind = "exact"
    trainings = (
        (config.align.train, 10),
        (config.train, 15),
        (config.reward.train, 20),
        (config.channels.train, 20),
        (config.baselines.train, 20),
    )
    for train, epochs in trainings:
        # The best of the validated steps is kept, so many epochs do no harm.
        train.update(batch_size=128, epochs=epochs, evaluate_every=20, log_every=10)
    return config
