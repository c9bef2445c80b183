"""The report of a run, `report.html`: one file with everything in it, for whoever has to judge the run.

It is made of what the run's folder holds (recipe.yaml, log.jsonl, samples/), so it can be made again at any time:

    python -m qwenvl_jax.training.report runs/tiny

All text from records, recipes and models is escaped; the page loads nothing and runs no script.
"""

import base64
import datetime
import sys
from pathlib import Path

from qwenvl_jax.config import UserError
from qwenvl_jax.pages.charts import line_chart, number_text
from qwenvl_jax.pages.page import e, facts, page, section
from qwenvl_jax.training.history import Row, Start, of_kind, points, read_rows, starts

# Charts of training metrics: title, {label: name}, and whether the axis is logarithmic or in percent.
CHARTS = (
    ("Learning rate", {"learning rate": "learning_rate"}, ""),
    ("Gradient norm", {"gradient norm": "gradient_norm"}, "log"),
    ("Tokens per second", {"all but padding": "tokens_per_second", "learnt": "target_tokens_per_second"}, ""),
    ("Pictures per second", {"pictures": "pictures_per_second"}, ""),
    ("MFU", {"MFU": "mfu"}, "percent"),
    ("Padding", {"of tokens": "padding", "of picture slots": "picture_padding"}, "percent"),
    ("Time waiting for data", {"of a step": "data_wait_share"}, "percent"),
    ("Device memory (GiB)", {"in use": "memory", "peak": "memory_peak"}, ""),
)
# Numbers of a row that have no chart of their own; whatever else a step tells has one.
QUIET = {"kind", "step", "time", "loss", "auxiliary_loss", "target_tokens", "tokens", "pictures", "records"}
QUIET |= {"seconds_per_step", "seconds_left", "data_wait"}
EARLIER = 6  # answers of earlier evaluations that a sample shows
WORDS = {
    None: ("no end recorded", "The run goes on, or it was killed: then the same command goes on from its checkpoint."),
    "finished": ("finished", "All steps are done."),
    "stopped": ("stopped", ""),
    "killed": ("killed", ""),
    "interrupted": ("interrupted", ""),
    "not a number": ("not a number", "Loss or gradient were no longer numbers, so the run ended:"),
    "crashed": ("crashed", ""),
}


def write_report(output: Path) -> Path:
    """Writes `report.html` into a run's folder, whole or not at all, and returns its path."""
    path = output / "report.html"
    partial = output / ".report.html.partial"
    partial.write_text(report(output), encoding="utf-8")
    return partial.replace(path)


def report(output: Path) -> str:
    """The page, from the files in a run's folder."""
    rows = read_rows(output / "log.jsonl")
    trained, evaluated, runs = of_kind(rows, "train"), of_kind(rows, "evaluation"), starts(rows)
    recipe = output / "recipe.yaml"
    sections = [
        _head(output, trained, evaluated, runs),
        section("Curves", _charts(trained, evaluated)),
        section("Last evaluation", _evaluation(evaluated)),
        section("Samples", _samples(output / "samples")),
        section("Records left out or cut", _left_out(runs)),
        section("Starts", _starts(runs)),
        section("Made with", _versions(runs)),
        section("Recipe", f"<pre>{e(recipe.read_text(encoding='utf-8'))}</pre>" if recipe.exists() else ""),
    ]
    return page(f"Training run {output.name}", sections)


def _head(output: Path, trained: list[Row], evaluated: list[Row], runs: list[Start]) -> str:
    """What one wants to know first: how it ended, how far it came, how good it is, how long it took."""
    last = runs[-1] if runs else None
    how, hint = WORDS[last.how if last else None]
    message = " ".join(filter(None, [hint, last.message if last else ""]))
    told: dict[str, str] = {}
    if last:
        told["Steps"] = f"{trained[-1]['step'] if trained else last.first['step']:,} of {last.first['steps']:,}"
        told["Time"] = _duration(sum(run.seconds for run in runs))
        told["Parameters"] = number_text(last.first["parameters"])
        if last.first["trained"] != last.first["parameters"]:
            told["Trained"] = number_text(last.first["trained"])
    if trained:
        told["Records seen"] = f"{trained[-1].get('records', 0):,}"
        told["Training loss"] = number_text(trained[-1]["loss"])
    if losses := points(evaluated, "loss"):
        step, best = min(losses, key=lambda point: point[1])
        told["Validation loss"] = number_text(losses[-1][1])
        if step != losses[-1][0]:
            told[f"Best, at step {step:,}"] = number_text(best)
    state = (last.how or "open").replace(" ", "-") if last else "open"
    return (
        f'<header><p class="over">Training run</p><h1>{e(output.name)} <span class="state {state}">{e(how)}</span></h1>'
        + (f'<p class="message {state}">{e(message)}</p>' if message else "")
        + f"{facts(told)}</header>\n"
    )


def _charts(trained: list[Row], evaluated: list[Row]) -> str:
    losses = {"training": points(trained, "loss"), "auxiliary": points(trained, "auxiliary_loss")}
    found = [line_chart("Loss per token", losses | {"validation": points(evaluated, "loss")}, log=True)]
    names = list(dict.fromkeys(name for row in evaluated for name in row))
    right = {name.removeprefix("right/"): points(evaluated, name) for name in names if name.startswith("right/")}
    found.append(line_chart("Answers right on validation scenes", right, percent=True))
    known = QUIET | {name for _, lines, _ in CHARTS for name in lines.values()}
    for title, lines, axis in CHARTS:
        drawn = {label: points(trained, name) for label, name in lines.items()}
        found.append(line_chart(title, drawn, log=axis == "log", percent=axis == "percent"))
    others = dict.fromkeys(name for row in trained for name in row if name not in known)
    found += [line_chart(_words(name), {name: points(trained, name)}) for name in others]
    others = dict.fromkeys(name for name in names if name not in QUIET and not name.startswith("right/"))
    found += [line_chart(f"{_words(name)}, validation", {name: points(evaluated, name)}) for name in others]
    return f'<div class="charts">{"".join(found)}</div>' if any(found) else ""


