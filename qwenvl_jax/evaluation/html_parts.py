"""What the pages about an evaluation are made of: runs, pictures with boxes, questions with replies.

Predictions are others' text: all of it is escaped and bounded. A picture is opened as one or left out.
"""

import base64
import collections
import dataclasses
import io
import json
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from qwenvl_jax.config import UserError
from qwenvl_jax.evaluation.scores import Scores
from qwenvl_jax.evaluation.task import Prediction
from qwenvl_jax.pages.page import e
from qwenvl_jax.processing import boxes, images
from qwenvl_jax.processing.boxes import Box

SIDE = 448  # pixels of the longer side of a shown picture
LONGEST = 700  # letters of a shown text
FOLDED = 240  # letters of a reply; the others are folded away
MOST_ANSWERS = 6  # of a reference
LARGEST_FILE = 64 * 2**20  # bytes
_CORNERS = re.compile(r"\([^()]{1,20}\),\([^()]{1,20}\)")


@dataclasses.dataclass(frozen=True)
class Run:
    """A file of predictions and what they score. folder: where the pictures' names count from."""

    name: str
    manifest: Mapping[str, Any]
    predictions: Sequence[Prediction]
    scores: Scores
    folder: Path


def shortened(text: str, longest: int = LONGEST) -> str:
    """Text as markup, cut where it is long."""
    more = len(text) - longest
    return e(text) if more <= 0 else f'{e(text[:longest])}… <span class="more">{more:,} letters more</span>'


def reply_text(prediction: Prediction) -> str:
    """The reply as markup, or why there is none."""
    if prediction.error is not None:
        return f'<span class="otherwise">failed: {shortened(prediction.error)}</span>'
    first, rest = prediction.reply[:FOLDED], prediction.reply[FOLDED:]
    if not rest:
        return e(first) or '<span class="more">an empty reply</span>'
    return f"{e(first)}<details><summary>{len(rest):,} letters more</summary>{shortened(rest)}</details>"


def reference_text(reference: Mapping[str, Any]) -> str:
    """What was expected as markup: answers by how many gave them, the right choice with its text, or all there is."""
    choices, answer = _choices(reference), right_choice(reference)
    if answer is not None:
        return shortened(f"{string.ascii_uppercase[answer]}. {choices[answer]}" if choices else f"choice {answer + 1}")
    if "box" in reference:
        return f"{_values(reference['box'], numbers=True)} in pixels"
    for name in ("answers", "references", "answer"):
        if name in reference:
            return _values(reference[name])
    lines = [f"{e(str(name))}: {_values(value)}" for name, value in reference.items()]
    return "<br>".join(lines[:MOST_ANSWERS])


def _values(value: Any, numbers: bool = False) -> str:
    if not isinstance(value, (list, tuple)) or numbers:
        return shortened(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    texts = [inner if isinstance(inner, str) else json.dumps(inner, ensure_ascii=False) for inner in value]
    counted = collections.Counter(texts).most_common()
    shown = [shortened(text, 200) + (f" × {count}" if count > 1 else "") for text, count in counted[:MOST_ANSWERS]]
    if len(counted) > MOST_ANSWERS:
        shown.append(f'<span class="more">{len(counted) - MOST_ANSWERS:,} more</span>')
    return "<br>".join(shown)


def _choices(reference: Mapping[str, Any]) -> list[str]:
    found = reference.get("choices")
    return [str(choice) for choice in found] if isinstance(found, (list, tuple)) else []


def right_choice(reference: Mapping[str, Any]) -> int | None:
    """The number of the right choice where the reference has choices and says so by number or letter."""
    choices, answer = _choices(reference), reference.get("answer")
    if isinstance(answer, str) and len(answer) == 1:
        answer = string.ascii_uppercase.find(answer.upper())
    return answer if isinstance(answer, int) and 0 <= answer < len(choices) else None


def likelihoods(prediction: Prediction) -> str:
    """The choices with how likely each was, as a list with bars; "" without likelihoods."""
    if not prediction.likelihoods:
        return ""
    texts, right = _choices(prediction.reference), right_choice(prediction.reference)
    lines = []
    for number, value in enumerate(prediction.likelihoods[: len(string.ascii_uppercase)]):
        marks = [word for word, place in (("answered", prediction.choice), ("expected", right)) if place == number]
        text = texts[number] if number < len(texts) else ""
        style = "as" if number == right else "otherwise" if number == prediction.choice else ""
        lines.append(
            f'<li><span class="{style}">{string.ascii_uppercase[number]}. {shortened(text, 80)}'
            f"{' (' + ', '.join(marks) + ')' if marks else ''}</span> <span>{value:.2f}</span></li>"
        )
    return f'<p class="where">Mean log-likelihood per token</p><ul class="choices">{"".join(lines)}</ul>'


def reference_boxes(reference: Mapping[str, Any]) -> list[Box]:
    """The boxes that were expected, in pixels."""
    kept = reference.get("boxes", [reference["box"]] if "box" in reference else [])
    found = []
    for corners in kept if isinstance(kept, (list, tuple)) else ():
        try:
            x1, y1, x2, y2 = (round(float(corner)) for corner in corners)
        except (TypeError, ValueError, OverflowError):
            continue
        found.append(Box(None, min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)))
    return found


