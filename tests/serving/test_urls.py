"""Pictures by URL over HTTP, in a server process from which nothing can leave the machine (`closed_world.py`).

One request or few for each way to go wrong; the guard itself is tested in `processing/test_download.py`.
"""

import concurrent.futures
import gzip
import http.server
import io
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from serving.closed_world import INNER, OTHER, PUBLIC
from serving.process import ServerProcess, chat, check_error, user

PATH = "/v1/chat/completions"
PLACE = "messages.0.content.0.image_url.url"
SCRIPT = Path(__file__).parent / "closed_world.py"
NOT_PUBLIC = "does not exist or has an address that is not public"


def png(colour: str = "green") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), colour).save(buffer, "PNG")
    return buffer.getvalue()


class Web(http.server.ThreadingHTTPServer):
    """pages: status, headers and the pieces of a body by path. sent: bytes of the body that was sent last."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.pages: dict[str, tuple[int, dict[str, str], Callable[[], Iterator[bytes]]]] = {}
        self.visits: list[tuple[str, str]] = []
        self.sent = 0

    def page(self, path: str, *pieces: bytes, status: int = 200, **headers: str) -> None:
        self.pages[path] = (status, headers, lambda: iter(pieces))

    def handle_error(self, request, client_address) -> None:
        """A client that has gone is no error here."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Web

    def do_GET(self) -> None:
        self.server.visits.append((self.headers["host"], self.path))
        status, headers, body = self.server.pages.get(self.path, (404, {}, lambda: iter([b"not here"])))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.server.sent = 0
        for piece in body():
            self.wfile.write(piece)
            self.server.sent += len(piece)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    server = Web()
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def fetching(web) -> Iterator[ServerProcess]:
    with ServerProcess("--allow-urls", "--web", str(web.server_address[1]), script=SCRIPT) as process:
        yield process
        assert not any("escaped" in line for line in process.lines)


@pytest.fixture
def ask(fetching):
    """Asks about the picture at a URL, and tells the addresses that the server would have connected to."""

    def asked(url: str) -> tuple[Any, list[str]]:
        before = len(fetching.lines)
        message = user([{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}])
        response = fetching.client.post(PATH, json=chat(messages=message, max_tokens=3))
        fetching.line(response.headers["x-request-id"])  # the log of it is there, so what came before is, too
        addresses = [line.split()[1] for line in fetching.lines[before:] if line.startswith("connected")]
        return response, addresses

    return asked


@pytest.fixture
def refused(ask, fetching):
    """That a URL is refused with a code; gives the message and the addresses."""

    def check(url: str, code: str) -> tuple[str, list[str]]:
        before = fetching.metric("image_rejected_total", code=code)
        response, addresses = ask(url)
        message = check_error(response, 400, code, PLACE)
        assert fetching.metric("image_rejected_total", code=code) == before + 1
        return message, addresses

    return check


def test_a_picture_by_url_is_fetched(ask, web):
    web.page("/a.png", png())
    response, addresses = ask("http://pictures.example/a.png")
    assert response.status_code == 200
    assert response.json()["usage"]["prompt_tokens_details"]["image_tokens"] == 64
    assert addresses == [PUBLIC]
    assert web.visits[-1] == ("pictures.example", "/a.png")


def test_redirects_are_followed_three_times(ask, refused, web):
    for number in range(4):
        web.page(f"/hop{number}", status=302, Location=f"/hop{number + 1}")
    web.page("/hop4", png())
    web.page("/away", status=307, Location="http://other.example/hop4")
    response, addresses = ask("http://pictures.example/away")
    assert (response.status_code, addresses) == (200, [PUBLIC, OTHER])
    assert ask("http://pictures.example/hop1")[0].status_code == 200
    message, addresses = refused("http://pictures.example/hop0", "failed_to_download_image")
    assert "redirected more than 3 times" in message
    assert len(addresses) == 4


@pytest.mark.parametrize(
    ("target", "code"),
    [
        ("http://inner.example/a.png", "invalid_image_url"),
        ("http://127.0.0.1/a.png", "invalid_image_url"),
        ("http://169.254.169.254/latest/meta-data", "invalid_image_url"),
        ("file:///etc/passwd", "invalid_image_url"),
        ("data:image/png;base64,AAAA", "invalid_image_url"),
    ],
)
def test_no_redirect_leads_inside(refused, web, target, code):
    web.page("/inside", status=302, Location=target)
    _, addresses = refused("http://pictures.example/inside", code)
    assert addresses == [PUBLIC]


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "[::1]", "0.0.0.0", "10.0.0.5", "192.168.1.1", "169.254.169.254", "100.64.0.1", "[fc00::1]",
     "[::ffff:127.0.0.1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "2130706433", "0x7f000001", "0177.0.0.1", "127.1",
     "127.0.0.1.", "localhost", "LOCALHOST.", "inner.example", "both.example", "nothing.example"],
)  # fmt: skip
def test_addresses_of_the_own_network_look_like_names_that_do_not_exist(refused, host):
    message, addresses = refused(f"HTTP://{host}/a.png", "invalid_image_url")
    assert NOT_PUBLIC in message
    assert addresses == []


