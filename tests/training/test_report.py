"""The report: one page without a foreign word in it, true for every way in which a run can end."""

import contextlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import jax.numpy as jnp
import pytest
from PIL import Image

from qwenvl_jax.training.log import RunLog
from qwenvl_jax.training.report import report

EVIL = '<script>alert("1")</script><img src="https://example.org/x.png">'
ROW = {
    "loss": 2.0,
    "gradient_norm": 1.0,
    "learning_rate": 1e-5,
    "seconds_per_step": 0.5,
    "tokens_per_second": 1234.0,
    "pictures_per_second": 3.0,
    "records": 8,
}


class Page(HTMLParser):
    """What a browser would see of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags[-1:] and self.tags[-1][0] != "style":
            self.text += data + " "

    def of(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


def run(folder: Path, steps: int = 2, error: BaseException | None = None, **values: float) -> None:
    """Two steps' log of a run of `steps` with an evaluation, ended by `error`."""
    log = RunLog(folder, steps, 0, {"model.a": jnp.zeros(3), "model.b": jnp.zeros(4)}, {"model.a"}, [EVIL])
    ends = contextlib.nullcontext() if error is None else pytest.raises(type(error))
    with ends, log:
        for step in (1, 2):
            log.steps(step, ROW | values)
        log.evaluation(2, {"loss": 1.5, "right/ground": 0.25})
        if error is not None:
            raise error


def sample(folder: Path, step: int, answer: str) -> None:
    kept = folder / "samples" / str(step)
    kept.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(kept / "0.png")
    boxes = {"expected": 1, "answered": 0}
    line = {"where": EVIL, "question": EVIL, "expected": EVIL, "answer": answer, "picture": "0.png", "boxes": boxes}
    (kept / "samples.jsonl").write_text(json.dumps(line) + "\n")


def test_nothing_of_others_is_markup_and_nothing_is_loaded(tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"output: '{EVIL}'\n")
    sample(tmp_path, 1, f"{EVIL} earlier")
    sample(tmp_path, 2, EVIL)
    run(tmp_path, error=RuntimeError(EVIL), **{f"odd {EVIL}": 1.0})
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "form"} == set()
    assert [image["src"][:22] for image in page.of("img")] == ["data:image/png;base64,"]
    assert page.of("img")[0]["alt"]
    addresses = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert all(address.startswith("data:") for address in addresses)
    assert "url(" not in text
    assert page.text.count(EVIL) >= 7  # left out, question, both answers, earlier one, place, recipe, error, metric
    assert all(svg.get("aria-label") or svg.get("aria-hidden") for svg in page.of("svg"))
    assert page.of("html") == [{"lang": "en"}]


@pytest.mark.parametrize(
    ("error", "steps", "expected"),
    [
        (None, 2, "All steps are done"),
        (None, 9, "told to stop by SIGTERM"),
        (RuntimeError("out of memory"), 9, "RuntimeError: out of memory"),
        (KeyboardInterrupt(), 9, "interrupted"),
        (FloatingPointError("the loss of step 2 is nan; mine.json:7"), 9, "the loss of step 2 is nan; mine.json:7"),
    ],
)
def test_the_end_is_told(tmp_path, error, steps, expected):
    run(tmp_path, steps, error)
    assert expected in Page((tmp_path / "report.html").read_text()).text


def test_a_killed_run_is_told_from_a_resumed_one(tmp_path):
    run(tmp_path, 9)
    log = tmp_path / "log.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]) + '{"kind": "tra')  # while it wrote
    assert "<td>no end recorded</td>" in report(tmp_path)
    RunLog(tmp_path, 9, 1, {"model.a": jnp.zeros(3)}, {"model.a"}, []).__exit__(None, None, None)
    assert re.findall("<td>(killed|stopped)", (tmp_path / "report.html").read_text()) == ["killed", "stopped"]
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [0, 1, 1, 1]


def test_every_metric_has_a_chart(tmp_path):
    run(tmp_path, reward_margin=0.5)
    labels = " ".join(svg.get("aria-label", "") for svg in Page(report(tmp_path)).of("svg"))
    for title in ("Loss per token", "Gradient norm", "Learning rate", "Tokens per second", "Reward margin"):
        assert title in labels
    assert "validation 1.5 at step 2" in labels


def test_a_run_that_failed_before_its_first_row_has_a_report(tmp_path):
    with pytest.raises(RuntimeError), RunLog(tmp_path, 5, 0, {"model.a": jnp.zeros(3)}, {"model.a"}, []):
        raise RuntimeError("no memory")
    assert "no memory" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "curve.png").exists()


def test_the_command_writes_it_anew(tmp_path):
    run(tmp_path)
    (tmp_path / "report.html").unlink()
    command = [sys.executable, "-m", "qwenvl_jax.training.report"]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0
    assert (tmp_path / "report.html").exists()
    done = subprocess.run([*command, str(tmp_path / "samples")], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no log.jsonl" in done.stderr