def reply_boxes(reply: str, size: tuple[int, int]) -> list[Box]:
    """The boxes of a reply in pixels; also of one that continues a prompt which ended in the opening tag."""
    found = boxes.parse(reply, size)
    if not found and (corners := _CORNERS.search(reply)):
        found = boxes.parse(f"<box>{corners[0]}</box>", size)
    return found


def picture(answers: Mapping[str, Prediction], folder: Path) -> str:
    """The first picture, with the boxes of all answers where boxes were expected; "" where it cannot be shown.

    answers: by the name that their boxes get, all of one sample. folder: where pictures' names count from.
    """
    prediction = next(iter(answers.values()), None)
    if prediction is None or not prediction.pictures:
        return ""
    path = folder / prediction.pictures[0]
    try:
        if not path.is_file() or path.stat().st_size > LARGEST_FILE:
            return ""
        image = images.decode_image(path.read_bytes())
    except (UserError, OSError, ValueError):
        return ""
    alternative = "The picture asked about"
    if expected := reference_boxes(prediction.reference):
        drawn = {name: reply_boxes(answer.reply, image.size) for name, answer in answers.items()}
        image = boxes.draw_answers(image, {"expected": expected} | drawn, SIDE)
        counted = ", ".join(f"{len(found)} {name}" for name, found in drawn.items())
        alternative += f"; boxes: {len(expected)} expected, {counted}"
    more = len(prediction.pictures) - 1
    note = f'<p class="where">and {more:,} more picture{"s" if more > 1 else ""}</p>' if more else ""
    return f'<img alt="{alternative}" loading="lazy" src="{_data_uri(image)}">{note}'


def _data_uri(image: Image.Image) -> str:
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    kept = io.BytesIO()
    image.save(kept, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(kept.getvalue()).decode()}"


def manifest_facts(manifest: Mapping[str, Any]) -> dict[str, str]:
    """A manifest's fields as names and texts, those of objects inside under "outer: inner"."""
    told: dict[str, str] = {}
    for name, value in manifest.items():
        if isinstance(value, Mapping):
            told |= {f"{name}: {inner}": text for inner, text in manifest_facts(value).items()}
        elif value is not None and value != "":
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            told[str(name)] = text[:LONGEST]
    return {name.replace("_", " "): text for name, text in told.items()}


STYLE = """
dd, .question { unicode-bidi: isolate; }
header dl dd { font-size: 1.05rem; }
.figure { font-size: 3rem; font-weight: 700; line-height: 1.1; margin: 14px 0 0; font-variant-numeric: tabular-nums; }
figcaption + table td:last-child { overflow-wrap: anywhere; }
.figure { display: flex; flex-wrap: wrap; align-items: baseline; gap: 2px 14px; }
.figure small { font-size: 1rem; font-weight: 400; color: var(--soft); }
.lead { margin: 4px 0 0; max-width: 68ch; } .more { color: var(--soft); }
.soft { color: var(--soft); font-size: 0.9rem; max-width: 80ch; } .soft.list { padding-left: 20px; }
article .where + dl, article dl + .where { margin-top: 10px; } .sample + .sample { border-top: 1px solid var(--rule);
  margin-top: 12px; padding-top: 4px; }
section > :is(.cards, .charts) { align-items: start; }
article img { max-height: 320px; object-fit: contain; object-position: left top; }
.choices { list-style: none; margin: 2px 0 0; padding: 0; font-size: 0.9rem; }
.choices li { display: flex; justify-content: space-between; gap: 12px; overflow-wrap: anywhere; }
.choices li span:last-child { font-variant-numeric: tabular-nums; white-space: nowrap; }
.tags { display: flex; flex-wrap: wrap; gap: 4px 6px; margin: 10px 0 0; padding: 0; list-style: none;
  font-size: 0.8rem; }
.tags li { border: 1px solid var(--rule); border-radius: 999px; padding: 0 9px; color: var(--soft);
  overflow-wrap: anywhere; }
dd, .question { white-space: pre-line; }
.manifest dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(220px, 100%), 1fr)); }
.manifest dd { font-weight: 400; }
"""
