"""The endpoints of the Open Inference Protocol (version 2 of KServe, Triton and Seldon)."""

import dataclasses
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from geotoken_jax import __version__
from geotoken_jax.predict.prediction import Prediction
from geotoken_jax.serve import tensors
from geotoken_jax.serve.answers import Failure
from geotoken_jax.serve.limits import Refused
from geotoken_jax.serve.service import Service

#: Name of the model in the protocol's URLs.
MODEL = "geotoken"


def add(app: FastAPI, service: Service, version: str, guard: list[Any]) -> None:
    """Adds the protocol's endpoints to an application.

    The endpoints are not in the application's OpenAPI document, because OpenAPI cannot describe binary tensor data. The
    protocol has its own specification, linked in `tensors`.

    version: version of the model. guard: dependencies of the endpoints that require the token.
    """
    model = "/v2/models/{name}"
    hidden: Any = {"include_in_schema": False}

    @app.get("/v2/health/live", **hidden)
    async def live() -> Response:
        return Response()

    @app.get("/v2/health/ready", **hidden)
    async def ready() -> Response:
        service.check_ready()
        return Response()

    @app.get("/v2", dependencies=guard, **hidden)
    async def server() -> Response:
        return JSONResponse({"name": "geotoken", "version": __version__, "extensions": ["binary_tensor_data"]})

    @app.get(f"{model}/ready", **hidden)
    @app.get(f"{model}/versions/{{asked}}/ready", **hidden)
    async def model_ready(name: str, asked: str = version) -> Response:
        _check_model(name, asked, version)
        service.check_ready()
        return Response()

    @app.get(model, dependencies=guard, **hidden)
    @app.get(f"{model}/versions/{{asked}}", dependencies=guard, **hidden)
    async def metadata(name: str, asked: str = version) -> Response:
        _check_model(name, asked, version)
        inputs, outputs = ([dataclasses.asdict(t) for t in ts] for ts in (tensors.INPUTS, tensors.OUTPUTS))
        return JSONResponse(
            {"name": MODEL, "versions": [version], "platform": "jax", "inputs": inputs, "outputs": outputs}
        )

    @app.post(f"{model}/infer", dependencies=guard, **hidden)
    @app.post(f"{model}/versions/{{asked}}/infer", dependencies=guard, **hidden)
    async def infer(request: Request, name: str, asked: str = version) -> Response:
        _check_model(name, asked, version)
        read = tensors.InferenceRequest(request.headers.get(tensors.JSON_LENGTH), service.settings.max_photos)
        answers = await service.answers(request, read.photos)
        body, headers = read.response(_predictions(answers), {"model_name": MODEL, "model_version": version})
        return Response(body, headers={**headers, "Cache-Control": "no-store"})


def _check_model(name: str, asked: str, version: str) -> None:
    if name != MODEL:
        raise Refused(404, f"there is no model of this name: ask for {MODEL}")
    if asked != version:
        raise Refused(
            404, f"there is no such version of the model: ask for version {version}, or leave out the version"
        )


def _predictions(answers: list[Prediction | Failure]) -> list[Prediction]:
    """Returns the answers if all of them are predictions. Otherwise raises Refused with the first error.

    A response cannot have an error for one photo and predictions for the others, because a tensor has no gaps.
    """
    for number, answer in enumerate(answers):
        if isinstance(answer, Failure):
            raise Refused(400, f"photo {number} (counted from 0) cannot be read: {answer.error}")
    return [answer for answer in answers if isinstance(answer, Prediction)]
