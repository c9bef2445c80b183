"""Scores that others published, by task, with the source of each: published.json.

Numbers are copied from the sources as they stand there. Those whose source was not at hand, and third parties'
measurements, have `verified` false and are shown so. Later families are listed for scale; prompts and picture sizes
differ, so only the scores of the Qwen-VL family are ones to reach.
"""

import dataclasses
import functools
import json
from pathlib import Path

FILE = Path(__file__).with_name("published.json")


@dataclasses.dataclass(frozen=True)
class Published:
    """A published score. score: which of the task's, "" for its headline. source: its title; where: where to find it.
    task: the split that it is of, which may be another one than asked for."""

    task: str
    model: str
    value: float
    source: str
    where: str
    score: str = ""
    verified: bool = True
    note: str = ""


@functools.cache
def _read() -> tuple[tuple[Published, ...], dict[str, str]]:
    kept = json.loads(FILE.read_text(encoding="utf-8"))
    titles = {key: (source["title"], source["where"]) for key, source in kept["sources"].items()}
    rows = []
    for row in kept["scores"]:
        title, where = titles[row["source"]]
        rows.append(Published(**row | {"source": title, "where": where}))
    return tuple(rows), kept["near"]


def published(task: str) -> tuple[Published, ...]:
    """What is published of a task, or else of a split near it (DocVQA's test set for its validation set)."""
    rows, near = _read()
    exact = tuple(row for row in rows if row.task == task)
    return exact or tuple(row for row in rows if row.task == near.get(task))


def published_for(task: str, score: str, headline: bool) -> tuple[Published, ...]:
    """Those of one score: of the name given, or of the task's headline."""
    return tuple(
        row
        for row in published(task)
        if (headline and not row.score) or (row.score and row.score.casefold() == score.casefold())
    )


def tasks() -> tuple[str, ...]:
    """All tasks of which something is published."""
    return tuple(dict.fromkeys(row.task for row in _read()[0]))
