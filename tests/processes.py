"""Programs of the project as processes of their own."""

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
SECONDS_TO_START = 300  # on a machine that others use, too


class Process:
    """`python script options`, killed at the end of its block. `lines`: what it has written so far, both streams."""

    def __init__(self, script: Path, *options: str, env: dict[str, str] | None = None):
        environment = os.environ | {"PYTHONUNBUFFERED": "1"} | (env or {})
        self.process = subprocess.Popen(
            [sys.executable, str(script), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=REPOSITORY,
            env=environment,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.started()
        except BaseException:
            self.process.kill()  # nobody else would
            raise

    def started(self) -> None:
        """Returns when the process can be used."""

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        self.process.stdout.close()

    def line(self, pattern: str) -> re.Match:
        """The first line that holds a pattern; waits for it."""
        end = time.monotonic() + SECONDS_TO_START
        ended = False
        while not ended and time.monotonic() < end:
            if ended := self.process.poll() is not None:
                self._reader.join()  # all that it wrote
            for line in list(self.lines):
                if found := re.search(pattern, line.rstrip()):
                    return found
            time.sleep(0.02)
        raise AssertionError(f"no line {pattern!r} in {''.join(self.lines)}")

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line)
