"""A judge: a multimodal language model, behind any OpenAI-compatible endpoint, that looks at the photo itself.

It is shown the photo, the most probable candidates and where similar photos were taken, and either chooses a candidate
or names a coordinate of its own (GeoToken's paper). Whatever it does not answer is answered by the
candidate given as fallback, and counted under a reason. Every outcome is on record in a file of JSON lines as soon as
it is known, so that no reply is paid for twice.
"""

import base64
import dataclasses
import json
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float, Int
from urllib3 import PoolManager, Retry, Timeout
from urllib3.exceptions import ConnectTimeoutError, HTTPError, MaxRetryError, ReadTimeoutError

from geotoken_jax import workdir
from geotoken_jax.backbone.preprocess import thumbnail
from geotoken_jax.geo.distance import great_circle_km
from geotoken_jax.predict.pool import Pool
from geotoken_jax.settings import Runtime, SettingsError, plain
from geotoken_jax.workdir import StageError

#: Kind of answer -> the numbers that its JSON has.
_ANSWERS = {"choose": ("number",), "free": ("latitude", "longitude")}
#: Photos in a row without a reply after which the endpoint is given up.
_HOPELESS = 20
#: Statuses that another attempt may mend; 529 is Anthropic's word for overloaded.
_PASSING = (408, 425, 429, 500, 502, 503, 504, 529)
#: What servers say to a `response_format` that they do not know; a 400 may have other causes too.
_REFUSED_FORMAT = ("HTTP 400", "HTTP 422")
#: Longest wait between two attempts, whatever Retry-After says; the first retry of all is at once, without one.
_LONGEST_WAIT_S = 120
#: A server that is there accepts within this, even while its model loads.
_CONNECT_S = 10.0
_JPEG_QUALITY = 90


@dataclasses.dataclass(frozen=True)
class JudgeSettings:
    """base_url: of the endpoint, up to and with /v1; "" for no judge. model: its name there. splits: that are judged.
    answer: "choose" one of the candidates, or "free", any coordinate. candidates: shown, the most probable ones. side:
    longest of the photo that is sent, in pixels. options: further fields of the request, as the endpoint names them.
    timeout_s: silence after which an attempt is given up. attempts: at a photo, the first included, where the endpoint
    is busy, broken or not there. concurrent: requests at a time. price_in, price_out: of a million tokens read and
    written. key_variable: name of the environment variable that holds the key, "" for an endpoint without one."""

    base_url: Runtime[str]
    model: str
    splits: tuple[str, ...]
    answer: str
    candidates: int
    side: int
    options: Mapping[str, Any]
    timeout_s: Runtime[float]
    attempts: Runtime[int]
    concurrent: Runtime[int]
    price_in: Runtime[float]
    price_out: Runtime[float]
    key_variable: Runtime[str]

    def __post_init__(self):
        for key in ("candidates", "side", "timeout_s", "attempts", "concurrent"):
            if getattr(self, key) <= 0:
                raise ValueError(f"config.judge.{key} is {getattr(self, key)}: it must be above 0")
        if self.answer not in _ANSWERS:
            raise ValueError(f"config.judge.answer is {self.answer!r}: choose one of {', '.join(_ANSWERS)}")
        # Neither message shows the value: it may be the key.
        if not re.fullmatch(r"[A-Z_][A-Z0-9_]*|", self.key_variable):
            raise ValueError(
                "config.judge.key_variable is not the name of an environment variable, in capital letters: export the "
                "key under such a name, and give that name here"
            )
        if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#@]*)?|", self.base_url):
            raise ValueError(
                "config.judge.base_url must be like http://localhost:8000/v1, without a password or a query: export "
                "the key, see config.judge.key_variable"
            )
        if self.base_url and not self.model:
            raise ValueError("config.judge.model is '': name the model that the endpoint is to use")


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """What came of a photo, as its line in the file has it.

    place: degrees, None where the fallback answers; reason: why it does, "" otherwise. replied: the model said
    something, which is not asked again. requests: sent, with retries. seconds: from the first request to the end.
    tokens_in, tokens_out: None where the endpoint does not say. text: the model's words, or what went wrong.
    """

    id: str
    place: list[float] | None
    reason: str
    replied: bool
    requests: int
    retries: int
    seconds: float
    tokens_in: int | None
    tokens_out: int | None
    text: str


