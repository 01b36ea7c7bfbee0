"""Pictures from URLs, where the operator allows it: from public addresses alone, and never from inside the network."""

import asyncio
import contextlib
import ipaddress
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, TypeAlias
from urllib.parse import urlsplit

import h11

from frameloom.serve.api.body import Hold
from frameloom.serve.api.errors import bad

MAX_URL: Final = 2_048
MAX_HEAD: Final = 32_768
TIMEOUT_S: Final = 15.0
_CHUNK: Final = 65_536
_PORTS: Final = {"http": 80, "https": 443}
_HOST: Final = re.compile(r"[0-9A-Za-z._-]{1,253}|[0-9A-Fa-f:.]{2,45}")
_TARGET: Final = re.compile(r"[!$%&'()*+,\-./0-9:;=?@A-Z_a-z~\[\]]+")

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve: TypeAlias = Callable[[str, int], Awaitable[Sequence[str]]]

# Reserved blocks that ipaddress counts as global, or that carry IPv4 addresses inside: any of them may lead inwards.
_REFUSED: Final = tuple(
    ipaddress.ip_network(block)
    for block in (
        "168.63.129.16/32",  # Azure's metadata
        "192.88.99.0/24",  # relays of 6to4
        "::/96",  # IPv4-compatible
        "::ffff:0:0/96",  # IPv4-mapped
        "64:ff9b::/96",  # NAT64
        "64:ff9b:1::/48",
        "2002::/16",  # 6to4
        "2001::/32",  # Teredo
    )
)
_GLOBAL_IPV6: Final = ipaddress.ip_network("2000::/3")


def is_public(address: Address) -> bool:
    """Whether an address is on the public internet, and nothing else."""
    if any(address.version == block.version and address in block for block in _REFUSED):
        return False
    if address.version == 6 and address not in _GLOBAL_IPV6:
        return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


