"""Predictions in the forms that the benchmarks' servers and official scripts take.

A reply that is missing because of an error is submitted as an empty one: servers want every question.
"""

import csv
import difflib
import json
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from qwenvl_jax.config import UserError
from qwenvl_jax.evaluation.tasks.files import Row, json_lines
from qwenvl_jax.evaluation.tasks.prompts import LETTERS

_LETTER = re.compile(r"\b([A-Z])\b")
_NO_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f]")


def write(form: str, predictions: Path, target: Path) -> str:
    """Writes predictions in a form of FORMS; what was done, in a line."""
    if form not in FORMS:
        near = difflib.get_close_matches(form, FORMS, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(FORMS)}"
        raise UserError(f"{form!r} is no form of submission; {hint}")
    rows = list(json_lines(predictions))
    if not rows:
        raise UserError(f"{predictions}: holds no predictions")
    target.parent.mkdir(parents=True, exist_ok=True)
    FORMS[form](rows, target)
    return f"{len(rows)} predictions in {target}"


def _reference(row: Row) -> Row:
    value = row.value("reference")
    if not isinstance(value, dict):
        raise row.error("reference", "is no object")
    return Row(f"{row.where}: reference", value)


def _reply(row: Row) -> str:
    return row.text("reply", "").strip()


def _answers(key: str) -> Callable[[Sequence[Row], Path], None]:
    """A list with the id of each question and its answer."""

    def form(rows: Sequence[Row], target: Path) -> None:
        found = []
        for row in rows:
            reference = _reference(row)
            reference.name("question_id")
            found.append({key: reference.value("question_id"), "answer": _reply(row)})
        _write_json(target, found)

    return form


def _captions(rows: Sequence[Row], target: Path) -> None:
    _write_json(target, [{"image_id": _reference(row).value("image_id"), "caption": _reply(row)} for row in rows])


def _write_json(target: Path, value: Any) -> None:
    target.write_text(json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8")


def _letter(row: Row) -> str:
    """The letter chosen; of a generated reply the first that stands alone, or all of it where none does."""
    if row.fields.get("choice") is not None:
        return LETTERS[row.integer("choice")]
    match = _LETTER.search(_reply(row))
    return match[1] if match else _reply(row)


def _seed_bench(rows: Sequence[Row], target: Path) -> None:
    lines = [{"question_id": row.name("id"), "prediction": _letter(row)} for row in rows]
    target.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def _mme(rows: Sequence[Row], target: Path) -> None:
    """A folder with a file for each task, which MME's own calculation.py reads."""
    target.mkdir(parents=True, exist_ok=True)
    texts: dict[str, str] = {}
    for row in rows:
        reference = _reference(row)
        answer, task = reference.text("answer").capitalize(), reference.text("task")
        fields = (reference.text("image"), row.text("question"), answer, " ".join(_reply(row).split()))
        texts[task] = texts.get(task, "") + "\t".join(fields) + "\n"
    for task, text in texts.items():
        (target / f"{Path(task).name}.txt").write_text(text, encoding="utf-8")


def _touchstone(rows: Sequence[Row], target: Path) -> None:
    """The TSV that TouchStone's eval.py judges."""
    columns = ("question", "human_annotation", "gpt4_ha_answer", "category", "task_name")
    with target.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(("index", *columns, "response"))
        for row in rows:
            reference = _reference(row)
            writer.writerow((row.name("id"), *(reference.text(name) for name in columns), _reply(row)))


def _mmbench(rows: Sequence[Row], target: Path) -> None:
    """The Excel sheet of OpenCompass: index, question, options and the letter of each row."""
    most = max(len(_reference(row).texts("choices")) for row in rows)
    table: list[list[Any]] = [["index", "question", *LETTERS[:most], "prediction"]]
    for row in rows:
        reference = _reference(row)
        choices = reference.texts("choices")
        choices += [""] * (most - len(choices))
        table.append([reference.integer("index"), row.text("question"), *choices, _letter(row)])
    write_xlsx(target, table)


FORMS: dict[str, Callable[[Sequence[Row], Path], None]] = {
    "vqav2": _answers("question_id"),
    "docvqa": _answers("questionId"),
    "vizwiz": _answers("image"),
    "captions": _captions,
    "mmbench": _mmbench,
    "seed_bench": _seed_bench,
    "mme": _mme,
    "touchstone": _touchstone,
}

_PARTS = {
    "[Content_Types].xml": '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
    '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
    '<Override PartName="/xl/workbook.xml" ContentType='
    '"application/vnd.openxmlformats-officedocument.spreadsheetml.sheet.main+xml"/>'
    '<Override PartName="/xl/worksheets/sheet1.xml" ContentType='
    '"application/vnd.openxmlformats-officedocument.spreadsheetml.worksheet+xml"/></Types>',
    "_rels/.rels": '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">'
    '<Relationship Id="rId1" Target="xl/workbook.xml" Type='
    '"http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument"/></Relationships>',
    "xl/_rels/workbook.xml.rels": '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">'
    '<Relationship Id="rId1" Target="worksheets/sheet1.xml" Type='
    '"http://schemas.openxmlformats.org/officeDocument/2006/relationships/worksheet"/></Relationships>',
    "xl/workbook.xml": '<workbook xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main" '
    'xmlns:r="http://schemas.openxmlformats.org/officeDocument/2006/relationships">'
    '<sheets><sheet name="Sheet1" sheetId="1" r:id="rId1"/></sheets></workbook>',
}


def write_xlsx(path: Path, table: Sequence[Sequence[Any]]) -> None:
    """A sheet of numbers and texts in Excel's format (ECMA-376), which needs no library for so little."""

    def cell(value: Any) -> str:
        if isinstance(value, int):
            return f"<c><v>{value}</v></c>"
        text = escape(_NO_XML.sub("", str(value)))
        return f'<c t="inlineStr"><is><t xml:space="preserve">{text}</t></is></c>'

    rows = "".join(f"<row>{''.join(map(cell, row))}</row>" for row in table)
    sheet = '<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"><sheetData>'
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in {**_PARTS, "xl/worksheets/sheet1.xml": f"{sheet}{rows}</sheetData></worksheet>"}.items():
            file.writestr(name, f'<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n{content}')
