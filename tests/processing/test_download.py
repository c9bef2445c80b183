"""The guard around fetched pictures. The socket layer is replaced throughout: no test can leave the machine."""

import http.server
import io
import ipaddress
import socket
import threading

import pytest
from PIL import Image

from qwenvl_jax.config import UserError
from qwenvl_jax.processing import download as module
from qwenvl_jax.processing.download import download, is_public
from qwenvl_jax.processing.images import load_image

PUBLIC = "93.184.216.34"


@pytest.fixture
def internet(monkeypatch):
    """A web server on this machine that all public addresses lead to; yields pages, names, visits."""
    pages: dict[str, tuple[int, dict[str, str], bytes]] = {}
    names = {"pictures.example": [PUBLIC]}
    connected: list[tuple[str, int]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, headers, body = pages.get(self.path, (404, {}, b""))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()

    def look_up(host, port, **_):
        if host not in names:
            raise socket.gaierror("no such host")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in names[host]]

    def connect(address, timeout):
        connected.append(address)
        client = timed(socket.socket(), timeout)
        client.connect(server.server_address)
        return client

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(socket, "create_connection", connect)
    yield pages, names, connected
    server.shutdown()
    server.server_close()


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), "green").save(buffer, "PNG")
    return buffer.getvalue()


def test_a_picture_is_fetched_from_the_address_that_was_checked(internet):
    pages, _, connected = internet
    pages["/a%20b.png?size=1"] = (200, {}, png())
    assert load_image("http://pictures.example/a b.png?size=1", allow_url=True).size == (3, 2)
    assert connected == [(PUBLIC, 80)]


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.0.0.5", "169.254.169.254", "192.168.1.1", "0.0.0.0", "224.0.0.1", "100.64.0.1", "::1", "fe80::1"],
)
def test_addresses_of_the_own_network_are_refused(internet, address):
    _, names, connected = internet
    names["pictures.example"] = [PUBLIC, address]  # one public address does not excuse the other
    with pytest.raises(UserError, match=f"is {address}, which is not a public address"):
        download("http://pictures.example/a.png")
    assert not connected


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("::ffff:8.8.8.8", True),
        ("::ffff:127.0.0.1", False),
        ("::127.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("2001:0:53aa:64c::1", False),
        ("fec0::1", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("240.0.0.1", False),
    ],
)
def test_what_counts_as_public(text, public):
    assert is_public(ipaddress.ip_address(text)) is public


def test_redirects_are_followed_and_checked(internet):
    pages, names, connected = internet
    names["own.example"] = ["10.0.0.1"]
    pages["/once"] = (302, {"Location": "/picture"}, b"")
    pages["/picture"] = (200, {}, b"body")
    pages["/inside"] = (301, {"Location": "http://own.example/secret"}, b"")
    pages["/file"] = (301, {"Location": "file:///etc/passwd"}, b"")
    pages["/loop"] = (302, {"Location": "/loop"}, b"")
    assert download("http://pictures.example/once") == b"body"
    with pytest.raises(UserError, match=r"inside: own\.example is 10\.0\.0\.1"):
        download("http://pictures.example/inside")
    with pytest.raises(UserError, match=r"not an http\(s\) URL"):
        download("http://pictures.example/file")
    with pytest.raises(UserError, match="redirected more than 3 times"):
        download("http://pictures.example/loop")
    assert {host for host, _ in connected} == {PUBLIC}


def test_too_large_a_body_is_refused(internet, monkeypatch):
    pages, _, _ = internet
    monkeypatch.setattr(module, "MAX_BYTES", 2**20)
    pages["/large"] = (200, {}, b"x" * (2**20 + 1))
    with pytest.raises(UserError, match="more than 1 MiB"):
        download("http://pictures.example/large")


def test_a_silent_and_a_dripping_server_are_given_up(monkeypatch):
    monkeypatch.setattr(module, "SECONDS_SILENT", 0.2)
    monkeypatch.setattr(module, "SECONDS_IN_ALL", 0.3)
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, **_: [(2, 1, 6, "", (PUBLIC, port))])
    for drip in (b"", b"HTTP/1.1 200 OK\r\n\r\n"):
        ours, theirs = socket.socketpair()
        monkeypatch.setattr(socket, "create_connection", lambda address, timeout, ours=ours: timed(ours, timeout))
        stop = threading.Event()
        sender = threading.Thread(target=drip_slowly, args=(theirs, drip, stop))
        sender.start()
        with pytest.raises(UserError, match=r"cannot be fetched|took longer than"):
            download("http://pictures.example/slow")
        stop.set()
        sender.join()
        theirs.close()


def timed(connected: socket.socket, seconds: float) -> socket.socket:
    connected.settimeout(seconds)
    return connected


def drip_slowly(connected: socket.socket, start: bytes, stop: threading.Event) -> None:
    """Sends `start` and then, where it is not empty, a byte every now and then."""
    try:
        connected.sendall(start)
        while start and not stop.wait(0.05):
            connected.sendall(b"x")
    except OSError:
        pass


def test_failures_name_the_url(internet):
    for url, message in [
        ("http://pictures.example/absent.png", "the server answered 404"),
        ("http://unknown.example/a.png", "no such host"),
        ("http://pictures.example:99999/a.png", "cannot be fetched"),
        ("http:///a.png", "not an http"),
        ("http://[::1/a.png", "cannot be fetched"),
        ("https://pictures.example/a.png", "cannot be fetched"),  # the server speaks no TLS
    ]:
        with pytest.raises(UserError, match=message) as caught:
            load_image(url, allow_url=True)
        assert url in str(caught.value)
