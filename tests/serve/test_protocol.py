"""Connections that dawdle, that send no HTTP, or that are too many: real sockets, and a server in a thread."""

import asyncio
import contextlib
import json
import socket
import threading
import time

import pytest
import uvicorn

from frameloom.errors import RequestError
from frameloom.serve import protocol
from frameloom.serve.config import Key, ServeConfig
from frameloom.serve.door import address_of, is_loopback, open_door, refuse_strangers
from frameloom.serve.protocol import HEAD_BYTES, PatientProtocol

HEAD = b"GET / HTTP/1.1\r\nHost: here\r\n"


LARGE = b"x" * 2**25  # far more than the system keeps for a reader


async def application(scope, receive, send):
    body = b"ok" if scope["path"] == "/" else LARGE
    piece = 2**18 if scope["path"] == "/streamed" else len(body)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    for start in range(0, len(body), piece):
        more = start + piece < len(body)
        await send({"type": "http.response.body", "body": body[start : start + piece], "more_body": more})


@contextlib.contextmanager
def served(**config):
    """A server, and its port."""
    door = open_door("127.0.0.1", 0)
    server = uvicorn.Server(
        uvicorn.Config(
            application, http=PatientProtocol, ws="none", lifespan="off", log_config=None,
            h11_max_incomplete_event_size=HEAD_BYTES, **config,
        )
    )  # fmt: skip
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[door])))
    thread.start()
    try:
        yield server, door.getsockname()[1]
    finally:
        server.should_exit = server.force_exit = True
        thread.join()
        door.close()


@pytest.fixture
def port(monkeypatch):
    monkeypatch.setattr(protocol, "HEAD_S", 1.5)
    monkeypatch.setattr(protocol, "CONNECTIONS", 4)
    with served() as (_, port):
        yield port


def connected(port):
    return socket.create_connection(("127.0.0.1", port), timeout=30)


def until(is_so):
    end = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def answer_of(connection):
    """The status of an answer, its headers in lower case, and its body."""
    file = connection.makefile("rb")
    status = int(file.readline().split()[1])
    headers = dict(iter(lambda: tuple(file.readline().decode().strip().lower().partition(": ")[::2]), ("", "")))
    return status, headers, file.read(int(headers["content-length"]))


def test_requests_that_do_not_come_whole_are_given_up(port):
    with connected(port) as silent, connected(port) as half:
        half.sendall(HEAD)
        assert half.recv(100) == b""
        assert silent.recv(100) == b""


def test_bytes_that_trickle_do_not_renew_the_patience(port):
    with connected(port) as slow:
        begun = time.monotonic()
        with pytest.raises(OSError):  # noqa: PT012 - the connection ends somewhere in here
            for _ in range(300):
                slow.sendall(b"G")
                time.sleep(0.1)
        assert time.monotonic() - begun < 25


def test_a_connection_that_is_used_stays_and_its_next_half_request_is_given_up_too(port):
    with connected(port) as kept:
        for _ in range(3):
            kept.sendall(HEAD + b"\r\n")
            assert answer_of(kept)[0] == 200
        time.sleep(2.5)  # nothing has begun, so nothing is late
        kept.sendall(HEAD + b"\r\n" + HEAD)  # the second of two in a row stays half
        assert answer_of(kept)[0] == 200
        assert kept.recv(100) == b""


@pytest.mark.parametrize("rest", [b"x", b"xy"])
def test_an_answered_request_does_not_hold_its_connection_by_a_body_that_comes_late(rest):
    with served(timeout_keep_alive=0.3) as (_, port), connected(port) as late:
        late.sendall(HEAD + b"Content-Length: 2\r\n\r\n")
        assert answer_of(late)[0] == 200
        late.sendall(rest)
        with contextlib.suppress(ConnectionResetError):
            assert late.recv(100) == b""


def test_a_half_request_after_a_late_body_is_given_as_long_as_any_other(monkeypatch):
    with served(timeout_keep_alive=60) as (server, port), connected(port) as late:
        late.sendall(HEAD + b"Content-Length: 2\r\n\r\n")
        assert answer_of(late)[0] == 200
        (one,) = server.server_state.connections
        late.sendall(b"x")
        until(lambda: one._waiting is not None)
        monkeypatch.setattr(protocol, "HEAD_S", 0.1)
        late.sendall(b"y" + HEAD)
        assert late.recv(100) == b""


def test_a_body_that_nobody_reads_is_not_listened_to_for_ever():
    with served(timeout_keep_alive=0.3) as (_, port), connected(port) as long:
        long.sendall(HEAD + b"Content-Length: 1000000\r\n\r\n")
        assert answer_of(long)[0] == 200
        with pytest.raises(OSError):  # noqa: PT012 - the connection ends somewhere in here
            for _ in range(300):
                long.sendall(b"x")
                time.sleep(0.05)