class _Sent(NamedTuple):
    """A request's end. problem: why there is no body of a reply, "" if there is. body: or what is known of why."""

    problem: str
    body: str
    retries: int


class _Question(NamedTuple):
    """What is asked of a photo. places: of the candidates as they are numbered from 1, in degrees."""

    text: str
    schema: dict[str, Any]
    answer: str
    places: Float[np.ndarray, "n 2"]


class _Reply(NamedTuple):
    """A chat completion. cut_off: it reached its longest. tokens_in, tokens_out: None where it does not say."""

    text: str
    refused: bool
    cut_off: bool
    tokens_in: int | None
    tokens_out: int | None


class Judge:
    """The selector that asks; of one split, from any number of batches."""

    def __init__(self, settings: JudgeSettings, file: epath.Path):
        """file: of JSON lines, where outcomes are kept; what an earlier start was answered is taken from there.

        Raises SettingsError if the key is not in the environment.
        """
        self._settings, self._file = settings, file
        self._key = _key(settings.key_variable)
        self._http = PoolManager(
            maxsize=settings.concurrent,
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=Timeout(connect=min(_CONNECT_S, settings.timeout_s), read=settings.timeout_s),
            retries=Retry(
                settings.attempts - 1,
                allowed_methods=None,  # any: a question may be asked twice
                status_forcelist=_PASSING,
                raise_on_status=False,
                backoff_factor=1.0,
                backoff_jitter=1.0,
                backoff_max=_LONGEST_WAIT_S,
                retry_after_max=_LONGEST_WAIT_S,
            ),
        )
        self._schema = True  # the endpoint takes one, as far as is known
        self._in_vain = 0  # photos in a row without a reply
        self._lock = threading.Lock()
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        if lines and not lines[-1].endswith("\n"):  # cut off while it was written
            workdir.write_bytes(file, "".join(lines[:-1]).encode())
            del lines[-1]
        self._outcomes = [_Outcome(**json.loads(line)) for line in lines]
        self._replied = {outcome.id: outcome for outcome in self._outcomes if outcome.replied}

    def __call__(
        self, ids: Sequence[str], photos: Sequence[bytes], pool: Pool, fallback: Int[np.ndarray, " b"]
    ) -> Int[np.ndarray, " b"] | Float[np.ndarray, "b 2"]:
        """Returns of b photos the index of the candidate chosen or, of free answers, coordinates in degrees.

        photos: encoded files. fallback: index of the candidate that answers where the judge does not.
        Raises StageError once 20 photos in a row got no reply: what was answered until then is kept.
        """
        workers = ThreadPoolExecutor(self._settings.concurrent)
        try:
            asked = [workers.submit(self._outcome, ids[i], photos[i], pool, i) for i in range(len(ids))]
            places = [future.result().place for future in asked]
        finally:
            workers.shutdown(cancel_futures=True)
        if self._settings.answer == "free":
            found = pool.coordinates[np.arange(len(ids)), fallback]
            for i, place in enumerate(places):
                found[i] = place or found[i]
            return found
        chosen = np.array(fallback)
        for i, place in enumerate(places):
            if place:
                chosen[i] = np.argmin(great_circle_km(*place, *pool.coordinates[i].T))
        return chosen

    def report(self) -> dict[str, Any]:
        """Returns what came of all photos on record, as JSON has it, whichever start they were asked in.

        seconds: of photos that got a reply, their retries and waits included. tokens, cost: of the replies that tell
        their usage; without_usage: of the others, how many.
        """
        last = {outcome.id: outcome for outcome in self._outcomes}.values()
        replies = [outcome for outcome in self._outcomes if outcome.replied]
        median, p95 = np.percentile([r.seconds for r in replies], (50, 95)).tolist() if replies else (None, None)
        tokens_in, tokens_out = (sum(getattr(r, name) or 0 for r in replies) for name in ("tokens_in", "tokens_out"))
        prices = self._settings.price_in, self._settings.price_out
        return {
            "model": self._settings.model,
            "answer": self._settings.answer,
            "photos": len(last),
            "answered": sum(outcome.place is not None for outcome in last),
            "fallbacks": dict(sorted(Counter(outcome.reason for outcome in last if outcome.reason).items())),
            "requests": sum(outcome.requests for outcome in self._outcomes),
            "retries": sum(outcome.retries for outcome in self._outcomes),
            "seconds": {"median": median, "p95": p95},
            "tokens": {"in": tokens_in, "out": tokens_out},
            "without_usage": sum(None in (r.tokens_in, r.tokens_out) for r in replies),
            "cost": round((tokens_in * prices[0] + tokens_out * prices[1]) / 1e6, 6),
        }

    def _outcome(self, photo_id: str, photo: bytes, pool: Pool, i: int) -> _Outcome:
        if photo_id in self._replied:
            return self._replied[photo_id]
        if self._in_vain >= _HOPELESS:
            raise self._hopeless()
        outcome = self._ask(photo_id, photo, _question(pool, i, self._settings))
        with self._lock:
            self._in_vain = 0 if outcome.replied else self._in_vain + 1
            self._outcomes.append(outcome)
            with self._file.open("a") as file:
                file.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
        if self._in_vain >= _HOPELESS:
            raise self._hopeless()
        return outcome

    def _hopeless(self) -> StageError:
        last = next(outcome for outcome in reversed(self._outcomes) if not outcome.replied)
        said = " ".join(last.text.split())[:200]
        return StageError(
            f"the judge at config.judge.base_url = {self._settings.base_url!r} gave no reply to {_HOPELESS} photos in "
            f"a row, to the last because of {last.reason}{f' ({said})' if said else ''}: see to it, then run the same "
            f"command again, which asks for what {self._file} does not hold"
        )

    def _ask(self, photo_id: str, photo: bytes, question: _Question) -> _Outcome:
        side = self._settings.side
        image = base64.b64encode(thumbnail(photo, side, _JPEG_QUALITY, side)).decode()
        content = [
            {"type": "text", "text": question.text},
            {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{image}"}},
        ]
        # One message of the user: some models know no system's.
        plainly = {
            "model": self._settings.model,
            "messages": [{"role": "user", "content": content}],
            **plain(self._settings.options),
        }
        form = {"type": "json_schema", "json_schema": {"name": "place", "strict": True, "schema": question.schema}}
        start = time.monotonic()
        with_schema = self._schema
        sent = [self._send({**plainly, "response_format": form} if with_schema else plainly)]
        if with_schema and sent[0].problem in _REFUSED_FORMAT:
            sent.append(self._send(plainly))
            if not sent[1].problem:  # so it was the schema
                self._schema = False
        seconds = round(time.monotonic() - start, 4)
        problem, body, _ = sent[-1]
        reply = None if problem else _reply(body)
        place, reason = _place(reply, question) if reply else (None, problem or "no chat completion")
        retries = sum(s.retries for s in sent)
        return _Outcome(
            id=photo_id,
            place=place,
            reason=reason,
            replied=reply is not None,
            requests=len(sent) + retries,
            retries=retries,
            seconds=seconds,
            tokens_in=reply.tokens_in if reply else None,
            tokens_out=reply.tokens_out if reply else None,
            text=reply.text if reply else body[:300],
        )

    def _send(self, body: dict[str, Any]) -> _Sent:
        url = f"{self._settings.base_url.rstrip('/')}/chat/completions"
        try:  # without redirects: a photo goes where it is sent, and nowhere else
            response = self._http.request("POST", url, json=body, redirect=False)
        except MaxRetryError as error:
            return _Sent(_problem(error.reason), self._without_key(str(error.reason)), self._settings.attempts - 1)
        except HTTPError as error:
            return _Sent(_problem(error), self._without_key(str(error)), 0)
        problem = "" if response.status == 200 else f"HTTP {response.status}"
        retries = len(response.retries.history) if response.retries else 0
        return _Sent(problem, self._without_key(response.data.decode(errors="replace")), retries)

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "[the key]") if self._key else text


