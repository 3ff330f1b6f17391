"""The service behind the endpoints: reads photos from requests, applies the limits and predicts in batches."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import Request

from geotoken_jax.backbone.preprocess import ImageError
from geotoken_jax.predict.prediction import Prediction
from geotoken_jax.serve import bodies
from geotoken_jax.serve.answers import Failure
from geotoken_jax.serve.batching import Batcher, Model
from geotoken_jax.serve.levels import with_levels
from geotoken_jax.serve.limits import Capacity, Rate, Refused, ServeSettings, retry_after
from geotoken_jax.serve.metrics import Metrics


class Service:
    """A served model with its batcher, limits and metrics.

    draining: whether the service is ending. If so, it refuses new requests and answers the accepted ones.
    """

    def __init__(self, model: Model, settings: ServeSettings):
        self.settings, self.draining = settings, False
        self.metrics = Metrics(lambda: self.room.taken, lambda: self.state == "ready")
        self.batcher = Batcher(model, settings.batch_size, settings.wait_ms / 1000, self.metrics.batch)
        self.room = Capacity(settings.queue, self.batcher.wait_s)
        self._rate, self._prepare = Rate(settings.rate), model.prepare
        self._threads = ThreadPoolExecutor(settings.threads, "decode")

    @property
    def state(self) -> str:
        """The state "compiling", "ready" or "draining". Only a ready service accepts new requests."""
        return "draining" if self.draining else "ready" if self.batcher.ready else "compiling"

    @contextlib.asynccontextmanager
    async def running(self, on_failure: Callable[[], None]) -> AsyncIterator[None]:
        """Runs the batcher inside the context.

        If the batcher fails, e.g. because the model cannot be compiled, logs the error and calls `on_failure`.
        """

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled():
                logging.getLogger(__name__).critical("the model cannot be run", exc_info=task.exception())
                on_failure()

        task = asyncio.create_task(self.batcher.run())
        task.add_done_callback(ended)
        try:
            yield
        finally:
            task.cancel()
            self._threads.shutdown(wait=False, cancel_futures=True)

    async def answers(
        self, request: Request, photos: Callable[[bytes], Sequence[Any]], levels: bool = False
    ) -> list[Prediction | Failure]:
        """Returns predictions or errors for a request's photos, in order.

        Raises Refused if the service is not ready or is full, or if the request exceeds a limit or cannot be read.

        photos: function that returns the photos in the bytes of a body. levels: whether to add levels to predictions.
        """
        settings, address = self.settings, request.client.host if request.client else ""
        self.check_ready()
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.room.take(1))
            self._rate.take(address, 1)
            body = await bodies.read(request, settings.max_bytes, settings.read_s)
            read = await self._in_thread(photos, body)
            del body
            stack.enter_context(self.room.take(len(read) - 1))
            self._rate.take(address, len(read) - 1)
            return await asyncio.gather(*(self._answer(photo, levels) for photo in read))

    def check_ready(self) -> None:
        """Raises Refused if the model is not compiled yet, or if the service is ending."""
        if self.state == "compiling":
            raise Refused(503, "the model is being compiled: try again later", retry_after(5))
        if self.state == "draining":
            raise Refused(503, "the service is ending: send the request to another replica", retry_after(5))

    async def _answer(self, photo: Any, levels: bool) -> Prediction | Failure:
        try:
            prepared = await self._in_thread(self._prepared, photo)
        except ImageError as error:
            self.metrics.photos.labels("unreadable").inc()
            return Failure(bodies.sentence(error))
        prediction = await self.batcher(prepared)
        self.metrics.photos.labels("answered").inc()
        return await self._in_thread(with_levels, prediction) if levels else prediction

    def _prepared(self, photo: Any) -> Any:
        return self._prepare(bodies.decoded(photo, self.settings.max_pixels))

    def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)
