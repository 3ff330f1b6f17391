"""The Open Inference Protocol, spoken by hand; tests/tools/test_triton.py speaks it with the public client."""

import json
import struct
from typing import Any

import jsonschema
import numpy as np
import pytest

from geotoken_jax.geo.distance import THRESHOLDS_KM

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from geotoken_jax.serve import tensors
from tests.test_serve import photo, says, serving, text, wait

MODEL = "/v2/models/geotoken"
INFER = f"{MODEL}/infer"
#: $metadata_model_response of the protocol, and the tensors in it.
METADATA = {
    "type": "object",
    "required": ["name", "platform", "inputs", "outputs"],
    "properties": {
        "name": {"type": "string"},
        "versions": {"type": "array", "items": {"type": "string"}},
        "platform": {"type": "string"},
        "inputs": {"$ref": "#/$defs/tensors"},
        "outputs": {"$ref": "#/$defs/tensors"},
    },
    "$defs": {
        "tensors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "datatype", "shape"],
                "properties": {
                    "name": {"type": "string"},
                    "datatype": {"enum": ["BYTES", "UINT8", "FP64"]},
                    "shape": {"type": "array", "items": {"type": "integer", "minimum": -1}},
                },
            },
        }
    },
}


def photos(*shades: int, **changes: Any) -> dict[str, Any]:
    """Returns a request with photos as base64. changes: keys of its input that differ."""
    data = [text(photo(shade)) for shade in shades]
    return {"inputs": [{"name": "photo", "datatype": "BYTES", "shape": [len(data)], "data": data, **changes}]}


def pixels(array: np.ndarray, **changes: Any) -> dict[str, Any]:
    tensor = {"name": "pixels", "datatype": "UINT8", "shape": list(array.shape), "data": array.tolist()}
    return {"inputs": [{**tensor, **changes}]}


def binary(request: dict[str, Any], data: bytes) -> dict[str, Any]:
    """Returns the arguments of a POST with binary data after the JSON."""
    content = json.dumps(request).encode()
    return {"content": content + data, "headers": {tensors.JSON_LENGTH: str(len(content))}}


def outputs(response: Any) -> dict[str, np.ndarray]:
    """Returns the output tensors of a response, JSON or binary."""
    assert response.status_code == 200, response.text
    assert response.headers["cache-control"] == "no-store"
    length = int(response.headers.get(tensors.JSON_LENGTH, len(response.content)))
    content, rest, found = json.loads(response.content[:length]), response.content[length:], {}
    assert content["model_name"] == "geotoken" and content["model_version"] == "1"
    for tensor in content["outputs"]:
        assert tensor["datatype"] == "FP64"
        if "data" in tensor:
            array = np.array(tensor["data"])
        else:
            size = tensor["parameters"]["binary_data_size"]
            array, rest = np.frombuffer(rest[:size], "<f8"), rest[size:]
        found[tensor["name"]] = array.reshape(tensor["shape"])
    assert not rest
    return found


def test_health_and_metadata_are_those_of_the_protocol():
    with serving() as (client, _):
        for path in ("/v2/health/live", "/v2/health/ready", f"{MODEL}/ready", f"{MODEL}/versions/1/ready"):
            assert client.get(path).status_code == 200
        server = client.get("/v2").json()
        assert server["name"] == "geotoken" and server["extensions"] == ["binary_tensor_data"]
        model = client.get(MODEL).json()
        jsonschema.validate(model, METADATA)
        assert client.get(f"{MODEL}/versions/1").json() == model and model["versions"] == ["1"]
        units = {tensor["name"]: tensor["parameters"]["unit"] for tensor in model["outputs"]}
        assert units["latitude"] == "degrees" and units["radius_90_km"] == "kilometers"
        assert model["outputs"][-1]["parameters"]["thresholds_km"] == list(THRESHOLDS_KM)


