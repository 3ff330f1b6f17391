"""The judge against a test server that answers well, badly, slowly or not at all."""

import base64
import io
import json
import logging
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from geotoken_jax import settings
from geotoken_jax.manifests import StageError
from geotoken_jax.predict.judge import Judge, JudgeSettings, Question

KEY = "sk-Secret0123456789"
SECTION = dict(
    base_url="", model="looker", splits=("test",), photos=0, answer="choose", candidates=3, side=48, options=dict(),
    timeout_s=5.0, attempts=2, concurrent=4, price_in=2.0, price_out=10.0, key_variable="",
)  # fmt: skip
#: Candidates of every photo. In order of falling log-probability the list is 3, 0, 2, 1, 4.
COORDINATES = np.array([[10.0, 20.0], [0.0, 0.0], [-33.5, 151.25], [48.85837, 2.29448], [70.0, -150.0]])
LOG_P = np.array([-2.0, -8.0, -4.0, -1.0, -9.0])
LISTED = [3, 0, 2]


def question(name: str, image: bytes) -> Question:
    neighbors = np.array([[48.9, 2.3], [41.9, 12.5]])
    return Question(name, image, COORDINATES, LOG_P, neighbors, np.array([2.7, 1.5]))


def photo(number: int) -> bytes:
    """A gray photo whose gray value is its number. Its file contains metadata that must not be sent."""
    image, exif, file = Image.new("RGB", (96, 64), (8 * number,) * 3), Image.Exif(), io.BytesIO()
    exif[0x010E] = "SECRET-PLACE"
    exif.get_ifd(0x8825)[1] = "N"
    image.save(file, "JPEG", exif=exif, comment=b"SECRET-PLACE", quality=95)
    return file.getvalue()


def number_in(body: dict) -> int:
    """Returns the number of the photo that a request shows."""
    return round(np.asarray(image_in(body)).mean() / 8)


def image_in(body: dict) -> Image.Image:
    url = body["messages"][0]["content"][1]["image_url"]["url"]
    return Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))))


