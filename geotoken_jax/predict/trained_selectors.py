"""Loads trained selectors by name, from a work directory or an export."""

from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from geotoken_jax.gallery.index import Index
from geotoken_jax.gallery.table import Table
from geotoken_jax.model.geotoken import GeoTokenModel
from geotoken_jax.predict.channels import Channels
from geotoken_jax.predict.rerank import Ranker, read
from geotoken_jax.predict.reward import Reward
from geotoken_jax.predict.select import Selector


def selector_loader(
    sections: Mapping[str, Any],
    folder: Callable[[str], epath.Path],
    gallery: Table,
    model: GeoTokenModel,
    searched: Callable[[], tuple[Index, int]],
) -> Callable[[str], Selector]:
    """Returns a function that loads a trained selector by its name.

    sections: name of a trained selector, or "comparator" -> its model settings. folder: function that returns the
    folder of a trained selector, or of "channels". model: decoder whose outputs the reward head scores. searched:
    function that returns the gallery's index and the number of threads per search.
    """

    def load(name: str) -> Selector:
        if name == "reward":
            return Reward(folder("reward"), sections["reward"], model)
        settings = sections["reranker"]
        index, threads = searched()
        channels = Channels(settings.channels, folder("channels"), sections["comparator"], gallery, index, threads)
        return Ranker(read(folder("reranker"), settings), channels, gallery)

    return load