@pytest.mark.parametrize("way", ["keeps", "closes", "half"])
def test_an_answer_that_nobody_takes_is_given_up(way):
    with served(timeout_keep_alive=0.2) as (server, port), connected(port) as stalled:
        closes = b"Connection: close\r\n" if way == "closes" else b""
        stalled.sendall(b"GET /large HTTP/1.1\r\nHost: here\r\n" + closes + b"\r\n")
        if way == "half":
            assert stalled.recv(1) == b"H"
            stalled.shutdown(socket.SHUT_WR)
        until(lambda: server.server_state.total_requests and not server.server_state.connections)


@pytest.mark.parametrize("way", ["open", "half"])
def test_a_streamed_answer_that_nobody_takes_is_given_up(way, monkeypatch):
    monkeypatch.setattr(protocol, "TAKE_S", 0.1)
    with served() as (server, port), connected(port) as stalled:
        stalled.sendall(b"GET /streamed HTTP/1.1\r\nHost: here\r\n\r\n")
        assert stalled.recv(1) == b"H"
        if way == "half":
            stalled.shutdown(socket.SHUT_WR)
        until(lambda: not (server.server_state.connections or server.server_state.tasks))
        assert server.server_state.total_requests == 0  # the answer did not end


def test_a_streamed_answer_whose_client_goes_on_taking_it_comes_whole():
    with served() as (server, port), connected(port) as slow:
        slow.sendall(b"GET /streamed HTTP/1.1\r\nHost: here\r\n\r\n")
        until(lambda: server.server_state.connections)
        (one,) = server.server_state.connections
        until(lambda: one._taking is not None)
        assert answer_of(slow)[2] == LARGE
        until(one._taking.cancelled)  # else it ends the connection later


@pytest.mark.parametrize("sent", [b"\x16\x03\x01\x00\x05hello\r\n\r\n", HEAD + b"X: " + b"y" * 2 * HEAD_BYTES])
def test_what_is_no_http_is_told_in_the_shape_of_all_errors(port, sent):
    with connected(port) as odd:
        odd.sendall(sent)
        status, headers, body = answer_of(odd)
    assert (status, headers["content-type"], headers["connection"]) == (400, "application/json", "close")
    error = json.loads(body)["error"]
    assert error["code"] == "invalid_http"
    assert headers["x-request-id"].startswith("req_")
    assert error.keys() == {"message", "type", "param", "code"}


def test_too_many_connections_are_told_to_come_again_and_those_before_go_on(port):
    many = [connected(port) for _ in range(5)]
    try:
        for connection in many:
            connection.sendall(HEAD + b"\r\n")
        answers = [answer_of(connection) for connection in many]
        assert sorted(status for status, _, _ in answers) == [200] * 4 + [503]
        headers, body = next(rest for status, *rest in answers if status == 503)
        assert headers["retry-after"] == "5"
        assert json.loads(body)["error"]["code"] == "overloaded"
    finally:
        for connection in many:
            connection.close()
    with connected(port) as after:
        after.sendall(HEAD + b"\r\n")
        assert answer_of(after)[0] in (200, 503)  # as soon as the server has seen the others go


# --- where it listens ---


def test_addresses_of_this_machine_alone():
    assert all(is_loopback(host) for host in ("127.0.0.1", "localhost", "127.9.9.9", "::1"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "192.0.2.1", "::"))


def test_strangers_are_let_in_by_keys_or_by_force_alone(tmp_path):
    key = Key(name="alice", secret="a-secret-of-alice-0123456789")
    refuse_strangers(ServeConfig(data=tmp_path))
    refuse_strangers(ServeConfig(data=tmp_path, host="0.0.0.0", keys=(key,)))
    refuse_strangers(ServeConfig(data=tmp_path, host="0.0.0.0", is_public=True))
    with pytest.raises(RequestError, match="without keys anybody may ask"):
        refuse_strangers(ServeConfig(data=tmp_path, host="0.0.0.0"))


def test_a_door_waits_for_whoever_answers(tmp_path):
    with open_door("127.0.0.1", 0) as door:
        url = address_of(door)
        port = int(url.rpartition(":")[2])
        assert url == f"http://127.0.0.1:{port}"
        with connected(port):  # nobody serves yet, and nobody is refused
            pass
        with pytest.raises(RequestError, match="is taken by another process"):
            open_door("127.0.0.1", port)
    with open_door("0.0.0.0", 0) as door:
        assert address_of(door).startswith("http://127.0.0.1:")
