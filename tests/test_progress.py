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
        for seconds in (10.0, 18.0, 20.0, 40.0):
            clock[0] = seconds
            bar.add(100, note=f"loss {seconds}")
    assert capsys.readouterr().err.splitlines() == [
        "train: 400 of 1,000 photo, 12/s, 48 s left loss 18.0",
        "train: 600 of 1,000 photo, 10/s, 40 s left loss 40.0",
        "train: 600 photo in 40 s",
    ]


def test_without_a_total_no_time_left_is_told(capsys, clock):
    with progress.Progress("embed", None) as bar:
        for clock[0] in (1.0, 21.0):
            bar.add(5000)
    assert capsys.readouterr().err.splitlines() == ["embed: 10,000 it, 250/s", "embed: 10,000 it in 21 s"]


def test_the_seconds_before_the_first_photo_do_not_count_for_the_time_left(capsys, clock):
    with progress.Progress("predict", 20, "photos") as bar:
        clock[0] = 32.0  # loading and compiling
        bar.add()
        clock[0] = 50.0
        bar.add(9)
    assert capsys.readouterr().err.splitlines() == [
        "predict: 1 of 20 photos",
        "predict: 10 of 20 photos, 0/s, 20 s left",
        "predict: 10 photos in 50 s",
    ]


def test_track_yields_every_item_and_counts_steps(capsys, clock):
    assert list(progress.track("abc", "search", 30, "photo", step=10)) == ["a", "b", "c"]
    assert capsys.readouterr().err == "search: 30 photo in 0 s\n"


def test_a_failure_prints_no_end(capsys, clock):
    with pytest.raises(KeyError), progress.Progress("train", 3):
        raise KeyError
    assert capsys.readouterr().err == ""
