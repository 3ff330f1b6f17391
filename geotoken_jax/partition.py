"""Computes the rows of each shard of a table, an index, neighbors or token records."""

from collections.abc import Sequence


def ranges(counts: Sequence[int], limit: int) -> list[range]:
    """Returns the rows of each shard. If there are no rows, there is one empty shard.

    counts: numbers of rows, ascending: the number when the shards were first made, then the number after each addition
    of rows. limit: largest number of rows per shard.

    Without additions, every shard except the last has `limit` rows. Added rows form new shards. But if the last shard
    is not full, and at least as many rows are added as it has, it is merged with the added rows. Full shards never
    change.

    Merging keeps the number of small shards low: with additions of equal size, it grows with the logarithm of their
    number. A merge about doubles the size of a shard, so a row is written again about log2(limit) times at most.
    """
    shards: list[range] = []
    for count in counts:
        first = shards[-1].stop if shards else 0
        while count > first and shards and len(shards[-1]) < min(limit, count - first + 1):
            first = shards.pop().start
        shards += [range(start, min(start + limit, count)) for start in range(first, count, limit)]
    return shards or [range(0)]