def _evaluation(evaluated: list[Row]) -> str:
    """A table of the last evaluation beside the one before."""
    if not evaluated:
        return ""
    last, before = evaluated[-1], evaluated[-2] if len(evaluated) > 1 else {}
    lines = []
    for name in (name for name in last if name not in ("kind", "step", "time")):
        share = name.startswith("right/")
        cells = ("" if row.get(name) is None else number_text(row[name], share) for row in (last, before))
        label = name.replace("right/", "Answers right: ") if share else _words(name)
        lines.append(f'<tr><th scope="row">{e(label)}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    earlier = f"step {before['step']:,}" if before else "before"
    return (
        f'<div class="wide"><table><thead><tr><td></td><th scope="col">step {last["step"]:,}</th>'
        f'<th scope="col">{earlier}</th></tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def _samples(folder: Path) -> str:
    """The answers of the last evaluation, and what the same questions were answered before."""
    kept = sorted(folder.glob("*/samples.jsonl"), key=lambda path: int(path.parent.name)) if folder.exists() else []
    if not kept:
        return ""
    asked = {int(path.parent.name): read_rows(path) for path in kept}
    *_, step = asked
    same = sum(_same(line) for line in asked[step])
    cards = "".join(_sample(kept[-1].parent, number, asked) for number in range(len(asked[step])))
    told = f"Answered greedily after step {step:,}; {same} of {len(asked[step])} word for word as expected."
    return f'<p>{told}</p><div class="cards">{cards}</div>'


def _same(line: Row) -> bool:
    return line["answer"].strip() == line["expected"].strip()


def _sample(folder: Path, number: int, asked: dict[int, list[Row]]) -> str:
    *before, step = asked
    line = asked[step][number]
    picture = ""
    if "picture" in line and (folder / line["picture"]).exists():
        data = base64.b64encode((folder / line["picture"]).read_bytes()).decode()
        boxes = " and ".join(f"{count} {whose}" for whose, count in line["boxes"].items())
        picture = f'<img alt="The picture asked about; boxes: {boxes}" src="data:image/png;base64,{data}">'
    earlier = [(at, asked[at][number]) for at in before[-EARLIER:] if number < len(asked[at])]
    listed = "".join(
        f"<li>step {at:,}: {e(found['answer'])}</li>"
        for at, found in reversed(earlier)
        if found["question"] == line["question"]
    )
    verdict = "as" if _same(line) else "otherwise"
    answered = f'Answered, <span class="{verdict}">{"as expected" if verdict == "as" else "not as expected"}</span>'
    return (
        f'<article>{picture}<p class="question">{e(line["question"])}</p><dl>'
        f"<div><dt>Expected</dt><dd>{e(line['expected'])}</dd></div>"
        f"<div><dt>{answered}</dt><dd>{e(line['answer'])}</dd></div></dl>"
        + (f"<details><summary>Earlier answers</summary><ul>{listed}</ul></details>" if listed else "")
        + f'<p class="where">{e(line["where"])}</p></article>'
    )


def _left_out(runs: list[Start]) -> str:
    if not runs or not runs[-1].first["left_out_in_all"]:
        return ""
    first = runs[-1].first
    items = "".join(f"<li>{e(reason)}</li>" for reason in first["left_out"])
    more = first["left_out_in_all"] - len(first["left_out"])
    rest = f"<p>and {more:,} more</p>" if more else ""
    return f"<details open><summary>{first['left_out_in_all']:,} records</summary><ul>{items}</ul>{rest}</details>"


def _starts(runs: list[Start]) -> str:
    lines = []
    for run in runs:
        began = datetime.datetime.fromtimestamp(run.first["time"], datetime.UTC)
        how = ": ".join(filter(None, [WORDS[run.how][0], run.message]))
        cells = (f"{began:%Y-%m-%d %H:%M} UTC", f"{run.first['step']:,}", f"{run.last['step']:,}")
        cells += (_duration(run.seconds), run.first["device"], how)
        lines.append("<tr>" + "".join(f"<td>{e(cell)}</td>" for cell in cells) + "</tr>")
    names = ("started", "after step", "last step logged", "time", "devices", "end")
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    return (
        f'<div class="wide starts"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def _versions(runs: list[Start]) -> str:
    if not runs:
        return ""
    first = runs[-1].first
    return facts(
        first["versions"] | {"devices": first["device"], "hosts": str(first["hosts"]), "machine": first["machine"]}
    )


def _words(name: str) -> str:
    """The name of a metric as words."""
    return name.replace("_", " ").replace("/", ": ").capitalize()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def main() -> int:
    """Writes the reports of the folders named."""
    if not sys.argv[1:]:
        print("report: name the folder of a run, for example runs/tiny", file=sys.stderr)
        return 2
    for name in sys.argv[1:]:
        try:
            if not (Path(name) / "log.jsonl").is_file():
                raise UserError(f"{name}: no run, it has no log.jsonl; name the folder that a run wrote (its --output)")
            print(write_report(Path(name)))
        except UserError as error:
            print(f"report: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