def _key(variable: str) -> str:
    key = os.environ.get(variable, "").strip() if variable else ""
    # A header of anything else would be an error that shows it.
    if variable and not re.fullmatch(r"[!-~]+", key):
        raise SettingsError(
            f"config.judge.key_variable is {variable!r}, and the environment has no key of plain characters there: "
            f"export {variable}, or set config.judge.key_variable to '' for an endpoint without a key"
        )
    return key


def _question(pool: Pool, i: int, settings: JudgeSettings) -> _Question:
    """Returns what is asked of photo i, with its distinct candidates by falling log-probability."""
    log_p = pool.candidates.log_probability[i].astype(np.float64)
    best_first = np.argsort(-log_p, kind="stable")
    _, first = np.unique(pool.coordinates[i][best_first], axis=0, return_index=True)
    shown = best_first[np.sort(first)][: settings.candidates]
    weights = np.exp(log_p[shown] - log_p[shown[0]])
    listed = [
        f"{n}. {latitude:.5f}, {longitude:.5f} ({share:.1%})"
        for n, ((latitude, longitude), share) in enumerate(
            zip(pool.coordinates[i][shown], weights / weights.sum(), strict=True), 1
        )
    ]
    near = [
        f"{latitude:.5f}, {longitude:.5f} ({score / 3:.2f})"  # the mean of three cosines
        for (latitude, longitude), score in zip(pool.neighbor_coordinates[i], pool.neighbor_scores[i], strict=True)
    ][: int(pool.neighbor_count[i])]
    text = [
        "Where on Earth was this photo taken? Weigh all that tells places apart: writing and its language, buildings, "
        "roads, signs and vehicles, the side they drive on, plants, soil, landform, light, clothes.",
        "",
        "A model of photos and places proposes (latitude, longitude in degrees; its probability among these):",
        *listed,
    ]
    if near:
        text += ["", "Of many photos, those most like this one were taken at (similarity, at most 1):", *near]
    text += ["", "Both may be wrong: trust what you see."]
    if settings.answer == "choose":
        properties = {"number": {"type": "integer", "enum": list(range(1, 1 + len(shown)))}}
        text.append('Give the number of the proposal nearest to the true place, as JSON alone: {"number": N}')
    else:
        properties = {name: {"type": "number"} for name in _ANSWERS["free"]}
        text.append(
            "Give your best estimate, which may be a place not listed, in decimal degrees, north and east positive, as "
            'JSON alone: {"latitude": Y, "longitude": X}'
        )
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return _Question("\n".join(text), schema, settings.answer, pool.coordinates[i][shown])


