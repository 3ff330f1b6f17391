"""Dynamic batching: each time the model becomes free, the waiting photos form the next batch."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from geotoken_jax.batch import padded_size
from geotoken_jax.predict.prediction import Prediction
from geotoken_jax.serve.limits import Refused

#: A decoded and resized photo.
Prepared = UInt8[np.ndarray, "h w 3"]


class Model(Protocol):
    """The methods of `predict.predictor.Predictor` that the service calls.

    Preparing a photo and predicting are separate calls, because threads prepare photos while the model predicts others.
    """

    batch_size: int

    def prepare(self, photo: Any) -> Prepared: ...
    def predict_prepared(self, photos: Any) -> Any: ...


class Batcher:
    """Runs the model in one thread on batches of waiting photos, oldest first."""

    def __init__(self, model: Model, size: int, wait_s: float, on_batch: Callable[[int, float], None]):
        """size: largest batch. wait_s: longest time that a free model waits for more photos, in seconds. on_batch:
        function called after each predicted batch, with its number of photos and its duration in seconds."""
        self._model, self._wait_s, self._on_batch = model, wait_s, on_batch
        self._size = min(size, model.batch_size)
        self._waiting: asyncio.Queue[tuple[Prepared, asyncio.Future[Prediction]]] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, "model")
        self._last_s = 1.0
        self.ready = False

    async def __call__(self, photo: Prepared) -> Prediction:
        """Returns the prediction for a photo. Raises Refused if the model fails."""
        answer = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((photo, answer))
        return await answer

    def wait_s(self, photos: int) -> float:
        """Returns the seconds until `photos` photos are predicted, if all batches take as long as the last one."""
        return -(-photos // self._size) * self._last_s

    async def run(self) -> None:
        """Compiles the model for all batch sizes, then predicts until canceled."""
        try:
            blank = self._model.prepare(Image.new("RGB", (64, 64)))
            for size in sorted({padded_size(n + 1, self._size) for n in range(self._size)}):
                await self._timed([blank] * size)
            await self._timed([blank] * self._size)  # the duration stored above includes compilation: measure again
            self.ready = True
            logging.getLogger("uvicorn.error").info("geotoken is ready")
            while True:
                await self._answer(await self._next())
        finally:
            self.ready = False
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def _next(self) -> list[tuple[Prepared, asyncio.Future[Prediction]]]:
        batch = [await self._waiting.get()]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._wait_s):
                while len(batch) < self._size:
                    batch.append(await self._waiting.get())
        return [(photo, answer) for photo, answer in batch if not answer.done()]  # skip photos whose client has left

    async def _answer(self, batch: Sequence[tuple[Prepared, asyncio.Future[Prediction]]]) -> None:
        if not batch:
            return
        photos = [photo for photo, _ in batch]
        try:
            predictions = await self._timed(photos)
        except Exception:
            logging.getLogger(__name__).exception("the model failed on %d photos", len(photos))
            predictions = [
                Refused(500, "the model failed: try again, and report it to the operator if it fails again")
            ] * len(photos)
        else:
            self._on_batch(len(photos), self._last_s)
        for (_, answer), prediction in zip(batch, predictions, strict=True):
            if answer.done():
                continue
            if isinstance(prediction, Refused):
                answer.set_exception(prediction)
            else:
                answer.set_result(prediction)

    async def _timed(self, photos: list[Prepared]) -> list[Prediction]:
        """Returns the predictions of a batch and stores its duration.

        Copies of the first photo fill the batch to the next compiled size.
        """
        filled = photos + photos[:1] * (padded_size(len(photos), self._size) - len(photos))
        start = time.perf_counter()
        predictions = await asyncio.get_running_loop().run_in_executor(
            self._thread, self._model.predict_prepared, filled
        )
        self._last_s = time.perf_counter() - start
        return predictions[: len(photos)]
