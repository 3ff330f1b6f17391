"""Rows of the shards into which tables, indexes, neighbors and records are divided."""

from collections.abc import Sequence


def ranges(counts: Sequence[int], limit: int) -> list[range]:
    """Returns the rows of each shard: `limit` rows, fewer in the last shard; one empty shard if there are no rows.

    counts: numbers of rows, ascending. The last one is the present number; those before are the numbers when the shards
    were made and extended. Rows that were added since are in shards of their own, so that full shards never change. A
    shard at the end that is not full is joined with rows that are added later, if they are at least as many: so the
    number of such shards grows with the logarithm of the additions, and no row is written again more often than that.
    """
    shards: list[range] = []
    for count in counts:
        first = shards[-1].stop if shards else 0
        while count > first and shards and len(shards[-1]) < min(limit, count - first + 1):
            first = shards.pop().start
        shards += [range(start, min(start + limit, count)) for start in range(first, count, limit)]
    return shards or [range(0)]
