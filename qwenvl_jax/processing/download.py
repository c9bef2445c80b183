"""Fetches a picture from an http(s) URL that someone else chose, without being led into the own network.

Every address that the host name stands for must be public, and the connection goes to the very address that was
checked (a second look-up could answer differently). Redirects are followed by hand and checked the same way. Size and
time are limited. No proxy and no cookie is used.
"""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import urllib.parse

from qwenvl_jax.config import UserError

MAX_BYTES = 32 * 1024 * 1024
SECONDS_SILENT = 10  # without a byte from the other side
SECONDS_IN_ALL = 30  # one request, against servers that drip
MAX_REDIRECTS = 3
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_REDIRECTS = (301, 302, 303, 307, 308)


def download(url: str) -> bytes:
    """The body behind `url`. Raises UserError naming the URL when it is refused, too large, too slow or not there."""
    shown = url if len(url) <= 200 else url[:200] + "..."
    try:
        for _ in range(MAX_REDIRECTS + 1):
            body, location = _request(url)
            if location is None:
                return body
            url = urllib.parse.urljoin(url, location)
    except UserError as error:
        raise UserError(f"{shown}: {error}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: ports and names that are none
        raise UserError(f"{shown}: cannot be fetched ({str(error) or type(error).__name__})") from None
    raise UserError(f"{shown}: redirected more than {MAX_REDIRECTS} times")


def _request(url: str) -> tuple[bytes, str | None]:
    """One GET. Returns the body, or where a redirect points to."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError("not an http(s) URL")
    connection = _connect(parts.scheme, parts.hostname, parts.port)
    # A timeout on the socket only limits the silence between two bytes.
    too_late = threading.Event()
    watchdog = threading.Timer(SECONDS_IN_ALL, _shut, [connection.sock, too_late])
    watchdog.daemon = True
    watchdog.start()
    try:
        target = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
        query = urllib.parse.quote(parts.query, safe="/%:@!$&'()*+,;=~-._?")
        connection.request("GET", f"{target}?{query}" if query else target, headers={"User-Agent": "qwenvl-jax"})
        response = connection.getresponse()
        location = response.getheader("Location")
        if response.status in _REDIRECTS and location:
            return b"", location
        if response.status != 200:
            raise UserError(f"the server answered {response.status} {response.reason}")
        body = response.read(MAX_BYTES + 1)
        if len(body) > MAX_BYTES:
            raise UserError(f"more than {MAX_BYTES // 2**20} MiB")
        if too_late.is_set():
            raise UserError(f"took longer than {SECONDS_IN_ALL} seconds")
        return body, None
    finally:
        watchdog.cancel()
        connection.close()


def _connect(scheme: str, host: str, port: int | None) -> http.client.HTTPConnection:
    """A connection whose socket is already open, to an address that was checked."""
    connection = http.client.HTTPConnection(host)
    connection.default_port = 443 if scheme == "https" else 80  # left out of the Host header
    connection.port = port or connection.default_port
    raw = socket.create_connection((_public_address(host, connection.port), connection.port), SECONDS_SILENT)
    try:
        secure = scheme == "https"
        connection.sock = ssl.create_default_context().wrap_socket(raw, server_hostname=host) if secure else raw
    except BaseException:
        raw.close()
        raise
    return connection


def _public_address(host: str, port: int) -> str:
    """The first address of `host`; UserError when any of its addresses is not a public one."""
    addresses = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    for text in addresses:
        if not is_public(ipaddress.ip_address(text.split("%")[0])):
            raise UserError(f"{host} is {text}, which is not a public address; such URLs are refused")
    return addresses[0]


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether `address` is on the public internet. Tunnels (6to4, Teredo) are not: they can lead anywhere."""
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global and not address.is_multicast
    if address.ipv4_mapped:
        return is_public(address.ipv4_mapped)
    return address in _GLOBAL_UNICAST and address.is_global and not (address.teredo or address.sixtofour)


def _shut(connected: socket.socket, too_late: threading.Event) -> None:
    too_late.set()  # first: what is being read ends with the next line, and would pass for the whole
    with contextlib.suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)
