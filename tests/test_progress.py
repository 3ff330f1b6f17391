"""Progress in a log without a terminal: plain lines with rate and time left, and one line at the end."""

import pytest

from geotoken_jax import progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only if it is set."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_now_and_then_with_rate_and_time_left(capsys, clock):
    with progress.Progress("train", 1000, "photo", done=200) as bar:
        for seconds in (10.0, 16.0, 20.0, 40.0):
            clock[0] = seconds
            bar.add(100, note=f"loss {seconds}")
    assert capsys.readouterr().err.splitlines() == [
        "train: 400 of 1,000 photo, 12/s, 48 s left loss 16.0",
        "train: 600 of 1,000 photo, 10/s, 40 s left loss 40.0",
        "train: 600 photo in 40 s",
    ]


def test_without_a_total_no_time_left_is_told(capsys, clock):
    with progress.Progress("embed", None) as bar:
        clock[0] = 20.0
        bar.add(5000)
    assert capsys.readouterr().err.splitlines() == ["embed: 5,000 it, 250/s", "embed: 5,000 it in 20 s"]


def test_track_yields_every_item_and_counts_steps(capsys, clock):
    assert list(progress.track("abc", "search", 30, "photo", step=10)) == ["a", "b", "c"]
    assert capsys.readouterr().err == "search: 30 photo in 0 s\n"


def test_a_failure_prints_no_end(capsys, clock):
    with pytest.raises(KeyError), progress.Progress("train", 3):
        raise KeyError
    assert capsys.readouterr().err == ""