def _problem(cause: Exception | None) -> str:
    if isinstance(cause, ReadTimeoutError):
        return "timeout"
    # A refused connection and an unknown host are kinds of ConnectTimeoutError to urllib3.
    return "no connection" if isinstance(cause, ConnectTimeoutError) else "broken connection"


def _reply(body: str) -> _Reply | None:
    """Returns the chat completion that a response's body is, whatever type it is said to be of; None if it is none."""
    try:
        found = json.loads(body)
        choice = found["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        refusal, text = message.get("refusal"), message.get("content")
        usage = found.get("usage") or {}
        tokens = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None
    tokens_in, tokens_out = (n if type(n) is int and n >= 0 else None for n in tokens)
    refused = bool(refusal) or finish == "content_filter"
    return _Reply(str(refusal or text or ""), refused, finish == "length", tokens_in, tokens_out)


def _place(reply: _Reply, question: _Question) -> tuple[list[float] | None, str]:
    """Returns the place that a reply names, or None and the reason why it is no answer."""
    found = None if reply.refused else _last_object(reply.text, _ANSWERS[question.answer])
    if found is None:
        if reply.cut_off and not reply.refused:
            return None, "cut off"
        return None, "broken JSON" if "{" in reply.text and not reply.refused else "refusal"
    try:
        numbers = [_number(value) for value in found]
    except (TypeError, ValueError, OverflowError):
        return None, "broken JSON"
    if question.answer == "choose":
        if numbers[0] not in range(1, 1 + len(question.places)):
            return None, "no such candidate"
        return question.places[int(numbers[0]) - 1].tolist(), ""
    latitude, longitude = numbers
    if not (abs(latitude) <= 90 and abs(longitude) <= 180):
        return None, "off the Earth"
    return [latitude, longitude], ""


def _last_object(text: str, names: Sequence[str]) -> list[Any] | None:
    """Returns the values of the last JSON object in a text that has all the names: fences, and thoughts before it, do
    not matter."""
    found, at = None, text.find("{")
    while at >= 0:
        try:
            value, end = json.JSONDecoder().raw_decode(text, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            if all(name in value for name in names):
                found = [value[name] for name in names]
        at = text.find("{", end)
    return found


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError("true is no number")
    return float(value)
