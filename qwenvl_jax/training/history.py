"""What `log.jsonl` remembers of a run, read back: its rows, and each time that the program was started."""

import dataclasses
import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows of a log; a line that a killed program left half written is passed over."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def of_kind(rows: list[Row], kind: str) -> list[Row]:
    """The rows of training steps ("train") or of evaluations ("evaluation")."""
    return [row for row in rows if row["kind"] == kind]


def points(rows: list[Row], name: str) -> list[tuple[float, float]]:
    """(step, value) wherever a row has a number of this name."""
    return [(row["step"], row[name]) for row in rows if row.get(name) is not None]


@dataclasses.dataclass(frozen=True)
class Start:
    """One time that the program ran: its first row, its last sign of life, and how it ended; None: nobody knows."""

    first: Row
    last: Row
    how: str | None
    message: str = ""

    @property
    def seconds(self) -> float:
        return self.last["time"] - self.first["time"]


def starts(rows: list[Row]) -> list[Start]:
    """Every start of the program, in order. One that neither ended nor was the last has been killed."""
    places = [place for place, row in enumerate(rows) if row["kind"] == "start"]
    found = []
    for place, after in zip(places, [*places[1:], len(rows)], strict=True):
        last = rows[after - 1]
        ended = last["kind"] == "end"
        how = last["how"] if ended else None if after == len(rows) else "killed"
        found.append(Start(rows[place], last, how, last["message"] if ended else ""))
    return found