@pytest.mark.parametrize(
    "url",
    ["http://pictures.example\\@inner.example/", "http://user@pictures.example/", "http://user:word@pictures.example/",
     "http://pictures.example%2f@inner.example/", "http://inner.exa\tmple/", "http://[::1/", "http:///a.png",
     "http://pictures.example:99999/", "file:///etc/passwd", "FILE:/etc/passwd", "ftp://pictures.example/a.png",
     "/etc/passwd", "gopher://pictures.example/", "//pictures.example/a.png", "http:pictures.example/a.png"],
)  # fmt: skip
def test_urls_that_mean_two_things_or_none_are_refused(refused, url):
    _, addresses = refused(url, "invalid_image_url")
    assert addresses == []


def test_the_name_is_looked_up_once(ask, refused, web):
    """It leads to a public address, and to an inner one whenever it is asked again."""
    web.page("/a.png", png())
    response, addresses = ask("http://moving.example/a.png")
    assert (response.status_code, addresses) == (200, [PUBLIC])
    assert INNER not in addresses
    refused("http://moving.example/a.png", "invalid_image_url")


@pytest.mark.parametrize(
    ("status", "headers", "body", "code"),
    [
        (404, {}, b"not here", "failed_to_download_image"),
        (500, {}, b"broken", "failed_to_download_image"),
        (200, {}, b"", "empty_image_file"),
        (200, {"Content_Type": "image/png"}, b"<!doctype html><html>", "unsupported_image_media_type"),
        (200, {"Content_Length": "100000"}, png(), "failed_to_download_image"),
        (200, {"Content_Length": "99999999999"}, png(), "image_file_too_large"),
        (200, {"Content_Encoding": "gzip"}, gzip.compress(bytes(2**22)), "failed_to_download_image"),
        (200, {"Transfer_Encoding": "chunked"}, b"ffff\r\nabc", "failed_to_download_image"),
    ],
    ids=["404", "500", "empty", "html", "short", "announced", "gzip", "chunks"],
)
def test_what_is_no_picture(refused, web, status, headers, body, code):
    web.page("/wrong", body, status=status, **headers)
    refused("http://pictures.example/wrong", code)


def test_an_endless_body_is_left_at_the_limit(refused, web):
    def endless() -> Iterator[bytes]:
        while True:
            yield bytes(2**16)

    web.pages["/endless"] = (200, {}, endless)
    message, _ = refused("http://pictures.example/endless", "image_file_too_large")
    assert "more than 1 MiB" in message
    assert web.sent < 2**24  # what fits between the two on their way


def test_a_dripping_server_is_given_up_and_holds_up_nobody_else(refused, web, fetching):
    def drip() -> Iterator[bytes]:
        while True:
            yield b"x"
            time.sleep(0.05)

    web.pages["/drip"] = (200, {}, drip)
    assert fetching.client.post(PATH, json=chat(max_tokens=1)).status_code == 200  # what it compiles is compiled
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        began = time.monotonic()
        slow = pool.submit(refused, "http://pictures.example/drip", "failed_to_download_image")
        while ("pictures.example", "/drip") not in web.visits:
            time.sleep(0.01)
        assert fetching.client.post(PATH, json=chat(max_tokens=1)).status_code == 200
        assert not slow.done()
        assert "longer than 1.5 seconds" in slow.result()[0]
        assert time.monotonic() - began < 6


def test_only_the_named_hosts_where_there_are_any(web):
    options = ("--allow-urls", "--allowed-host", "Pictures.Example", "--web", str(web.server_address[1]))
    web.page("/a.png", png())
    web.page("/leave", status=302, Location="http://other.example/a.png")
    with ServerProcess(*options, script=SCRIPT) as server:
        for url, status in (
            ("http://pictures.example./a.png", 200),
            ("http://other.example/a.png", 400),
            ("http://pictures.example/leave", 400),
        ):
            body = {"model": "tiny", "messages": user([{"type": "image_url", "image_url": {"url": url}}])}
            response = server.client.post("/tokenize", json=body)  # which compiles nothing
            assert response.status_code == status, response.text
            if status == 400:
                assert "not among the hosts" in check_error(response, 400, "invalid_image_url", PLACE)
