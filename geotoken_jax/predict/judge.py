"""The judge: a multimodal language model that looks at the photo itself, behind an OpenAI-compatible endpoint.

The judge gets the photo, the most probable candidates and the coordinates of similar photos. Depending on
config.judge.answer it chooses a candidate or gives coordinates of its own (GeoToken's paper). If it gives no usable
reply, the photo keeps the answer of its prediction, and the reason is counted. Each outcome is appended to a file of
JSON lines at once, so an interrupted run does not pay for a reply twice.
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
from jaxtyping import Float
from urllib3 import PoolManager, Retry, Timeout
from urllib3.exceptions import ConnectTimeoutError, HTTPError, MaxRetryError, ReadTimeoutError

from geotoken_jax import manifests
from geotoken_jax.backbone.preprocess import thumbnail
from geotoken_jax.manifests import StageError
from geotoken_jax.settings import Runtime, SettingsError, plain

#: config.judge.answer -> keys of the numbers in the JSON object that the model is asked for.
_ANSWERS = {"choose": ("number",), "free": ("latitude", "longitude")}
#: Number of photos in a row without a usable reply after which `Judge` raises StageError.
_MAX_FAILURES = 20
#: HTTP statuses after which a request is retried; 529 is Anthropic's status for an overloaded server.
_RETRIED = (408, 425, 429, 500, 502, 503, 504, 529)
#: Errors of servers that do not support `response_format`. Both errors may also have other causes.
_REFUSED_FORMAT = ("HTTP 400", "HTTP 422")
#: Longest wait before a retry, in seconds. It also limits the wait that a response's header Retry-After asks for.
#: Without this header, the first retry follows at once.
_LONGEST_WAIT_S = 120
#: Longest wait for a connection, in seconds. A running server accepts a connection sooner, even while its model loads.
_CONNECT_S = 10.0
_JPEG_QUALITY = 90


@dataclasses.dataclass(frozen=True)
class JudgeSettings:
    """Settings of the judge (config.judge).

    base_url: address of the endpoint, up to and including /v1; no judge if empty. model: the model's name at the
    endpoint. splits: splits whose photos are judged. photos: number of photos that are judged per split, drawn at
    random; all if 0. If it is raised later, earlier replies are kept. answer: "choose" for one of the candidates,
    "free" for any coordinates. candidates: largest number of candidates in the prompt; the most probable ones are
    listed. side: longest side of the photo that is sent, in pixels. options: more fields of the request, under the
    endpoint's names. timeout_s: seconds without data after which an attempt ends. attempts: largest number of attempts
    per request, including the first, if the endpoint is busy, broken or unreachable. concurrent: requests at a time.
    price_in: price of a million input tokens. price_out: price of a million output tokens. key_variable: name of the
    environment variable with the API key; no key is sent if empty.
    """

    base_url: Runtime[str]
    model: str
    splits: tuple[str, ...]
    photos: Runtime[int]
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
        if self.photos < 0:
            raise ValueError(f"config.judge.photos is {self.photos}: set it to a number of photos, or to 0 for all")
        if self.answer not in _ANSWERS:
            raise ValueError(f"config.judge.answer is {self.answer!r}: choose one of {', '.join(_ANSWERS)}")
        # Neither message shows the value, which may be or contain the key.
        if not re.fullmatch(r"[A-Z_][A-Z0-9_]*|", self.key_variable):
            raise ValueError(
                "config.judge.key_variable is not the name of an environment variable in capital letters: export the "
                "endpoint's key as a variable such as JUDGE_KEY, and set config.judge.key_variable to 'JUDGE_KEY'"
            )
        if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#@]*)?|", self.base_url):
            raise ValueError(
                "config.judge.base_url must be like http://localhost:8000/v1, without a password or a query: if the "
                "endpoint needs a key, export it as a variable and set config.judge.key_variable to the variable's name"
            )
        if self.base_url and not self.model:
            raise ValueError("config.judge.model is '': set it to the model's name at the endpoint")


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """The outcome of judging one photo, a line of the file of outcomes.

    place: coordinates that the model answered, in degrees; None without a usable reply. reason: reason why there is no
    usable reply; "" if there is one. replied: whether the model replied at all; if so, the photo is not sent again.
    requests: number of requests sent, retries included. retries: number of retries. seconds: time from the first
    request to the end of the last. tokens_in: number of input tokens; None if the endpoint does not report it.
    tokens_out: the same for output tokens. text: the model's reply, or the error.
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