def test_photos_and_pixels_are_answered_in_order_and_as_in_v1():
    with serving() as (client, _):
        shades = [20, 200, 60]
        found = outputs(client.post(INFER, json=photos(*shades)))
        one = client.post("/v1/predict", json={"photo": text(photo(20))}).json()
        assert {name: array[0].tolist() for name, array in found.items()} == {
            **{name: one[name] for name in ("latitude", "longitude", "radius_km", "radius_90_km")},
            "within": list(one["within"].values()),
        }
        assert found["latitude"].tolist() == [10, 100, 30] and found["within"].shape == (3, len(THRESHOLDS_KM))
        array = np.stack([np.full((5, 7, 3), shade, np.uint8) for shade in shades])
        flat = pixels(array, data=array.ravel().tolist())
        rest = {"name": "pixels", "datatype": "UINT8", "shape": [3, 5, 7, 3], "parameters": {"binary_data_size": 315}}
        for sent in ({"json": pixels(array)}, {"json": flat}, binary({"inputs": [rest]}, array.tobytes())):
            assert outputs(client.post(f"{MODEL}/versions/1/infer", **sent))["latitude"].tolist() == [10, 100, 30]


def test_outputs_are_sent_as_asked_for():
    with serving() as (client, _):
        files = [photo(shade) for shade in (20, 200)]
        data = b"".join(struct.pack("<I", len(file)) + file for file in files)
        asked = photos(20, 200, parameters={"binary_data_size": len(data)})
        del asked["inputs"][0]["data"]
        named = [{"name": "within"}, {"name": "latitude", "parameters": {"binary_data": True}}]
        response = client.post(INFER, **binary({**asked, "id": "some id", "outputs": named}, data))
        assert response.headers["content-type"] == "application/octet-stream" and b'"some id"' in response.content
        assert {name: array.shape for name, array in outputs(response).items()} == {"latitude": (2,), "within": (2, 5)}
        response = client.post(INFER, **binary({**asked, "parameters": {"binary_data_output": True}}, data))
        assert outputs(response)["latitude"].tolist() == [10, 100] and b'"data"' not in response.content


GRAY = np.zeros((2, 4, 4, 3), np.uint8)


@pytest.mark.parametrize(
    "sent, word",
    [
        (dict(content=b""), "not start with a JSON object"),
        (dict(content=b"[" * 100_000), "not start with a JSON object"),
        (dict(json=[]), "not start with a JSON object"),
        (dict(json={}), "exactly one known input"),
        (dict(json={"inputs": 1}), "exactly one known input"),
        (dict(json={"inputs": photos(1)["inputs"] + pixels(GRAY)["inputs"]}), "either photo or pixels"),
        (dict(json=photos(1, name="picture")), "either photo or pixels"),
        (dict(json=photos(1, name=["photo"])), "either photo or pixels"),
        (dict(json=photos(1) | {"id": 7}), "id of the request"),
        (dict(json=photos(1, datatype="FP32")), "send BYTES"),
        (dict(json=photos(1, shape=[1, 1])), "photo has the wrong shape: send [n]"),
        (dict(json=photos(1, shape=[True])), "wrong shape"),
        (dict(json=photos(1, shape="1")), "wrong shape"),
        (dict(json=photos(1, shape=[2])), "not a list of one string"),
        (dict(json=photos(1, data=[7])), "not a list of one string"),
        (dict(json=photos(1, data=None)), "not a list of one string"),
        (dict(json=photos()), "wrong shape"),
        (dict(json=photos(*[1] * 9)), "more photos than 8"),
        (dict(json=photos(1, data=["http://a.b/c.jpg"])), "photo 0 (counted from 0) cannot be read"),
        (dict(json=photos(1, 2, data=[text(photo()), text(photo()[:200])])), "photo 1 (counted from 0)"),
        (dict(json=photos(1, parameters=[])), "parameters"),
        (dict(json=photos(1, parameters={"shared_memory_region": "a"})), "shared memory"),
        (dict(json=photos(1) | {"outputs": [{"name": "city"}]}), "ask for one or more of latitude"),
        (dict(json=photos(1) | {"outputs": {"name": "city"}}), "ask for one or more of latitude"),
        (dict(json=photos(1) | {"outputs": [{"name": ["latitude"]}]}), "ask for one or more of latitude"),
        (dict(json=photos(1) | {"outputs": [{"name": "within", "parameters": {"classification": 3}}]}), "classes"),
        (dict(json=pixels(GRAY[0])), "pixels has the wrong shape: send [n, n, n, 3]"),
        (dict(json=pixels(GRAY[..., :1])), "wrong shape"),
        (dict(json=pixels(GRAY, shape=[2, 4, 5, 3])), "number of values"),
        (dict(json=pixels(GRAY, shape=[2, 2**40, 2**40, 3])), "number of values"),
        (dict(json=pixels(GRAY, data=[256] * 96)), "whole numbers from 0 to 255"),
        (dict(json=pixels(GRAY, data=[0.5] * 96)), "whole numbers from 0 to 255"),
        (dict(json=pixels(GRAY, data=[[0], [0, 1]])), "whole numbers from 0 to 255"),
        (dict(json=pixels(GRAY, data="abc")), "whole numbers from 0 to 255"),
        (binary(photos(1), b"x"), "no binary_data_size"),
        (binary(photos(1, parameters={"binary_data_size": 4}), b"abcd"), "leave out its key data"),
        (binary(pixels(GRAY), b"") | {"headers": {tensors.JSON_LENGTH: "9999"}}, "correct the header"),
        (binary(pixels(GRAY), b"") | {"headers": {tensors.JSON_LENGTH: "-1"}}, "correct the header"),
    ],
)  # fmt: skip
def test_a_request_of_another_form_is_told_what_to_send(sent, word):
    with serving(max_photos=8) as (client, model):
        assert word in says(client.post(INFER, **sent), 400)
        assert not model.batches or "photo 1" in word


