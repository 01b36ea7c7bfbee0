"""Pictures from URLs: nothing inside the network is ever connected to, and what is outside is held to limits."""

import asyncio
import contextlib
import ipaddress
import shutil
import socket
import ssl
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from frameloom.serve.api.body import BodyReader
from frameloom.serve.api.errors import ApiError
from frameloom.serve.api.fetch import Fetcher, is_public


class Listener:
    """Counts connections on the loopback, and answers each with some bytes."""

    def __init__(self, answer=b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"):
        self.answer, self.seen, self.asked = answer, 0, b""
        self.wrap = lambda connection: connection
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.thread = threading.Thread(target=self._listen)
        self.thread.start()

    def _listen(self):
        while True:
            connection, _ = self.socket.accept()
            with contextlib.closing(connection):
                if self.answer is None:
                    return
                self.seen += 1
                try:
                    connection = self.wrap(connection)
                    self.asked = connection.recv(65536)
                    for piece in self.answer if isinstance(self.answer, list) else [self.answer]:
                        connection.sendall(piece)
                    connection.close()
                except OSError:
                    pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.answer = None
        socket.create_connection(("127.0.0.1", self.port)).close()
        self.thread.join()
        self.socket.close()


def fetcher(port, *, host="*", resolves=None, allows=is_public, **options):
    async def resolve(name, port):
        return resolves.pop(0)

    given = {} if resolves is None else {"resolve": resolve}
    options = {"max_bytes": 1000, "timeout_s": 5.0} | options
    return Fetcher(hosts=(f"{host}:{port}", "*"), allows=allows, **given, **options)


def get(fetcher, url, hold=lambda num_bytes: None):
    return asyncio.run(fetcher.fetch(url, "input_reference", hold))


def refusal(fetcher, url):
    with pytest.raises(ApiError) as caught:
        get(fetcher, url)
    assert (caught.value.status, caught.value.param) == (400, "input_reference")
    return caught.value.message


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "localhost", "127.1", "0x7f.1", "2130706433", "0177.0.0.1", "0", "0.0.0.0", "[::1]", "[::]",
        "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "localhost.", "LOCALHOST", "①②⑦.⓪.⓪.①",
    ],
)  # fmt: skip
def test_nothing_of_this_machine_is_connected_to(host):
    with Listener() as listener:
        message = refusal(fetcher(listener.port), f"http://{host}:{listener.port}/picture.png")
        assert listener.seen == 0
        assert "127" not in message.replace(host, "").replace("127.0.0.1", "") or host == "①②⑦.⓪.⓪.①"


@pytest.mark.parametrize(
    "address",
    [
        "10.0.0.1", "172.16.0.1", "192.168.0.1", "169.254.169.254", "100.64.0.1", "100.100.100.200", "168.63.129.16",
        "224.0.0.1", "240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1", "192.88.99.1", "fe80::1", "fc00::1",
        "fd00:ec2::254", "ff02::1", "::", "::ffff:8.8.8.8", "64:ff9b::7f00:1", "64:ff9b:1::1", "2002:7f00:1::",
        "2001::1", "::7f00:1", "2001:db8::1", "fec0::1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address):
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "2a00:1450:4001:800::200e"])
def test_addresses_that_are_public(address):
    assert is_public(ipaddress.ip_address(address))


def test_a_name_is_resolved_once_and_all_its_addresses_are_public():
    with Listener() as listener:
        url = f"http://pictures.example:{listener.port}/a"
        mixed = [["93.184.216.34", "127.0.0.1"]]
        assert "public internet" in refusal(fetcher(listener.port, resolves=mixed), url)
        assert "public internet" in refusal(fetcher(listener.port, resolves=[[]]), url)
        rebound = [["127.0.0.1"], ["169.254.169.254"]]  # the second answer is never asked for
        allowed = fetcher(listener.port, resolves=rebound, allows=lambda address: True)
        assert get(allowed, url) == b"hello"
        assert len(rebound) == 1
        assert listener.seen == 1
        assert f"Host: pictures.example:{listener.port}".encode() in listener.asked


def test_what_comes_is_accounted_for_and_ends_where_there_is_no_room():
    pieces = [b"HTTP/1.1 200 OK\r\nContent-Length: 300\r\n\r\n", *[b"x" * 100] * 3]
    reader = BodyReader(limit=150, held=350)  # of others; 600 in all
    with Listener(pieces) as listener:
        url = f"http://a.example:{listener.port}/"
        allowed = fetcher(listener.port, resolves=[["127.0.0.1"]] * 3, allows=lambda address: True)
        with reader.holding() as hold, pytest.raises(ApiError) as caught:
            get(allowed, url, hold)
        assert (caught.value.status, caught.value.code, reader.held) == (503, "busy", 350)
        reader = BodyReader(limit=149)  # of which one request may bring twice as much, and is not asked to come again
        with reader.holding() as hold, pytest.raises(ApiError) as caught:
            get(allowed, url, hold)
        assert (caught.value.status, caught.value.code, reader.held) == (413, "request_too_large", 0)
        reader = BodyReader(limit=150)
        with reader.holding() as hold:
            assert get(allowed, url, hold) == b"x" * 300
            assert reader.held == 300
        assert reader.held == 0


