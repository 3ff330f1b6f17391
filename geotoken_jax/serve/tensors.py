"""Reads requests and writes responses of the Open Inference Protocol (version 2).

Tensors are either in the JSON of a body, or in KServe's binary format after the JSON. Specification:
https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol
"""

import dataclasses
import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Num, UInt8

from geotoken_jax.geo.distance import THRESHOLDS_KM
from geotoken_jax.predict.prediction import Prediction
from geotoken_jax.serve.limits import Refused

#: HTTP header with the number of bytes of JSON at the start of a body. Binary tensor data follows the JSON.
JSON_LENGTH = "Inference-Header-Content-Length"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """The declaration of one input or output of the model.

    shape: size per axis; -1 stands for any size. parameters: description and unit, for clients.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: Mapping[str, Any]


def _input(name: str, datatype: str, shape: tuple[int, ...], description: str) -> Tensor:
    return Tensor(name, datatype, shape, {"description": description, "optional": True})


#: The inputs of the model. A request has exactly one of them.
INPUTS = (
    _input("photo", "BYTES", (-1,), "encoded image files (JPEG, PNG, WebP, ...); in JSON as base64"),
    _input("pixels", "UINT8", (-1, -1, -1, 3), "decoded photos of one size: RGB, as [photo, row, column, channel]"),
)
_KM = {"unit": "kilometers"}
OUTPUTS = (
    Tensor("latitude", "FP64", (-1,), {"unit": "degrees", "description": "latitude of the answer, WGS 84"}),
    Tensor("longitude", "FP64", (-1,), {"unit": "degrees", "description": "longitude of the answer, WGS 84"}),
    Tensor("radius_km", "FP64", (-1,), {**_KM, "description": "radius that contains 50 % of the probability"}),
    Tensor("radius_90_km", "FP64", (-1,), {**_KM, "description": "radius that contains 90 % of the probability"}),
    Tensor(
        "within", "FP64", (-1, len(THRESHOLDS_KM)),
        {
            "unit": "probability",
            "description": "probability that the answer is at most this far off, per threshold",
            "thresholds_km": list(THRESHOLDS_KM),
        },
    ),
)  # fmt: skip
_DTYPES = {"FP64": np.dtype("<f8")}


class InferenceRequest:
    """Reads one inference request and writes its response.

    Call `photos` before `response`: it also reads the request's id and the outputs that the request asks for.
    """

    def __init__(self, json_length: str | None, max_photos: int):
        """json_length: value of the header JSON_LENGTH; if None, the whole body is JSON. max_photos: largest number of
        photos per request.
        """
        self._json_length, self._max_photos = json_length, max_photos
        self.id: str | None = None
        #: Name of each requested output -> whether it is sent as binary data.
        self.outputs: dict[str, bool] = {}

    def photos(self, body: bytes) -> Sequence[str | bytes | UInt8[np.ndarray, "h w 3"]]:
        """Returns the photos in the body. Raises Refused if the body is invalid or has too many photos."""
        content, binary = self._split(body)
        if not isinstance(content.get("id", ""), str):
            raise _bad_request("the id of the request is not a string: send it as a string")
        self.id = content.get("id")
        self.outputs = _requested_outputs(content)
        given = content.get("inputs")
        names = [tensor.get("name") if isinstance(tensor, dict) else None for tensor in _list_or_empty(given)]
        known = [tensor.name for tensor in INPUTS]
        if len(names) != 1 or names[0] not in known:
            raise _bad_request(f"the request does not have exactly one known input: send either {' or '.join(known)}")
        assert isinstance(given, list)
        return list(_photos(INPUTS[known.index(names[0])], given[0], binary, self._max_photos))

    def response(self, predictions: Sequence[Prediction], head: Mapping[str, Any]) -> tuple[bytes, dict[str, str]]:
        """Returns the body and the headers of the response. head: name and version of the model, as JSON keys."""
        values, tensors, blobs = _values(predictions), [], []
        for output in OUTPUTS:
            if output.name not in self.outputs:
                continue
            array = np.asarray(values[output.name], _DTYPES[output.datatype])
            tensor: dict[str, Any] = {"name": output.name, "datatype": output.datatype, "shape": array.shape}
            if self.outputs[output.name]:
                blobs.append(array.tobytes())
                tensor["parameters"] = {"binary_data_size": len(blobs[-1])}
            else:
                tensor["data"] = array.ravel().tolist()
            tensors.append(tensor)
        content = {**head, **({} if self.id is None else {"id": self.id}), "outputs": tensors}
        text = json.dumps(content, allow_nan=False).encode()
        if not blobs:
            return text, {"Content-Type": "application/json"}
        return text + b"".join(blobs), {"Content-Type": "application/octet-stream", JSON_LENGTH: str(len(text))}

    def _split(self, body: bytes) -> tuple[dict[str, Any], bytes]:
        """Returns the JSON of a body, and the binary data after it."""
        length = len(body)
        if self._json_length is not None:
            length = int(self._json_length) if self._json_length.isdecimal() else -1
        if not 0 <= length <= len(body):
            raise _bad_request(
                f"{JSON_LENGTH} is not the length of the JSON at the start of the body: correct the header"
            )
        try:
            content = json.loads(body[:length])
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            raise _bad_request(
                "the body does not start with a JSON object: send one, and its length in the header "
                f"{JSON_LENGTH} if data follows"
            )
        return content, body[length:]


def _bad_request(sentence: str) -> Refused:
    return Refused(400, sentence)


def _list_or_empty(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _parameters(content: Mapping[str, Any]) -> Mapping[str, Any]:
    found = content.get("parameters", {})
    if not isinstance(found, dict):
        raise _bad_request("parameters is not a JSON object: send it as an object, or leave it out")
    if any(str(name).startswith("shared_memory") for name in found):
        raise _bad_request("shared memory is not supported: send the data in the request")
    return found


def _requested_outputs(content: Mapping[str, Any]) -> dict[str, bool]:
    """Returns the name of each requested output, and whether it is sent as binary data.

    If the request names no outputs, all outputs are returned.
    """
    known = [tensor.name for tensor in OUTPUTS]
    binary = _parameters(content).get("binary_data_output", False) is True
    asked = content.get("outputs")
    if asked is None or asked == []:
        return dict.fromkeys(known, binary)
    outputs = {}
    for output in _list_or_empty(asked) or [None]:
        if not isinstance(output, dict) or output.get("name") not in known:
            raise _bad_request(f"the request asks for an unknown output: ask for one or more of {', '.join(known)}")
        parameters = _parameters(output)
        if parameters.get("classification"):
            raise _bad_request("outputs have no classes: leave out the parameter classification")
        outputs[output["name"]] = parameters.get("binary_data", binary) is True
    return outputs


def _photos(declared: Tensor, given: Mapping[str, Any], binary: bytes, max_photos: int) -> list[Any] | np.ndarray:
    name, shape = declared.name, given.get("shape")
    if given.get("datatype") != declared.datatype:
        raise _bad_request(f"{name} has the wrong datatype: send {declared.datatype}")
    if (
        not isinstance(shape, list)
        or not all(type(size) is int and size > 0 for size in shape)
        or len(shape) != len(declared.shape)
        or any(size not in (-1, found) for size, found in zip(declared.shape, shape, strict=True))
    ):
        wanted = ", ".join("n" if size == -1 else str(size) for size in declared.shape)
        raise _bad_request(f"{name} has the wrong shape: send [{wanted}], each n a positive number")
    if shape[0] > max_photos:
        raise _bad_request(f"there are more photos than {max_photos}: send the others in another request")
    size = _parameters(given).get("binary_data_size")
    if size is None:
        if binary:
            raise _bad_request(
                f"there is binary data after the JSON, but {name} has no binary_data_size: add this parameter to {name}"
            )
        read = _strings_from_json if declared.datatype == "BYTES" else _pixels_from_json
        return read(name, given.get("data"), shape)
    if size != len(binary) or "data" in given:
        raise _bad_request(
            f"the JSON is followed by {len(binary)} bytes, which must all be data of {name}: set its binary_data_size "
            "to this number, and leave out its key data"
        )
    return (_strings_from_binary if declared.datatype == "BYTES" else _pixels_from_binary)(name, binary, shape)


def _strings_from_binary(name: str, binary: bytes, shape: Sequence[int]) -> list[bytes]:
    """Returns the elements of a BYTES tensor. Before each element is its length, a little-endian number of 4 bytes."""
    elements, at = [], 0
    while at + 4 <= len(binary) and len(elements) < shape[0]:
        (size,) = struct.unpack_from("<I", binary, at)
        elements.append(binary[at + 4 : at + 4 + size])
        at += 4 + size
    if at != len(binary) or len(elements) != shape[0]:
        raise _bad_request(
            f"the binary data of {name} does not match its shape: send each photo after its length in 4 bytes, "
            "little-endian"
        )
    return elements


def _strings_from_json(name: str, data: Any, shape: Sequence[int]) -> list[str]:
    if len(_list_or_empty(data)) != shape[0] or not all(isinstance(element, str) for element in data):
        raise _bad_request(
            f"the data of {name} is not a list of one string per photo: send each photo as a base64 string"
        )
    return data


def _pixels_from_binary(name: str, binary: bytes, shape: Sequence[int]) -> UInt8[np.ndarray, "n h w 3"]:
    return _shaped(name, np.frombuffer(binary, np.uint8), shape)


def _pixels_from_json(name: str, data: Any, shape: Sequence[int]) -> UInt8[np.ndarray, "n h w 3"]:
    try:
        array = np.array(data)
    except (ValueError, RecursionError):  # lists of different lengths, or nested too deeply
        array = np.array(None)
    if array.dtype.kind not in "iu" or array.min(initial=0) < 0 or array.max(initial=0) > 255:
        raise _bad_request(
            f"the data of {name} is not whole numbers from 0 to 255: send them flat, or nested like the shape"
        )
    return _shaped(name, array.astype(np.uint8), shape)


def _shaped(name: str, array: Num[np.ndarray, "..."], shape: Sequence[int]) -> Any:
    try:
        return array.reshape(shape)
    except (ValueError, OverflowError):
        raise _bad_request(
            f"the number of values of {name} does not match its shape {shape}: correct the data or the shape"
        ) from None


def _values(predictions: Sequence[Prediction]) -> dict[str, list[Any]]:
    """Returns the values of each output, by name, in the order of the predictions."""
    names = [tensor.name for tensor in OUTPUTS if tensor.name != "within"]
    values: dict[str, list[Any]] = {name: [getattr(p, name) for p in predictions] for name in names}
    return {**values, "within": [[p.within[km] for km in THRESHOLDS_KM] for p in predictions]}
