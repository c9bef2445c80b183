"""Fetches a picture from an http(s) URL that someone else chose, without being led into the own network.

A URL is taken apart once, and what is checked is what is used: every address that the host name stands for must be
public, and the connection goes to the very address that was checked (a second look-up could answer differently).
Redirects are followed by hand and checked the same way. Size and time are limited. No proxy, cookie or password is
used, and nothing is unpacked: a compressed answer is refused. A name that does not exist and one that leads into the
own network get the same answer, or the difference would tell strangers about that network.
"""

import contextlib
import dataclasses
import functools
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Iterator

from qwenvl_jax.processing.image_errors import Code, ImageError, shortened

_LONGEST_URL = 8192
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_REDIRECTS = (301, 302, 303, 307, 308)
# Parsers disagree about where the host ends in a URL with these, and no honest one has them.
_TREACHEROUS = re.compile(r"[\x00-\x1f\x7f\\]")
_HOST = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*|[0-9a-f:.]+")  # a name or IPv4 address, or an IPv6 address


@dataclasses.dataclass(frozen=True)
class DownloadLimits:
    """allowed_hosts: the names, as `host_name` gives them, that may be fetched from; empty for all public ones."""

    max_bytes: int = 32 * 2**20
    seconds_silent: float = 10  # without a byte from the other side
    seconds_in_all: float = 30  # with redirects, against servers that drip
    max_redirects: int = 3
    allowed_hosts: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Target:
    """A URL taken apart."""

    secure: bool
    host: str
    port: int
    path: str  # with the query


def download(url: str, limits: DownloadLimits | None = None) -> bytes:
    """The body behind `url`. Raises ImageError naming the URL when it is refused, too large, too slow or not there."""
    limits = limits or DownloadLimits()
    shown = shortened(url, 200)
    deadline = time.monotonic() + limits.seconds_in_all
    try:
        for _ in range(limits.max_redirects + 1):
            body, location = _request(_target(url, limits.allowed_hosts), limits, deadline)
            if location is None:
                return body
            url = urllib.parse.urljoin(url, location)
    except ImageError as error:
        raise error.at(shown) from None
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a redirect to what is no URL
        reason = f"cannot be fetched ({shortened(str(error) or type(error).__name__)})"
        raise ImageError("failed_to_download_image", reason, shown) from None
    raise ImageError("failed_to_download_image", f"redirected more than {limits.max_redirects} times", shown)


def host_name(host: str) -> str:
    """The one spelling of a host's name: lower case, ASCII (IDNA), no dot at the end. ValueError for what is none."""
    name = host.lower() if ":" in host else host.encode("idna").decode("ascii").lower().removesuffix(".")
    if not _HOST.fullmatch(name):
        raise ValueError(f"{shortened(host)!r} is not the name of a host")
    return name


def _target(url: str, allowed_hosts: tuple[str, ...]) -> _Target:
    """The only place that reads a URL."""
    if len(url) > _LONGEST_URL or _TREACHEROUS.search(url):
        raise _refused(f"not a URL that is fetched: a backslash, a control character or over {_LONGEST_URL} characters")
    try:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise _refused("not an http(s) URL")
        if "@" in parts.netloc:
            raise _refused("a URL with a user name or password; give one without")
        secure = parts.scheme == "https"
        host, port = host_name(parts.hostname), parts.port or (443 if secure else 80)
        path = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
        query = urllib.parse.quote(parts.query, safe="/%:@!$&'()*+,;=~-._?")
    except ImageError:
        raise
    except ValueError as error:  # brackets, ports, names and half surrogate pairs
        raise _refused(f"not a URL that can be read ({shortened(str(error))})") from None
    if allowed_hosts and host not in allowed_hosts:
        raise _refused(f"{shortened(host)} is not among the hosts that pictures are fetched from")
    return _Target(secure, host, port, f"{path}?{query}" if query else path)


def _request(target: _Target, limits: DownloadLimits, deadline: float) -> tuple[bytes, str | None]:
    """One GET. Returns the body, or where a redirect points to."""
    connection = _connect(target, min(limits.seconds_silent, deadline - time.monotonic()))
    try:
        with _shut_at(deadline, connection.sock, limits.seconds_in_all):
            if isinstance(connection.sock, ssl.SSLSocket):
                connection.sock.do_handshake()
            connection.request("GET", target.path, headers={"User-Agent": "qwenvl-jax"})
            response = connection.getresponse()
            location = response.getheader("Location")
            if response.status in _REDIRECTS and location:
                return b"", location
            return _body(response, limits.max_bytes), None
    finally:
        connection.close()


def _body(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    if response.status != 200:
        raise _failed(f"the server answered {response.status}")
    if response.getheader("Content-Encoding", "identity").lower() != "identity":
        raise _failed("the server sent the picture compressed, though it was asked not to")
    announced = response.length
    body = b"" if announced is not None and announced > max_bytes else response.read(max_bytes + 1)
    if len(body) > max_bytes or (announced is not None and announced > max_bytes):
        raise _failed(f"more than {max_bytes / 2**20:g} MiB", "image_file_too_large")
    if response.length:
        raise _failed("the connection ended before the picture did")
    return body


def _connect(target: _Target, seconds_silent: float) -> http.client.HTTPConnection:
    """A connection whose socket is already open, to an address that was checked; TLS has yet to shake hands."""
    if seconds_silent <= 0:
        raise TimeoutError("timed out")
    connection = http.client.HTTPConnection(f"[{target.host}]" if ":" in target.host else target.host)
    connection.default_port = 443 if target.secure else 80  # left out of the Host header
    connection.port = target.port
    raw = socket.create_connection((_public_address(target), target.port), seconds_silent)
    try:
        connection.sock = raw
        if target.secure:
            connection.sock = _tls().wrap_socket(raw, server_hostname=target.host, do_handshake_on_connect=False)
    except BaseException:
        raw.close()
        raise
    return connection


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _public_address(target: _Target) -> str:
    """The first address of the host; ImageError when it has none, or any that is not public."""
    try:
        found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except OSError:
        found = []
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(is_public(ipaddress.ip_address(text.split("%")[0])) for text in addresses):
        raise _refused(f"{shortened(target.host)} does not exist or has an address that is not public")
    return addresses[0]


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether `address` is on the public internet. Tunnels (6to4, Teredo) are not: they can lead anywhere."""
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global and not address.is_multicast
    if address.ipv4_mapped:
        return is_public(address.ipv4_mapped)
    return address in _GLOBAL_UNICAST and address.is_global and not (address.teredo or address.sixtofour)


@contextlib.contextmanager
def _shut_at(deadline: float, connected: socket.socket, seconds: float) -> Iterator[None]:
    """Ends the connection at the deadline: a timeout on the socket only limits the silence between two bytes."""
    too_late = threading.Event()

    def shut() -> None:
        too_late.set()
        with contextlib.suppress(OSError):
            socket.socket.shutdown(connected, socket.SHUT_RDWR)  # TLS's own takes its state from under the reader

    watchdog = threading.Timer(max(0.0, deadline - time.monotonic()), shut)
    watchdog.daemon = True
    watchdog.start()
    try:
        yield
    finally:
        watchdog.cancel()
        if too_late.is_set():  # what was read then ends somewhere, and must not pass for the whole
            raise _failed(f"took longer than {seconds:g} seconds") from None


def _refused(reason: str) -> ImageError:
    return ImageError("invalid_image_url", reason)


def _failed(reason: str, code: Code = "failed_to_download_image") -> ImageError:
    return ImageError(code, reason)