class Question(NamedTuple):
    """A photo to judge.

    photo: encoded image file. candidates: distinct coordinates in degrees. log_probability: logarithm of the
    probability of each candidate. neighbors: coordinates of similar photos, best first. scores: score of each neighbor,
    at most 3.
    """

    id: str
    photo: bytes
    candidates: Float[np.ndarray, "n 2"]
    log_probability: Float[np.ndarray, "n"]
    neighbors: Float[np.ndarray, "m 2"]
    scores: Float[np.ndarray, "m"]


class _Result(NamedTuple):
    """Result of a request. problem: reason why the request failed; "" if it did not fail. body: the response's body, or
    the error if there is no response. retries: number of retries."""

    problem: str
    body: str
    retries: int


class _Prompt(NamedTuple):
    """A prompt about one photo.

    schema: JSON schema of the reply. answer: see JudgeSettings. coordinates: coordinates of the candidates in the
    prompt, in degrees; candidate 1 is first.
    """

    text: str
    schema: dict[str, Any]
    answer: str
    coordinates: Float[np.ndarray, "n 2"]


class _Reply(NamedTuple):
    """A chat completion. refused: whether the model or a content filter refused to reply. cut_off: whether the reply
    ended at the limit of tokens. tokens_in, tokens_out: see _Outcome."""

    text: str
    refused: bool
    cut_off: bool
    tokens_in: int | None
    tokens_out: int | None


