"""Settings and limits of the service: queue capacity, request rate and refusals."""

import contextlib
import dataclasses
import errno
import ipaddress
import math
import os
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from geotoken_jax.settings import SettingsError

#: Number of clients whose rate is stored. The client seen least recently is removed first.
_CLIENTS = 10_000
#: Bits of an IPv6 address that identify a client: one client usually has a whole /64 network.
_NETWORK = 64
_LAST_PORT = 65_535


def _flag(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class ServeSettings:
    """The flags of `geotoken serve`.

    Defaults are here and not in configs/common.py because the service reads no configuration, only an export.
    """

    host: str = _flag("127.0.0.1", "address to listen on; 0.0.0.0 listens on all interfaces")
    port: int = _flag(8000, "port to listen on; 0 takes any free port")
    batch_size: int = _flag(32, "largest batch of the model, in photos")
    wait_ms: float = _flag(4.0, "longest time that a free model waits to fill a batch, in ms")
    queue: int = _flag(64, "largest number of photos in the service, from arrival to response; more get 503")
    threads: int = _flag(2, "number of threads that decode photos")
    max_bytes: int = _flag(20_000_000, "largest request body, in bytes; larger ones get 413")
    max_photos: int = _flag(16, "largest number of photos per request; more get 422")
    max_pixels: int = _flag(50_000_000, "largest number of pixels per photo, according to its header")
    rate: int = _flag(600, "photos per minute from one address; more get 429; 0 for no limit")
    token_variable: str = _flag(
        "", "environment variable with the bearer token that clients must send; no token if empty"
    )
    read_s: float = _flag(30.0, "time limit for a request body to arrive, in seconds")
    drain_s: int = _flag(60, "time limit for accepted requests after SIGTERM, in seconds")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("port", "wait_ms", "rate") else 1
            if field.type in (int, float) and not least <= value < math.inf:
                raise SettingsError(f"{flag(field.name)} is {value}: set it to a finite number, at least {least}")
        if self.port > _LAST_PORT:
            raise SettingsError(
                f"--port is {self.port}: set it to a number from 1 to {_LAST_PORT}, or to 0 for any free port"
            )
        for name in ("queue", "rate"):
            if self.max_photos > getattr(self, name) and (name == "queue" or self.rate):
                raise SettingsError(
                    f"--max-photos is {self.max_photos}, more than --{name} ({getattr(self, name)}), so "
                    f"requests of that size would always be refused: lower --max-photos or raise --{name}"
                )
        self.token()

    def bind(self) -> list[socket.socket]:
        """Returns one socket per address of `host`, bound to `port`. The sockets do not listen yet.

        Raises SettingsError if the host is unknown or the port cannot be used.
        """
        sockets: list[socket.socket] = []
        faults: list[OSError] = []
        try:
            addresses = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except OSError as error:
            addresses, faults = [], [error]
        for family, kind, protocol, _, address in addresses:
            try:
                sockets.append(_bound(socket.socket(family, kind, protocol), address))
            except OSError as error:  # a name such as localhost can have an IPv6 address on a machine without IPv6
                faults.append(error)
        busy = any(fault.errno == errno.EADDRINUSE for fault in faults)
        if busy or not sockets:
            remedy = (
                "choose another --port, or end the program that uses it" if busy else "choose another --host or --port"
            )
            raise SettingsError(
                f"--host={self.host} --port={self.port} cannot be listened on ({faults[0].strerror}): {remedy}"
            )
        return sockets

    def token(self) -> str:
        """Returns the bearer token, or "" if none is required.

        Raises SettingsError if the environment variable named by token_variable is unset or empty.
        """
        if self.token_variable and not os.environ.get(self.token_variable):
            raise SettingsError(
                f"--token-variable is {self.token_variable}, but this environment variable is unset or empty: set it "
                "to the token"
            )
        return os.environ.get(self.token_variable, "")


def _bound(one: socket.socket, address: Any) -> socket.socket:
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # allow the port of a service that has just ended
    if one.family == socket.AF_INET6:
        one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    one.bind(address)
    return one


def flag(name: str) -> str:
    """Returns the command-line flag of a setting."""
    return "--" + name.replace("_", "-")


class Refused(Exception):
    """A refused request. The client gets the status, the headers and the message, which is one sentence."""

    def __init__(self, status: int, sentence: str, headers: Mapping[str, str] | None = None):
        super().__init__(sentence)
        self.status, self.headers = status, dict(headers or {})


class Capacity:
    """Limits the number of photos in the service, counted from a request's arrival to its response."""

    def __init__(self, photos: int, wait_s: Callable[[int], float]):
        """photos: largest number of photos. wait_s: function that takes a number of photos and returns the seconds
        until they are answered.
        """
        self.taken, self._limit, self._wait_s = 0, photos, wait_s

    @contextlib.contextmanager
    def take(self, photos: int) -> Iterator[None]:
        """Counts photos as long as the context is open. Raises Refused if the limit would be exceeded."""
        if self.taken + photos > self._limit:
            raise Refused(503, "the queue is full: try again later", retry_after(self._wait_s(self.taken)))
        self.taken += photos
        try:
            yield
        finally:
            self.taken -= photos


class Rate:
    """Limits the photos per minute from one address, with a token bucket."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic):
        """per_minute: largest number of photos per minute, and largest number at once; 0 sets no limit. clock:
        function that returns the current time in seconds.
        """
        self._per_minute, self._clock = per_minute, clock
        # Client -> photos that it may still send, and time of its last request.
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, address: str, photos: int) -> None:
        """Counts photos from an address. If they exceed the limit, raises Refused and does not count them."""
        if not self._per_minute:
            return
        now, client = self._clock(), _client(address)
        left, then = self._left.pop(client, (self._per_minute, now))
        left = min(self._per_minute, left + (now - then) * self._per_minute / 60)
        enough = photos <= left
        self._left[client] = (left - photos if enough else left, now)
        if len(self._left) > _CLIENTS:
            self._left.popitem(last=False)
        if not enough:
            sentence = f"more than {self._per_minute:,} photos per minute came from this address: try again later"
            raise Refused(429, sentence, retry_after((photos - left) * 60 / self._per_minute))


def retry_after(seconds: float) -> dict[str, str]:
    """Returns the header Retry-After with the seconds, rounded up, at least 1."""
    return {"Retry-After": str(max(1, math.ceil(seconds)))}


def _client(address: str) -> str:
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:  # clients of a Unix socket have no address
        return address
    return str(ipaddress.ip_network((ip, _NETWORK), strict=False)) if ip.version == 6 else address