def test_binary_photos_have_their_lengths():
    with serving() as (client, model):
        for data in (b"", b"abc", struct.pack("<I", 9) + b"abc", 2 * (struct.pack("<I", 1) + b"a")):
            asked = photos(1, parameters={"binary_data_size": len(data)})
            del asked["inputs"][0]["data"]
            assert "after its length in 4 bytes" in says(client.post(INFER, **binary(asked, data)), 400)
        assert not model.batches


def test_unknown_models_and_versions_are_not_found():
    with serving() as (client, _):
        for path in ("/v2/models/other", "/v2/models/other/ready"):
            assert "no model of this name: ask for geotoken" in says(client.get(path), 404)
        assert "ask for geotoken" in says(client.post("/v2/models/other/infer", json=photos(1)), 404)
        assert "ask for version 1" in says(client.get(f"{MODEL}/versions/2"), 404)
        says(client.get("/v2/repository/index"), 404)


def test_limits_hold_for_the_protocol_too(monkeypatch: pytest.MonkeyPatch):
    with serving(queue=4, max_photos=4, max_bytes=5_000, max_pixels=100, rate=20) as (client, model):
        says(client.post(INFER, content=b"x" * 5_001), 413)
        says(client.post(INFER, content=b"x", headers={"content-encoding": "gzip"}), 415)
        assert "more than 100 pixels" in says(client.post(INFER, json=pixels(np.zeros((1, 9, 12, 3), np.uint8))), 400)
        model.free.set()
        says([client.post(INFER, json=pixels(np.zeros((4, 2, 2, 3), np.uint8))) for _ in range(6)][-1], 429)
    monkeypatch.setenv("SOME_TOKEN", "right")
    with serving(token_variable="SOME_TOKEN") as (client, _):
        says(client.post(INFER, json=photos(1)), 401)
        says(client.get("/v2"), 401)
        assert client.get("/v2/health/ready").status_code == client.get(f"{MODEL}/ready").status_code == 200
        assert client.post(INFER, json=photos(1), headers={"Authorization": "Bearer right"}).status_code == 200


def test_not_ready_until_the_model_is_compiled():
    with serving(ready=False) as (client, model):
        model.free.clear()
        wait(lambda: client.get("/v2/health/live").status_code == 200)
        if client.get("/ready").status_code != 200:
            assert "compiled" in says(client.get("/v2/health/ready"), 503)
            assert "compiled" in says(client.get(f"{MODEL}/ready"), 503)
        model.free.set()
        wait(lambda: client.get("/v2/health/ready").status_code == 200)
