"""One photo, lists and an event loop, on a test model that takes numbers as photos and returns them as latitudes."""

import asyncio
import pydoc
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

import geotoken_jax
from geotoken_jax.backbone.preprocess import ImageError
from geotoken_jax.predict.prediction import Prediction
from geotoken_jax.predict.predictor import Predictor


class Echo(Predictor):
    """Predicts latitude n for the number n, after it is released. Anything but a number is an invalid photo."""

    batch_size = 3

    def __init__(self):
        self.batches: list[list[Any]] = []
        self.threads: set[int] = set()
        self.may = threading.Event()
        self.may.set()

    def prepare(self, photo: Any) -> Any:
        if not isinstance(photo, int):
            raise ImageError(f"{photo!r} is not a photo")
        return photo

    def predict_prepared(self, photos: Sequence[Any], captured: Any = None) -> list[Prediction]:
        self.batches.append(list(photos))
        self.threads.add(threading.get_ident())
        assert self.may.wait(20)
        return [Prediction(float(n), 0.0, 1.0, 2.0, {}, (), (), ()) for n in photos]


def latitudes(answers: Sequence[Prediction]) -> list[int]:
    return [int(answer.latitude) for answer in answers]


def test_a_list_is_answered_in_batches_and_in_order():
    model = Echo()
    assert model.predict(5).latitude == 5
    assert latitudes(model.predict(tuple(range(7)))) == list(range(7))
    assert model.predict([]) == []
    assert [len(batch) for batch in model.batches] == [1, 3, 3, 1]


def test_several_awaits_at_once_each_get_their_own_answers():
    model = Echo()

    async def ask() -> list[Any]:
        lists = [list(range(10 * k, 10 * k + 7)) for k in range(5)]
        return await asyncio.gather(*map(model.predict_async, lists), model.predict_async(99), model.predict_async([]))

    *answers, alone, nothing = asyncio.run(ask())
    assert [latitudes(answer) for answer in answers] == [list(range(10 * k, 10 * k + 7)) for k in range(5)]
    assert alone.latitude == 99 and nothing == []
    assert len(model.threads) == 1 and threading.get_ident() not in model.threads
    # One photo does not wait for all batches of five lists: it follows their first batches.
    assert model.batches.index([99]) == 5


def test_the_event_loop_goes_on_while_the_model_works():
    model = Echo()
    model.may.clear()

    async def ask() -> float:
        asking = asyncio.create_task(model.predict_async(1))
        while not model.batches:
            await asyncio.sleep(0.001)
        began = time.monotonic()
        for _ in range(20):
            await asyncio.sleep(0.001)
        took = time.monotonic() - began
        assert not asking.done()
        model.may.set()
        assert (await asking).latitude == 1
        return took

    assert asyncio.run(ask()) < 10


def test_what_is_canceled_stops_after_its_batch_and_the_next_is_answered():
    model = Echo()
    model.may.clear()

    async def ask() -> Prediction:
        long = asyncio.create_task(model.predict_async(list(range(30))))
        waiting = asyncio.create_task(model.predict_async([50]))
        after = asyncio.create_task(model.predict_async(60))
        while not model.batches:
            await asyncio.sleep(0.001)
        long.cancel()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await long
        with pytest.raises(asyncio.CancelledError):
            await waiting
        model.may.set()
        return await after

    assert asyncio.run(ask()).latitude == 60
    assert model.batches == [[0, 1, 2], [60]]


def test_a_bad_photo_is_the_error_of_who_sent_it_and_a_second_event_loop_works():
    model = Echo()

    async def ask() -> list[Any]:
        return await asyncio.gather(*map(model.predict_async, (1, "x", [2, 3])), return_exceptions=True)

    for _ in range(2):
        one, error, two = asyncio.run(ask())
        assert one.latitude == 1 and latitudes(two) == [2, 3]
        assert isinstance(error, ImageError) and "'x' is not a photo" in str(error)


def test_the_public_face_has_help():
    names = {"CellScheme", "GeoToken", "Prediction"}
    assert {*geotoken_jax.__all__} == names | {"__version__"} <= {*dir(geotoken_jax)}
    for name in names:
        assert getattr(geotoken_jax, name).__name__ == name
    told = pydoc.plain(pydoc.render_doc(geotoken_jax))
    assert "GeoToken.load(" in told and "radius_90_km" in told and "predict_async" in told
    with pytest.raises(AttributeError, match="Nothing"):
        _ = geotoken_jax.Nothing


def test_a_photo_that_cannot_be_read_does_not_end_the_others():
    model = Echo()
    answers = model.predict([1, "x", 2, 3, "y", 4], on_error="return")
    assert [str(a) if isinstance(a, ImageError) else int(a.latitude) for a in answers] == [
        1, "'x' is not a photo", 2, 3, "'y' is not a photo", 4
    ]  # fmt: skip
    assert model.batches == [[1, 2, 3], [4]]  # bad photos do not make batches smaller
    with pytest.raises(ImageError, match="'x' is not"):
        model.predict([1, "x", 2])


def test_a_stream_takes_photos_as_it_needs_them():
    taken = []

    def photos():
        for n in range(100):
            taken.append(n)
            yield n

    stream = Echo().stream(photos())
    assert next(stream).latitude == 0 and len(taken) < 12  # two batches ahead
    assert latitudes(list(stream)) == list(range(1, 100))
