"""The guard around fetched pictures. The socket layer is replaced throughout: no test can leave the machine."""

import gzip
import http.server
import io
import ipaddress
import socket
import threading

import pytest
from PIL import Image

from qwenvl_jax.config import UserError
from qwenvl_jax.processing.download import DownloadLimits, download, host_name, is_public
from qwenvl_jax.processing.image_errors import ImageError
from qwenvl_jax.processing.images import load_image

PUBLIC = "93.184.216.34"
REAL_LOOK_UP = socket.getaddrinfo


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
    with pytest.raises(ImageError) as blocked:
        download("http://pictures.example/a.png")
    del names["pictures.example"]  # a name that does not exist must look the same
    with pytest.raises(ImageError) as absent:
        download("http://pictures.example/a.png")
    assert blocked.value.code == "invalid_image_url"
    assert blocked.value.args == absent.value.args
    assert address not in str(blocked.value)
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
    with pytest.raises(UserError, match=r"inside: own\.example does not exist or has an address that is not public"):
        download("http://pictures.example/inside")
    with pytest.raises(UserError, match=r"not an http\(s\) URL"):
        download("http://pictures.example/file")
    with pytest.raises(UserError, match="redirected more than 3 times"):
        download("http://pictures.example/loop")
    assert {host for host, _ in connected} == {PUBLIC}


@pytest.mark.parametrize("length", [None, "5", "1000000000000", "-1", "nonsense"])
def test_too_large_a_body_is_refused(internet, length):
    pages, _, _ = internet
    pages["/large"] = (200, {} if length is None else {"Content-Length": length}, b"x" * (2**20 + 1))
    if length == "5":  # no more is read than was announced
        assert download("http://pictures.example/large") == b"xxxxx"
        return
    with pytest.raises(ImageError, match="more than 1 MiB") as caught:
        download("http://pictures.example/large", DownloadLimits(max_bytes=2**20))
    assert caught.value.code == "image_file_too_large"


def test_too_short_and_compressed_bodies_are_refused(internet):
    pages, _, _ = internet
    pages["/short"] = (200, {"Content-Length": "100"}, b"x" * 99)
    pages["/chunks"] = (200, {"Transfer-Encoding": "chunked"}, b"ffff\r\nabc")
    pages["/gzip"] = (200, {"Content-Encoding": "gzip"}, gzip.compress(bytes(2**20)))
    for path, message in [("short", "ended before"), ("chunks", "cannot be fetched"), ("gzip", "compressed")]:
        with pytest.raises(ImageError, match=message) as caught:
            download(f"http://pictures.example/{path}")
        assert caught.value.code == "failed_to_download_image"


def test_a_silent_and_a_dripping_server_are_given_up(monkeypatch):
    limits = DownloadLimits(seconds_silent=0.2, seconds_in_all=0.3)
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, **_: [(2, 1, 6, "", (PUBLIC, port))])
    for scheme, drip in [("http", b""), ("http", b"HTTP/1.1 200 OK\r\n\r\n"), ("http", b"HTTP"), ("https", b"\x16")]:
        ours, theirs = socket.socketpair()
        monkeypatch.setattr(socket, "create_connection", lambda address, timeout, ours=ours: timed(ours, timeout))
        stop = threading.Event()
        sender = threading.Thread(target=drip_slowly, args=(theirs, drip, stop))
        sender.start()
        with pytest.raises(ImageError, match="took longer than" if drip[:4] == b"HTTP" else "cannot be fetched|longer"):
            download(f"{scheme}://pictures.example/slow", limits)
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


def test_a_slow_chain_of_redirects_shares_one_deadline(internet):
    pages, _, connected = internet
    pages["/loop"] = (302, {"Location": "/loop"}, b"")
    with pytest.raises(ImageError, match="longer than 0 seconds|timed out"):
        download("http://pictures.example/loop", DownloadLimits(seconds_in_all=0))
    assert len(connected) <= 1