class Resolver:
    """Says the addresses of a name, in threads of its own: behind a slow name server nothing else has to wait."""

    def __init__(self, at_once: int = 4) -> None:
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="resolve")

    async def __call__(self, host: str, port: int) -> list[str]:
        """Raises OSError."""
        ask = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        found = await asyncio.get_running_loop().run_in_executor(self._threads, ask)
        return [str(address[0]) for *_, address in found]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where a URL leads. `target`: path and query."""

    scheme: str
    host: str
    port: int
    target: str

    @property
    def authority(self) -> str:
        name = f"[{self.host}]" if ":" in self.host else self.host
        return name if self.port == _PORTS[self.scheme] else f"{name}:{self.port}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetcher:
    """Fetches from `hosts`, such as ("images.example.com", "*.example.org", "localhost:8080") or ("*",); () is none.

    `max_bytes` of a file. `resolve` and `allows` say the addresses of a name and whether one may be connected to;
    `tls`: whom to trust, None: whom this machine trusts.
    """

    hosts: tuple[str, ...]
    max_bytes: int
    timeout_s: float = TIMEOUT_S
    resolve: Resolve = field(default_factory=Resolver)
    allows: Callable[[Address], bool] = is_public
    tls: ssl.SSLContext | None = None

    async def fetch(self, url: str, param: str, hold: Hold) -> bytes:
        """What a URL gives; `hold` is told of its bytes as they come.

        Raises ApiError 400: one sentence, which tells nothing of what is inside; and what `hold` raises.
        """
        if not self.hosts:
            raise bad(param, f"this server fetches no URLs; send the {param} as a file or a data: URL")
        place = self._place(url, param)
        try:
            async with asyncio.timeout(self.timeout_s):
                return await self._get(place, await self._address(place, param), param, hold)
        except TimeoutError:
            raise bad(
                param, f"{place.host} did not send the {param} in {self.timeout_s:g} s; send it as a file"
            ) from None
        except (OSError, h11.ProtocolError, ValueError):
            raise bad(param, f"the {param} could not be fetched from {place.host}; send it as a file") from None

    def _place(self, url: str, param: str) -> _Place:
        refusal = bad(param, f"the {param} is no URL that can be fetched; give https://host/path, or a file")
        if len(url) > MAX_URL:
            raise refusal
        try:
            parts = urlsplit(url)
            host = (parts.hostname or "").encode("idna").decode("ascii").rstrip(".")
            port = parts.port or _PORTS[parts.scheme]
        except (ValueError, KeyError):  # UnicodeError is a ValueError
            raise refusal from None
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if not _HOST.fullmatch(host) or "@" in parts.netloc or not _TARGET.fullmatch(target):
            raise refusal
        if not any(_is_of(host, port, _PORTS[parts.scheme], allowed) for allowed in self.hosts):
            raise bad(param, f"this server fetches nothing from {host} port {port}; send the {param} as a file")
        return _Place(scheme=parts.scheme, host=host, port=port, target=target)

    async def _address(self, place: _Place, param: str) -> str:
        """The address that is connected to: resolved once, so that no second answer can lead elsewhere."""
        addresses = await self.resolve(place.host, place.port)
        known = [ipaddress.ip_address(address.partition("%")[0]) for address in addresses]
        if not known or not all(map(self.allows, known)):
            raise bad(param, f"{place.host} is not on the public internet; send the {param} as a file")
        return str(known[0])

    async def _get(self, place: _Place, address: str, param: str, hold: Hold) -> bytes:
        secure: dict[str, Any] = {}
        if place.scheme == "https":
            secure = {"ssl": self.tls or ssl.create_default_context(), "server_hostname": place.host}
        reader, writer = await asyncio.open_connection(address, place.port, **secure)
        try:
            connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD)
            asked = h11.Request(method="GET", target=place.target, headers=_headers(place))
            writer.write(connection.send(asked) + connection.send(h11.EndOfMessage()))
            return await self._body(connection, reader, place, param, hold)
        finally:
            writer.close()
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await writer.wait_closed()

    async def _body(
        self, connection: h11.Connection, reader: asyncio.StreamReader, place: _Place, param: str, hold: Hold
    ) -> bytes:
        body = bytearray()
        while True:
            event: Any = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(_CHUNK))
            elif isinstance(event, h11.Response):
                _check_status(event, place, param)
            elif isinstance(event, h11.Data):
                hold(len(event.data))
                body += event.data
                if len(body) > self.max_bytes:
                    most = f"{self.max_bytes / 2**20:g} MiB"
                    raise bad(param, f"the {param} at {place.host} is larger than {most}; send a smaller one")
            elif isinstance(event, h11.EndOfMessage):
                return bytes(body)
            elif isinstance(event, h11.ConnectionClosed):
                raise bad(param, f"{place.host} ended the connection early; send the {param} as a file")


def _headers(place: _Place) -> list[tuple[str, str]]:
    return [
        ("Host", place.authority), ("User-Agent", "frameloom"), ("Accept", "image/png, image/jpeg, image/webp"),
        ("Accept-Encoding", "identity"), ("Connection", "close"),
    ]  # fmt: skip


def _check_status(response: h11.Response, place: _Place, param: str) -> None:
    if 300 <= response.status_code < 400:
        raise bad(param, f"{place.host} leads on to another place; give the URL of the {param} itself")
    if response.status_code != 200:
        raise bad(param, f"{place.host} answers with status {response.status_code}; give another URL for the {param}")
    if any(name == b"content-encoding" and value != b"identity" for name, value in response.headers):
        raise bad(param, f"{place.host} sends the {param} compressed; send it as a file")


def _is_of(host: str, port: int, usual_port: int, allowed: str) -> bool:
    """Whether a place is one that the operator allows: other ports than the usual have to be named."""
    name, _, number = allowed.lower().partition(":")
    if port != (int(number) if number else usual_port):
        return False
    return name in ("*", host) or (name.startswith("*.") and host.endswith(name[1:]))