def test_name_servers_that_hang_keep_nothing_else_waiting(monkeypatch):
    answered = threading.Event()

    def hang(*_, **__):
        answered.wait(60)
        raise OSError

    async def story():
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        waits = fetcher(80, timeout_s=60.0)
        asked = [asyncio.create_task(waits.fetch("http://a.example/", "input_reference", int)) for _ in range(9)]
        await asyncio.sleep(0)
        try:
            assert await asyncio.wait_for(asyncio.to_thread(lambda: "at once"), 20) == "at once"
            assert not any(task.done() for task in asked)
        finally:
            answered.set()
        told = await asyncio.gather(*asked, return_exceptions=True)
        assert {type(one) for one in told} == {ApiError}

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    asyncio.run(story())


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "ftp://example.com/a", "gopher://example.com/", "http://", "http:///a", "http://a b/",
        "http://example.com/a\r\nX: y", "http://example.com/a b", "http://user:secret@example.com/", "http://[::1/a",
        "http://example.com:99999/", "http://example.com:x/", "http://[fe80::1%25eth0]/", "http://" + "a" * 3000,
        "http://exa\0mple.com/", "//example.com/a", "http://" + "a" * 70 + ".com/", "http://example.com/é",
    ],
)  # fmt: skip
def test_urls_that_are_none(url):
    assert "no URL" in refusal(fetcher(1), url)


def test_urls_are_off_and_hosts_are_named():
    with Listener() as listener:
        url = f"http://a.example:{listener.port}/"
        off = Fetcher(hosts=(), max_bytes=10)
        assert "fetches no URLs" in refusal(off, url)
        known = {"resolves": [["127.0.0.1"]], "allows": lambda address: True}
        named = Fetcher(hosts=("*.example.org", "b.example", "*"), max_bytes=10)
        assert "fetches nothing from a.example" in refusal(named, url)  # * is for the usual ports alone
        assert get(fetcher(listener.port, host="*.example", **known), url) == b"hello"
        assert listener.seen == 1


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\nContent-Length: 0\r\n\r\n", "leads on"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "status 404"),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 1\r\n\r\nx", "compressed"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2000\r\n\r\n" + b"x" * 2000, "larger than"),
        ([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", *[b"1\r\nx\r\n"] * 2000], "larger"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\nx", "could not be fetched"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000, "could not be fetched"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "could not be fetched"),
        (b"", "could not be fetched"),
    ],
)  # fmt: skip
def test_odd_answers_are_refused_in_one_sentence(answer, says):
    with Listener(answer) as listener:
        allowed = fetcher(listener.port, resolves=[["127.0.0.1"]], allows=lambda address: True)
        assert says in refusal(allowed, f"http://a.example:{listener.port}/")


def test_answers_that_never_come_and_places_that_are_not_there():
    silent = socket.create_server(("127.0.0.1", 0))
    port = silent.getsockname()[1]
    options = {"resolves": [["127.0.0.1"], ["127.0.0.1"]], "allows": lambda address: True}
    waits = fetcher(port, timeout_s=0.3, **options)
    assert "did not send" in refusal(waits, f"http://a.example:{port}/")
    silent.close()
    assert "could not be fetched" in refusal(waits, f"http://a.example:{port}/")


def certificate(folder, name):
    """The files of a certificate that vouches for itself."""
    files = folder / "cert.pem", folder / "key.pem"
    asked = (
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "1",
        "-subj",
        f"/CN={name}",
    )
    names = ("-addext", f"subjectAltName=DNS:{name}", "-out", str(files[0]), "-keyout", str(files[1]))
    subprocess.run(["openssl", "req", "-x509", *asked, *names], check=True, capture_output=True)
    return files


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate with")
def test_a_secure_place_is_held_to_its_name_though_its_address_is_connected_to(tmp_path):
    cert, key = certificate(tmp_path, "a.example")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    with Listener() as listener:
        listener.wrap = lambda connection: context.wrap_socket(connection, server_side=True)
        known = {"allows": lambda address: True, "tls": ssl.create_default_context(cafile=str(cert))}
        addresses = [["127.0.0.1"], ["127.0.0.1"]]
        allowed = fetcher(listener.port, resolves=addresses, **known)
        assert get(allowed, f"https://a.example:{listener.port}/") == b"hello"
        assert "could not be fetched" in refusal(allowed, f"https://b.example:{listener.port}/")


def test_a_certificate_of_somebody_else_is_refused():
    with Listener() as listener:
        allowed = fetcher(listener.port, resolves=[["127.0.0.1"]], allows=lambda address: True)
        assert "could not be fetched" in refusal(allowed, f"https://a.example:{listener.port}/")