@pytest.mark.parametrize(
    "host",
    ["2130706433", "0177.0.0.1", "0x7f.1", "0x7f000001", "127.1", "127.0.0.1.", "１２７。0.0.1", "[::1]", "LOCALHOST",
     "localhost.", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[fd00::1]"],
)  # fmt: skip
def test_spellings_of_inner_addresses_are_refused(internet, monkeypatch, host):
    _, names, connected = internet
    names["localhost"] = ["127.0.0.1"]
    fake = socket.getaddrinfo

    def look_up(name, port, **options):
        """As the C library reads numbers, which asks no other machine; names are those of the fixture."""
        try:
            return REAL_LOOK_UP(name, port, flags=socket.AI_NUMERICHOST, **options)
        except socket.gaierror:
            return fake(name, port, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with pytest.raises(ImageError, match="has an address that is not public") as caught:
        download(f"HTTP://{host}/a.png")
    assert caught.value.code == "invalid_image_url"
    assert not connected


@pytest.mark.parametrize(
    "url",
    ["http://pictures.example\\@own.example/", "http://own.example\\.pictures.example/", "http://user@pictures.example/",
     "http://user:word@pictures.example/", "http://pictures.example%2f@own.example/", "http://own.exa\tmple/",
     "http://a b/", "http://pictures.example\r\nHost: own.example/", "http://own.example%00.pictures.example/", "http://a..b/",
     "http://[fe80::1%25eth0]/", "http://\ud800.example/", "http://" + "a" * 70 + ".example/",
     "http://x/" + "a" * 9000],
)  # fmt: skip
def test_urls_that_parsers_read_differently_are_refused(internet, url):
    _, names, connected = internet
    names["own.example"] = [PUBLIC]
    with pytest.raises(ImageError) as caught:
        download(url)
    assert caught.value.code == "invalid_image_url"
    assert len(str(caught.value).encode()) < 500
    assert not connected


def test_the_connection_uses_the_address_that_was_checked_though_the_name_moves(internet, monkeypatch):
    pages, names, connected = internet
    pages["/a.png"] = (200, {}, png())
    answers = iter([[PUBLIC], ["127.0.0.1"]])
    asked = socket.getaddrinfo

    def moving(host, port, **options):
        names[host] = next(answers)
        return asked(host, port, **options)

    monkeypatch.setattr(socket, "getaddrinfo", moving)
    assert download("http://pictures.example/a.png") == png()
    assert connected == [(PUBLIC, 80)]


def test_only_allowed_hosts_are_asked_at_every_redirect(internet):
    pages, names, connected = internet
    names |= {"other.example": [PUBLIC], "xn--bcher-kva.example": [PUBLIC]}
    limits = DownloadLimits(allowed_hosts=(host_name("Pictures.Example."), host_name("bücher.example")))
    pages["/a.png"] = (200, {}, b"body")
    pages["/away"] = (302, {"Location": "//other.example/a.png"}, b"")
    for url in (
        "http://PICTURES.example/a.png",
        "http://pictures.example./a.png#@other.example/",
        "http://bücher.example/a.png",
    ):
        assert download(url, limits) == b"body"
    for url in ("http://other.example/a.png", "http://pictures.example/away", "http://a.pictures.example/a.png"):
        with pytest.raises(ImageError, match="is not among the hosts") as caught:
            download(url, limits)
        assert caught.value.code == "invalid_image_url"
    assert len(connected) == 4


def test_hosts_by_ipv6_address_are_asked_by_their_name(internet):
    pages, names, connected = internet
    names["2606:4700::1111"] = ["2606:4700::1111"]
    pages["/a.png"] = (200, {}, b"body")
    assert download("http://[2606:4700::1111]:8080/a.png") == b"body"
    assert connected == [("2606:4700::1111", 8080)]


def test_failures_name_the_url(internet):
    for url, message in [
        ("http://pictures.example/absent.png", "the server answered 404"),
        ("http://unknown.example/a.png", "does not exist or has an address that is not public"),
        ("http://pictures.example:99999/a.png", "not a URL that can be read"),
        ("http:///a.png", "not an http"),
        ("http://[::1/a.png", "not a URL that can be read"),
        ("https://pictures.example/a.png", "cannot be fetched"),  # the server speaks no TLS
    ]:
        with pytest.raises(UserError, match=message) as caught:
            load_image(url, allow_url=True)
        assert url in str(caught.value)
