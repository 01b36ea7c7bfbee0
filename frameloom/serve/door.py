"""Where the server listens: opened before anything that takes time is imported or started."""

import errno
import ipaddress
import socket

from frameloom.errors import RequestError
from frameloom.serve.config import ServeConfig

_TAKEN = (errno.EADDRINUSE, errno.EACCES, errno.EADDRNOTAVAIL)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address or a name. Raises RequestError for a name that nobody knows."""
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for _, address in _resolved(host))


def refuse_strangers(config: ServeConfig) -> None:
    """Raise RequestError where the network could reach a server without keys that was not forced to be public."""
    if config.keys or config.is_public or is_loopback(config.host):
        return
    raise RequestError(
        f"{config.host} can be reached by others, and without keys anybody may ask; give --keys FILE, listen at "
        "127.0.0.1, or force it with --insecure-public"
    )


def open_door(host: str, port: int) -> socket.socket:
    """A socket bound to the first address of `host`, listening: who connects waits until it is served.

    Port 0: a free one. A port that a killed server had a moment ago is free. Raises RequestError.
    """
    family, address = _resolved(host)[0]
    door = socket.socket(family, socket.SOCK_STREAM)
    try:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.bind((address, port))
        door.listen(socket.SOMAXCONN)
    except OSError as error:
        door.close()
        if error.errno not in _TAKEN:
            raise
        why = {errno.EADDRINUSE: "is taken by another process", errno.EACCES: "needs rights that this user lacks"}
        said = why.get(error.errno, "is no address of this machine")
        raise RequestError(f"{address} port {port} {said}; choose another --port (0: a free one) or --host") from None
    door.setblocking(False)
    return door


def address_of(door: socket.socket) -> str:
    """The URL of a socket, as a browser on this machine takes it."""
    host, port = door.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = "::1" if ":" in host else "127.0.0.1"
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _resolved(host: str) -> list[tuple[socket.AddressFamily, str]]:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise RequestError(f"host {host!r} has no address; use 127.0.0.1, or one of this machine") from None
    return [(family, str(address[0])) for family, _, _, _, address in found]
