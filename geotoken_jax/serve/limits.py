"""What the service allows: its settings, and who is refused, with which status and until when."""

import contextlib
import dataclasses
import ipaddress
import math
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from geotoken_jax.settings import SettingsError

#: Clients whose rate is remembered; of the one that was away longest it is forgotten.
_CLIENTS = 10_000
#: Of IPv6 a client is its network of 64 bits: one machine has all the addresses in it.
_NETWORK = 64


def _flag(default: Any, what: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": what})


@dataclasses.dataclass(frozen=True)
class ServeSettings:
    """The flags of `geotoken serve`. A model's folder is all that there is of a configuration when it is served, so
    that their defaults are here."""

    host: str = _flag("127.0.0.1", "address to listen at: 0.0.0.0 for every one that the machine has")
    port: int = _flag(8000, "port to listen at")
    batch_size: int = _flag(32, "most photos that the model answers at once")
    wait_ms: float = _flag(4.0, "that a photo waits for others while the model is free")
    queue: int = _flag(64, "photos that are there at once, from their arrival to their answer; more get 503")
    threads: int = _flag(2, "that decode photos")
    max_bytes: int = _flag(20_000_000, "of a request's body; more get 413")
    max_photos: int = _flag(16, "in a request; more get 422")
    max_pixels: int = _flag(50_000_000, "of a photo, by its header")
    rate: int = _flag(600, "photos a minute from one address, more get 429; 0 for any number")
    token_variable: str = _flag("", "environment variable with the bearer token to ask for; none is asked for without")
    read_s: float = _flag(30.0, "for the whole of a request's body to arrive")
    drain_s: int = _flag(60, "for what was accepted to be answered after SIGTERM")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("port", "wait_ms", "rate") else 1
            if field.type in (int, float) and not least <= value < math.inf:
                raise SettingsError(f"{flag(field.name)} is {value}: it must be at least {least}")
        for name in ("queue", "rate"):
            if self.max_photos > getattr(self, name) and (name == "queue" or self.rate):
                raise SettingsError(
                    f"--max-photos is {self.max_photos}, and --{name} = {getattr(self, name)} would refuse so many "
                    f"whenever they come: lower the one or raise the other"
                )
        self.token()

    def token(self) -> str:
        """Returns the bearer token to ask for, "" for none. Raises SettingsError if its variable is not set."""
        if self.token_variable and not os.environ.get(self.token_variable):
            raise SettingsError(
                f"--token-variable={self.token_variable}, and there is nothing in that environment variable: set it to "
                "the token"
            )
        return os.environ.get(self.token_variable, "")


def flag(name: str) -> str:
    """Returns the flag of a setting."""
    return "--" + name.replace("_", "-")


class Refused(Exception):
    """A request is answered with a status and one sentence, which is the message, instead of places."""

    def __init__(self, status: int, sentence: str, headers: Mapping[str, str] | None = None):
        super().__init__(sentence)
        self.status, self.headers = status, dict(headers or {})


class Capacity:
    """Places for photos, taken from a request's arrival to its answer: the bound on all that waits."""

    def __init__(self, places: int, wait_s: Callable[[int], float]):
        """wait_s: photos that are there -> seconds until they are answered."""
        self.taken, self._places, self._wait_s = 0, places, wait_s

    @contextlib.contextmanager
    def take(self, photos: int) -> Iterator[None]:
        """Holds places. Raises Refused if there are too few."""
        if self.taken + photos > self._places:
            raise Refused(503, "the queue is full: try again later", retry_after(self._wait_s(self.taken)))
        self.taken += photos
        try:
            yield
        finally:
            self.taken -= photos


class Rate:
    """So many photos a minute from one address: a bucket of that many, which fills again at that pace."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic):
        """per_minute: 0 for any number. clock: seconds."""
        self._most, self._clock = per_minute, clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client -> photos, and when

    def take(self, address: str, photos: int) -> None:
        """Counts photos. Raises Refused if they are too many now, and then counts none."""
        if not self._most:
            return
        now, client = self._clock(), _client(address)
        left, then = self._left.pop(client, (self._most, now))
        left = min(self._most, left + (now - then) * self._most / 60)
        enough = photos <= left
        self._left[client] = (left - photos if enough else left, now)
        if len(self._left) > _CLIENTS:
            self._left.popitem(last=False)
        if not enough:
            sentence = f"more than {self._most:,} photos a minute came from this address: try again later"
            raise Refused(429, sentence, retry_after((photos - left) * 60 / self._most))


def retry_after(seconds: float) -> dict[str, str]:
    """Returns the header that says when to come again: whole seconds, at least one."""
    return {"Retry-After": str(max(1, math.ceil(seconds)))}


def _client(address: str) -> str:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:  # a Unix socket has none
        return address
    return str(ipaddress.ip_network((found, _NETWORK), strict=False)) if found.version == 6 else address
