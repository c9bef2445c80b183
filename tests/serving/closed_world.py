"""A server that fetches pictures, in a process from which no connection leads anywhere but to one web server here.

Run as a program it serves with the options of serve.py and `--web PORT`. Names are looked up in a table; every address
leads to that port, and a line "connected ADDRESS" tells which address it would have been.
"""

import dataclasses
import itertools
import socket
import sys

from qwenvl_jax.serving.media import ImageLimits
from qwenvl_jax.serving.settings import Settings

PUBLIC, OTHER, INNER = "93.184.216.34", "8.8.4.4", "10.0.0.7"
NAMES = {
    "pictures.example": [PUBLIC],
    "other.example": [OTHER],
    "inner.example": [INNER],
    "both.example": [PUBLIC, INNER],
    "localhost": ["127.0.0.1"],
}
LIMITS = ImageLimits(max_bytes=2**20, download_seconds=1.5)
real_look_up, real_connect = socket.getaddrinfo, socket.create_connection
moving = itertools.cycle([PUBLIC, INNER])


def look_up(host, port, *arguments, **options):
    """As the C library reads numbers, which asks no other machine; names are those of the table."""
    try:
        options["flags"] = socket.AI_NUMERICHOST
        return real_look_up(host, port, *arguments, **options)
    except socket.gaierror:
        addresses = [next(moving)] if host == "moving.example" else NAMES.get(host)
        if addresses is None:
            raise
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]


class ClosedSocket(socket.socket):
    """Connects to the web server here and to nothing else, whoever asks."""

    web: int

    def connect(self, address):
        if address != ("127.0.0.1", self.web):
            print(f"escaped {address}", flush=True)
            raise PermissionError("this process has no network")
        super().connect(address)


def main() -> int:
    import simple_engine  # which is found where this is run as a program

    at = sys.argv.index("--web")
    ClosedSocket.web = int(sys.argv[at + 1])
    del sys.argv[at : at + 2]

    def connect(address, timeout=None, *_arguments, **_options):
        print(f"connected {address[0]}", flush=True)
        return real_connect(("127.0.0.1", ClosedSocket.web), timeout)

    socket.socket, socket.getaddrinfo, socket.create_connection = ClosedSocket, look_up, connect

    def smaller(settings: Settings) -> Settings:
        return dataclasses.replace(settings, image_limits=LIMITS)

    return simple_engine.main(smaller)


if __name__ == "__main__":
    sys.exit(main())
