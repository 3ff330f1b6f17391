"""Benchmarks: all are run by one command, and a failure is not overlooked. `make bench-small` runs them."""

import json

import pytest

from benchmarks import __main__ as benchmarks


def test_every_benchmark_has_its_smallest_size():
    assert set(benchmarks.names()) == set(benchmarks.SMALL)
    assert benchmarks.names()[-1] == "data_costs"  # which reads the lines of the others


def test_lines_get_the_name_of_their_benchmark():
    (line,) = benchmarks.run("data_costs", [])
    assert json.loads(line)["benchmark"] == "data_costs" and "skipped" in json.loads(line)


def test_a_benchmark_that_fails_ends_the_run():
    with pytest.raises(SystemExit, match=r"benchmarks\.data_costs ended with status 2"):
        list(benchmarks.run("data_costs", ["--oops"]))
