"""The `qwenvl-serve` command. The server is not part of this release; the command is there to say so."""

import sys


def main() -> int:
    """Say in one line that there is no server yet; exit status 2."""
    print(
        "qwenvl-serve: the server is not part of this release; use qwenvl-demo or the Python interface", file=sys.stderr
    )
    return 2