def says(text, finish="stop", **message):
    """Returns a server's response: status, headers, body."""
    choice = {"message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
    body = {"choices": [choice], "usage": {"prompt_tokens": 1000, "completion_tokens": 10}}
    return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()


def refuses(status, **headers):
    return status, headers, b'{"error": "not today"}'


class Server(ThreadingHTTPServer):
    """Responds with behave(body, n), where n counts requests. For None it closes the connection amid a response."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, behave):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave, self.bodies, self.headers, self.times = behave, [], [], []
        self.lock, self.released = threading.Lock(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            n = len(self.server.bodies)
            self.server.bodies.append(body)
            self.server.headers.append(dict(self.headers))
            self.server.times.append(time.monotonic())
        status, headers, data = self.server.behave(body, n) or (200, {"Content-Length": "1000"}, b'{"choices"')
        try:
            self.send_response(status if self.path == "/v1/chat/completions" else 404)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(data)
        except BrokenPipeError:
            pass  # the client has closed the connection

    def log_message(self, *args):
        pass


@pytest.fixture
def serve():
    """Returns a function that starts a server. All servers are stopped at the end."""
    servers = []

    def start(behave):
        servers.append(server := Server(behave))
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return server

    yield start
    for server in servers:
        server.released.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def nowhere():
    """An address without a server."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}/v1"


def options(url: str, **changes) -> JudgeSettings:
    return settings.read(JudgeSettings, ConfigDict({**SECTION, "base_url": url, **changes}), "judge")


def ask(judge: Judge, b: int, first: int = 0) -> np.ndarray:
    """Returns the index of the candidate that is chosen for each of b photos, 4 if the reply is not usable."""
    answers = judge([question(f"photo-{n}", photo(n)) for n in range(first, first + b)])
    return np.array([4 if place is None else np.flatnonzero((COORDINATES == place).all(1))[0] for place in answers])


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "judge" / "test.jsonl"


def test_it_chooses_by_the_number_it_was_shown(serve, file):
    server = serve(lambda body, n: says('{"number": 2}'))
    judge = Judge(options(server.url), file)
    chosen = ask(judge, 2)
    assert chosen.tolist() == [0, 0]
    (line, _) = lines(file)
    assert (line["place"], line["reason"], line["replied"]) == ([10.0, 20.0], "", True)
    assert line["requests"] == 1 and line["text"] == '{"number": 2}'
    report = judge.report()
    assert report["seconds"]["p95"] >= report["seconds"]["median"] > 0
    assert {**report, "seconds": 0} == {
        "model": "looker", "answer": "choose", "photos": 2, "answered": 2, "fallbacks": {}, "requests": 2, "retries": 0,
        "seconds": 0, "tokens": {"in": 2000, "out": 20}, "without_usage": 0, "cost": 0.0042,
    }  # fmt: skip


def test_it_asks_with_what_the_model_knows(serve, file):
    server = serve(lambda body, n: says('{"number": 1}'))
    ask(Judge(options(server.url, options=dict(temperature=0.5, extra=dict(seed=1))), file), 1)
    (body,) = server.bodies
    assert (body["model"], body["temperature"], body["extra"]) == ("looker", 0.5, {"seed": 1})
    schema = body["response_format"]["json_schema"]["schema"]
    assert schema["properties"] == {"number": {"type": "integer", "enum": [1, 2, 3]}}
    text = body["messages"][0]["content"][0]["text"].splitlines()
    weights = np.exp([-1.0, -2.0, -4.0]) / np.exp([-1.0, -2.0, -4.0]).sum()
    assert text[3:6] == [
        f"{n}. {place} ({share:.1%})"
        for n, place, share in zip(
            (1, 2, 3), ("48.85837, 2.29448", "10.00000, 20.00000", "-33.50000, 151.25000"), weights, strict=True
        )
    ]
    assert text[8:10] == ["48.90000, 2.30000 (0.90)", "41.90000, 12.50000 (0.50)"] and text[10] == ""
    assert "Authorization" not in server.headers[0]


def test_nothing_but_pixels_travels_and_no_more_than_asked_for(serve, file):
    server = serve(lambda body, n: says('{"number": 1}'))
    assert b"SECRET-PLACE" in photo(5)
    ask(Judge(options(server.url), file), 1, first=5)
    image = image_in(server.bodies[0])
    assert image.size == (48, 32) and number_in(server.bodies[0]) == 5
    raw = base64.b64decode(server.bodies[0]["messages"][0]["content"][1]["image_url"]["url"].split(",")[1])
    assert not image.getexif() and b"SECRET" not in raw and b"Exif" not in raw


def test_a_free_answer_is_a_place_of_its_own(serve, file):
    server = serve(
        lambda body, n: says('{"latitude": 41.5, "longitude": -8}' if number_in(body) == 0 else "I cannot tell.")
    )
    judge = Judge(options(server.url, answer="free"), file)
    assert judge([question("a", photo(0)), question("b", photo(1))]) == [[41.5, -8.0], None]
    assert "not listed" in server.bodies[0]["messages"][0]["content"][0]["text"]


@pytest.mark.parametrize(
    "answer, reply, expected",
    [
        ("choose", says('Here you are:\n```json\n{"number": 3}\n```'), 2),
        ("choose", says('<think>{maybe} {"number": 1}, or not</think>\n{"number": "2"} I am {sure}'), 0),
        ("choose", says('{"number": 2.0}'), 0),
        ("choose", (200, {"Content-Type": "text/plain"}, says('{"number": 2}')[2]), 0),
        ("choose", says('{"number": 4}'), "no such candidate"),
        ("choose", says('{"number": 0}'), "no such candidate"),
        ("choose", says('{"number": 1.5}'), "no such candidate"),
        ("choose", says('{"number": NaN}'), "no such candidate"),
        ("choose", says('{"number": true}'), "broken JSON"),
        ("choose", says('{"number": null}'), "broken JSON"),
        ("choose", says('{"number": 1'), "broken JSON"),
        ("choose", says('{"numbre": 1}'), "broken JSON"),
        ("choose", says('{"a":' * 3000), "broken JSON"),
        ("choose", says("I'm sorry, but I can't help with locating people."), "refusal"),
        ("choose", says(None), "refusal"),
        ("choose", says(None, refusal='No. {"number": 1}'), "refusal"),
        ("choose", says('{"number": 1}', finish="content_filter"), "refusal"),
        ("choose", says("The road signs {here} suggest", finish="length"), "cut off"),
        ("choose", (200, {"Content-Type": "text/html"}, b"<html>Log in</html>"), "no chat completion"),
        ("choose", (200, {}, b'{"choices": []}'), "no chat completion"),
        ("choose", (200, {}, b'{"choices": [{"message": "hello"}]}'), "no chat completion"),
        ("choose", (200, {}, b"[" * 100_000), "no chat completion"),
        ("choose", refuses(404), "HTTP 404"),
        ("choose", refuses(307, Location="http://127.0.0.1:9/v1/chat/completions"), "HTTP 307"),
        ("free", says('{"latitude": 91, "longitude": 0}'), "off the Earth"),
        ("free", says('{"latitude": 0, "longitude": -180.5}'), "off the Earth"),
        ("free", says('{"latitude": Infinity, "longitude": 0}'), "off the Earth"),
        ("free", says('{"latitude": NaN, "longitude": 0}'), "off the Earth"),
        ("free", says('{"latitude": "41 N", "longitude": "8 W"}'), "broken JSON"),
        ("free", says('{"latitude": 48.2}'), "broken JSON"),
        ("free", says('{"latitude": 1' + "0" * 400 + ', "longitude": 0}'), "broken JSON"),
    ],
)
def test_a_reply_is_an_answer_or_counted_under_its_reason(serve, file, answer, reply, expected):
    judge = Judge(options(serve(lambda body, n: reply).url, answer=answer), file)
    found = ask(judge, 1)
    (line,) = lines(file)
    if isinstance(expected, int):
        assert found.tolist() == [expected] and line["reason"] == "" and judge.report()["answered"] == 1
    else:
        assert found.tolist() == [4]
        assert line["reason"] == expected and line["place"] is None and len(line["text"]) < 20_000
        assert judge.report()["fallbacks"] == {expected: 1} and judge.report()["answered"] == 0
        assert line["replied"] == (not expected.startswith(("no chat", "HTTP")))


def test_replies_that_do_not_tell_their_usage_are_counted(serve, file):
    status, headers, data = says('{"number": 1}')
    without = {name: value for name, value in json.loads(data).items() if name != "usage"}
    odd = {**without, "usage": {"prompt_tokens": "many", "completion_tokens": 7}}
    bodies = [data, json.dumps(without).encode(), json.dumps(odd).encode()]
    judge = Judge(options(serve(lambda body, n: (status, headers, bodies[number_in(body)])).url), file)
    assert ask(judge, 3).tolist() == [3, 3, 3]
    report = judge.report()
    assert report["without_usage"] == 2 and report["tokens"] == {"in": 1000, "out": 17}


@pytest.mark.parametrize("trouble", [refuses(500), refuses(503), refuses(429), None], ids=["500", "503", "429", "cut"])
def test_what_passes_is_tried_again(serve, file, trouble):
    server = serve(lambda body, n: trouble if n == 0 else says('{"number": 2}'))
    judge = Judge(options(server.url), file)
    assert ask(judge, 1).tolist() == [0]
    assert (judge.report()["requests"], judge.report()["retries"], len(server.bodies)) == (2, 1, 2)


@pytest.mark.parametrize(
    "trouble, reason", [(refuses(500), "HTTP 500"), (refuses(429), "HTTP 429"), (None, "broken connection")]
)
def test_what_does_not_pass_is_counted(serve, file, trouble, reason):
    server = serve(lambda body, n: trouble)
    judge = Judge(options(server.url), file)
    assert ask(judge, 2).tolist() == [4, 4]
    report = judge.report()
    assert report["fallbacks"] == {reason: 2} and report["seconds"] == {"median": None, "p95": None}
    assert (report["requests"], report["retries"], len(server.bodies)) == (4, 2, 4)


def test_retry_after_is_waited_for(serve, file):
    server = serve(lambda body, n: says('{"number": 2}') if n else refuses(429, Retry_After="1"))
    judge = Judge(options(server.url), file)
    assert ask(judge, 1).tolist() == [0]
    assert server.times[1] - server.times[0] >= 1 and judge.report()["seconds"]["median"] >= 1


def test_a_slow_endpoint_is_given_up_after_the_timeout(serve, file):
    def slow(body, n):
        server.released.wait(20)
        return says('{"number": 1}')

    server = serve(slow)
    judge = Judge(options(server.url, timeout_s=0.2), file)
    start = time.monotonic()
    assert ask(judge, 4).tolist() == [4] * 4
    assert time.monotonic() - start < 3
    assert judge.report()["fallbacks"] == {"timeout": 4} and len(server.bodies) == 8


def test_an_endpoint_that_is_not_there_is_counted(nowhere, file):
    judge = Judge(options(nowhere), file)
    assert ask(judge, 3).tolist() == [4] * 3
    assert judge.report()["fallbacks"] == {"no connection": 3} and judge.report()["requests"] == 6
    assert "refused" in lines(file)[0]["text"]


def test_a_schema_that_is_refused_is_not_sent_again(serve, file):
    server = serve(lambda body, n: refuses(400) if "response_format" in body else says('{"number": 2}'))
    judge = Judge(options(server.url, concurrent=1), file)
    assert ask(judge, 3).tolist() == [0] * 3
    assert ["response_format" in body for body in server.bodies] == [True, False, False, False]
    assert judge.report()["requests"] == 4 and judge.report()["retries"] == 0


def test_a_400_for_another_reason_leaves_the_schema_in_use(serve, file):
    server = serve(lambda body, n: refuses(400) if number_in(body) == 0 else says('{"number": 2}'))
    judge = Judge(options(server.url, concurrent=1), file)
    assert ask(judge, 2).tolist() == [4, 0]
    assert ["response_format" in body for body in server.bodies] == [True, False, True]
    assert judge.report()["fallbacks"] == {"HTTP 400": 1}


def test_answers_are_in_the_order_of_photos_however_they_come(serve, file):
    meet = threading.Barrier(4, timeout=10)  # passes only if four requests run at the same time

    def behave(body, n):
        meet.wait()
        number = number_in(body)
        time.sleep(0.02 * (3 - number % 4))  # the first request is answered last
        return says(json.dumps({"number": 1 + number % 3}))

    server = serve(behave)
    assert ask(Judge(options(server.url), file), 12).tolist() == [LISTED[n % 3] for n in range(12)]
    assert [line["id"] for line in lines(file)] != [f"photo-{n}" for n in range(12)]


def test_a_second_start_asks_only_for_what_got_no_reply(serve, file):
    replies = [says('{"number": 2}'), says("No."), refuses(404), says('{"number": 3}')]
    first = serve(lambda body, n: replies[number_in(body)])
    judge = Judge(options(first.url), file)
    assert ask(judge, 4).tolist() == [0, 4, 4, 2]
    with file.open("a") as f:
        f.write('{"id": "photo-4", "pla')  # a line cut short by a crash
    second = serve(lambda body, n: says('{"number": 1}'))
    judge = Judge(options(second.url), file)
    assert ask(judge, 5).tolist() == [0, 4, 3, 2, 3]
    assert sorted(number_in(body) for body in second.bodies) == [2, 4]
    report = judge.report()
    assert (report["photos"], report["answered"], report["fallbacks"]) == (5, 4, {"refusal": 1})
    assert report["requests"] == 6 and report["tokens"] == {"in": 5000, "out": 50}
    third = Judge(options(second.url), file)
    assert third.report() == report and ask(third, 5).tolist() == [0, 4, 3, 2, 3] and len(second.bodies) == 2


def test_a_crash_in_the_middle_keeps_every_reply_and_asks_no_more(serve, file):
    def behave(body, n):
        time.sleep(0.02)
        return says('{"number": 2}')

    server = serve(behave)
    photos = [photo(0), photo(1), b"not a photo", *[photo(2)] * 17]
    with pytest.raises(ValueError, match="not a JPEG"):
        Judge(options(server.url, concurrent=1), file)([question(f"{n}", image) for n, image in enumerate(photos)])
    kept = lines(file)
    assert [line["id"] for line in kept[:3]] == ["0", "1", "3"] and all(line["replied"] for line in kept)
    assert len(kept) == len(server.bodies) < 10


def test_a_hopeless_endpoint_ends_in_one_sentence_and_answers_are_kept(serve, nowhere, file):
    server = serve(lambda body, n: says('{"number": 2}') if number_in(body) < 3 else refuses(404))
    judge = Judge(options(server.url), file)
    ask(judge, 3)
    with pytest.raises(StageError) as raised:
        ask(judge, 28, first=3)
    message = str(raised.value)
    assert "HTTP 404" in message and "not today" in message and server.url in message and str(file) in message
    assert "\n" not in message and message.count(". ") == 0
    assert 23 <= len(server.bodies) <= 27  # requests in flight when the twentieth failed still count
    asked = len(server.bodies)
    with pytest.raises(StageError):
        ask(judge, 1, first=30)
    assert len(server.bodies) == asked
    assert sum(line["replied"] for line in lines(file)) == 3
    with pytest.raises(StageError, match="no connection"):
        ask(Judge(options(nowhere, attempts=1), file), 30)
    again = serve(lambda body, n: says('{"number": 1}'))
    assert ask(Judge(options(again.url), file), 5).tolist() == [0, 0, 0, 3, 3] and len(again.bodies) == 2


def test_a_model_without_usable_replies_is_asked_twenty_times(serve, file):
    server = serve(lambda body, n: says('{"number": 1}' if number_in(body) == 2 else "I cannot help with that."))
    judge = Judge(options(server.url, concurrent=1), file)
    with pytest.raises(StageError) as raised:
        ask(judge, 30)
    message = str(raised.value)
    assert "config.judge.model is 'looker': the last 20 photos got replies without an answer" in message
    assert "(last reply: refusal, I cannot help with that.)" in message and str(file.parent.parent) in message
    assert len(server.bodies) == 23 and message.count(". ") == 0  # the third reply is usable
    assert ask(Judge(options(server.url, concurrent=1), file), 30).tolist() == [4, 4, 3, *[4] * 27]
    assert len(server.bodies) == 30


def test_the_key_is_sent_and_is_nowhere_else(serve, nowhere, tmp_path, monkeypatch, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("JUDGE_KEY", f"{KEY}\n")

    def echo(body, n):
        return says(f'{{"number": 2}} {KEY}') if n < 2 else (401, {}, f"Incorrect API key: {KEY}".encode())

    server = serve(echo)
    judge = Judge(options(server.url, key_variable="JUDGE_KEY"), tmp_path / "test.jsonl")
    ask(judge, 4)
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    with pytest.raises(StageError) as raised:
        ask(judge, 30)
    lost = Judge(options(nowhere, key_variable="JUDGE_KEY", attempts=1), tmp_path / "lost.jsonl")
    ask(lost, 1)
    said = [str(raised.value), repr(judge), json.dumps(judge.report()), caplog.text, *capfd.readouterr()]
    kept = [path.read_text() for path in tmp_path.iterdir()]
    assert "[the key]" in kept[0] + kept[1] and not any(KEY in text for text in said + kept)


@pytest.mark.parametrize("value", [None, " ", "sk-two words", "sk-\u00fc"])
def test_a_key_that_cannot_be_sent_is_not_shown(file, monkeypatch, value):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    if value:
        monkeypatch.setenv("JUDGE_KEY", value)
    with pytest.raises(settings.SettingsError, match="export JUDGE_KEY") as raised:
        Judge(options("http://localhost/v1", key_variable="JUDGE_KEY"), file)
    assert "sk-" not in str(raised.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"answer": "guess"}, "config.judge.answer is 'guess': choose one of choose, free"),
        ({"attempts": 0}, "config.judge.attempts is 0: it must be above 0"),
        ({"photos": -1}, "config.judge.photos is -1: set it to a number of photos, or to 0 for all"),
        ({"timeout_s": -1.0}, "config.judge.timeout_s"),
        ({"model": ""}, "config.judge.model is ''"),
        ({"base_url": "localhost:8000/v1"}, "config.judge.base_url must be like http://localhost:8000/v1"),
        ({"base_url": f"https://me:{KEY}@api.example.com/v1"}, "config.judge.base_url must be like"),
        ({"base_url": f"https://api.example.com/v1?key={KEY}"}, "config.judge.base_url must be like"),
        ({"key_variable": KEY}, "config.judge.key_variable is not the name"),
        ({"key_variable": "gsk_abc123"}, "config.judge.key_variable is not the name"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(settings.SettingsError) as raised:
        options("http://localhost:8000/v1", **changes)
    assert message in str(raised.value) and KEY not in str(raised.value) and "gsk_abc" not in str(raised.value)