class Judge:
    """Asks a multimodal model about the photos of one split, in any number of batches."""

    def __init__(self, settings: JudgeSettings, file: epath.Path):
        """file: JSON lines of outcomes, created if missing. Replies that an earlier run wrote there are used again.

        Raises SettingsError if config.judge.key_variable names a variable that is unset or contains no valid key.
        """
        self._settings, self._file = settings, file
        self._key = _key(settings.key_variable)
        self._http = PoolManager(
            maxsize=settings.concurrent,
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=Timeout(connect=min(_CONNECT_S, settings.timeout_s), read=settings.timeout_s),
            retries=Retry(
                settings.attempts - 1,
                allowed_methods=None,  # all methods; urllib3's default leaves out POST
                status_forcelist=_RETRIED,
                raise_on_status=False,
                backoff_factor=1.0,
                backoff_jitter=1.0,
                backoff_max=_LONGEST_WAIT_S,
                retry_after_max=_LONGEST_WAIT_S,
            ),
        )
        self._schema = True  # whether requests contain a JSON schema; False once the endpoint rejects it
        self._failures = 0  # photos in a row without a usable reply
        self._lock = threading.Lock()
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        if lines and not lines[-1].endswith("\n"):  # the last write was interrupted; its photo is sent again
            manifests.write_bytes(file, "".join(lines[:-1]).encode())
            del lines[-1]
        self._outcomes = [_Outcome(**json.loads(line)) for line in lines]
        self._replied = {outcome.id: outcome for outcome in self._outcomes if outcome.replied}

    def __call__(self, questions: Sequence[Question]) -> list[list[float] | None]:
        """Returns the coordinates that the model answers for each photo, in degrees; None without a usable reply.

        If config.judge.answer is "choose", they are the coordinates of a candidate. Raises StageError after 20 photos
        in a row without a usable reply. Earlier replies are kept in the file.
        """
        workers = ThreadPoolExecutor(self._settings.concurrent)
        try:
            futures = [workers.submit(self._outcome, question) for question in questions]
            return [future.result().place for future in futures]
        finally:
            workers.shutdown(cancel_futures=True)

    def report(self) -> dict[str, Any]:
        """Returns counts, times and costs of all outcomes in the file, including earlier runs, for JSON.

        answered: number of photos with a usable reply. fallbacks: reason -> number of photos without a usable reply for
        this reason. seconds: median and 95th percentile of the time for a reply, retries and waits included. tokens,
        cost: sums of the reported usage. without_usage: number of replies whose usage is not reported in full.
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

    def _outcome(self, question: Question) -> _Outcome:
        if question.id in self._replied:
            return self._replied[question.id]
        if self._failures >= _MAX_FAILURES:
            raise self._too_many_failures()
        outcome = self._judge(question)
        with self._lock:
            self._failures = 0 if outcome.place else self._failures + 1
            self._outcomes.append(outcome)
            with self._file.open("a") as file:
                file.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
        if self._failures >= _MAX_FAILURES:
            raise self._too_many_failures()
        return outcome

    def _too_many_failures(self) -> StageError:
        last = self._outcomes[-_MAX_FAILURES:]
        shown = next((outcome for outcome in reversed(last) if not outcome.replied), last[-1])
        text = " ".join(shown.text.split())[:200]
        problem = f"{shown.reason}{f', {text}' if text else ''}"
        if shown.replied:
            return StageError(
                f"config.judge.model is {self._settings.model!r}: the last {_MAX_FAILURES} photos got replies without "
                f"an answer (last reply: {problem}); run the same command again to go on with the next photos, or "
                f"remove {self._file.parent.parent} and set another config.judge.model or config.judge.options"
            )
        return StageError(
            f"config.judge.base_url is {self._settings.base_url!r}: the last {_MAX_FAILURES} photos got no answer from "
            f"there (last problem: {problem}); repair the endpoint or its settings, then run the same command again, "
            f"which keeps the replies in {self._file}"
        )

    def _judge(self, question: Question) -> _Outcome:
        side, prompt = self._settings.side, _prompt(question, self._settings)
        image = base64.b64encode(thumbnail(question.photo, side, _JPEG_QUALITY, side)).decode()
        content = [
            {"type": "text", "text": prompt.text},
            {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{image}"}},
        ]
        # A single user message, because some models accept no system message.
        request = {
            "model": self._settings.model,
            "messages": [{"role": "user", "content": content}],
            **plain(self._settings.options),
        }
        form = {"type": "json_schema", "json_schema": {"name": "place", "strict": True, "schema": prompt.schema}}
        start = time.monotonic()
        with_schema = self._schema
        sent = [self._send({**request, "response_format": form} if with_schema else request)]
        if with_schema and sent[0].problem in _REFUSED_FORMAT:
            sent.append(self._send(request))
            if not sent[1].problem:  # the schema was the cause of the error
                self._schema = False
        seconds = round(time.monotonic() - start, 4)
        problem, body, _ = sent[-1]
        reply = None if problem else _reply(body)
        place, reason = _answered_place(reply, prompt) if reply else (None, problem or "no chat completion")
        retries = sum(s.retries for s in sent)
        return _Outcome(
            id=question.id,
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

    def _send(self, body: dict[str, Any]) -> _Result:
        url = f"{self._settings.base_url.rstrip('/')}/chat/completions"
        try:  # no redirects: the photo must not reach another server than base_url
            response = self._http.request("POST", url, json=body, redirect=False)
        except MaxRetryError as error:
            return _Result(_problem(error.reason), self._without_key(str(error.reason)), self._settings.attempts - 1)
        except HTTPError as error:
            return _Result(_problem(error), self._without_key(str(error)), 0)
        problem = "" if response.status == 200 else f"HTTP {response.status}"
        retries = len(response.retries.history) if response.retries else 0
        return _Result(problem, self._without_key(response.data.decode(errors="replace")), retries)

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "[the key]") if self._key else text


def _key(variable: str) -> str:
    key = os.environ.get(variable, "").strip() if variable else ""
    # Any other character is invalid in a header, and the error about it would show the key.
    if variable and not re.fullmatch(r"[!-~]+", key):
        raise SettingsError(
            f"config.judge.key_variable is {variable!r}, but that variable is unset, empty, or not plain ASCII "
            f"without spaces: export {variable} with the key, or set config.judge.key_variable to '' for an endpoint "
            "that needs no key"
        )
    return key


def _prompt(question: Question, settings: JudgeSettings) -> _Prompt:
    """Returns the prompt about a photo. It lists candidates, most probable first."""
    log_p = question.log_probability
    shown = np.argsort(-log_p, kind="stable")[: settings.candidates]
    candidates, weights = question.candidates[shown], np.exp(log_p[shown] - log_p[shown[0]])
    listed = [
        f"{n}. {latitude:.5f}, {longitude:.5f} ({share:.1%})"
        for n, ((latitude, longitude), share) in enumerate(zip(candidates, weights / weights.sum(), strict=True), 1)
    ]
    neighbors = [
        f"{latitude:.5f}, {longitude:.5f} ({score / 3:.2f})"  # the mean of three cosines
        for (latitude, longitude), score in zip(question.neighbors, question.scores, strict=True)
    ]
    text = [
        "Where on Earth was this photo taken? Weigh all that tells places apart: writing and its language, buildings, "
        "roads, signs and vehicles, the side they drive on, plants, soil, landform, light, clothes.",
        "",
        "A model of photos and places proposes (latitude, longitude in degrees; its probability among these):",
        *listed,
    ]
    if neighbors:
        text += ["", "Of many photos, those most like this one were taken at (similarity, at most 1):", *neighbors]
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
    return _Prompt("\n".join(text), schema, settings.answer, candidates)


def _problem(cause: Exception | None) -> str:
    if isinstance(cause, ReadTimeoutError):
        return "timeout"
    # In urllib3 a refused connection and an unknown host are subclasses of ConnectTimeoutError.
    return "no connection" if isinstance(cause, ConnectTimeoutError) else "broken connection"


def _reply(body: str) -> _Reply | None:
    """Returns the chat completion in a response's body, of any content type; None if the body has none."""
    try:
        completion = json.loads(body)
        choice = completion["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        refusal, text = message.get("refusal"), message.get("content")
        usage = completion.get("usage") or {}
        tokens = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None
    tokens_in, tokens_out = (n if type(n) is int and n >= 0 else None for n in tokens)
    refused = bool(refusal) or finish == "content_filter"
    return _Reply(str(refusal or text or ""), refused, finish == "length", tokens_in, tokens_out)


def _answered_place(reply: _Reply, prompt: _Prompt) -> tuple[list[float] | None, str]:
    """Returns the coordinates that a reply chooses and "", or None and the reason why the reply is unusable."""
    values = None if reply.refused else _last_object(reply.text, _ANSWERS[prompt.answer])
    if values is None:
        if reply.cut_off and not reply.refused:
            return None, "cut off"
        return None, "broken JSON" if "{" in reply.text and not reply.refused else "refusal"
    try:
        numbers = [_number(value) for value in values]
    except (TypeError, ValueError, OverflowError):
        return None, "broken JSON"
    if prompt.answer == "choose":
        if numbers[0] not in range(1, 1 + len(prompt.coordinates)):
            return None, "no such candidate"
        return prompt.coordinates[int(numbers[0]) - 1].tolist(), ""
    latitude, longitude = numbers
    if not (abs(latitude) <= 90 and abs(longitude) <= 180):
        return None, "off the Earth"
    return [latitude, longitude], ""


def _last_object(text: str, names: Sequence[str]) -> list[Any] | None:
    """Returns the values of `names` in the last outermost JSON object that has them all; None if no object has.

    A code fence around the object, and reasoning before it, do not matter.
    """
    values, at = None, text.find("{")
    while at >= 0:
        try:
            value, end = json.JSONDecoder().raw_decode(text, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            if all(name in value for name in names):
                values = [value[name] for name in names]
        at = text.find("{", end)
    return values


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError(f"{value} is not a number")
    return float(value)
