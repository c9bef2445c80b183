"""The validator: every kind of bad record is named with its place and a way out, and nothing else comes out."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qwenvl_jax.config import QwenVLConfig, UserError
from qwenvl_jax.data import validate
from qwenvl_jax.data.problems import Problem
from qwenvl_jax.data.records import Record, open_records
from qwenvl_jax.processing.processor import Processor

TESTS = Path(__file__).parents[1]
FIXTURES = TESTS / "fixtures"
FOLDER = FIXTURES / "qwen-vl-chat-tiny"
processor = Processor.from_folder(FOLDER, QwenVLConfig.from_hf(json.loads((FOLDER / "config.json").read_text("utf-8"))))
SPAN = processor.tokenizer.n_queries + 2
SHAPES = str(FIXTURES / "images" / "shapes.png")
IMAGE = {"type": "image", "image": SHAPES}


def record(*contents, rejected=None) -> Record:
    names = ("user", "assistant")
    return Record([{"role": names[i % 2], "content": c} for i, c in enumerate(contents)], "a.json:3", rejected)


def found(*contents, max_length=None, rejected=None) -> list[Problem]:
    return validate.problems(record(*contents, rejected=rejected), processor, max_length)


GOOD = [
    ("hi", "hello"),
    ([IMAGE, {"type": "text", "text": "What?"}], "<ref>circle</ref><box>(0,0),(1000,1000)</box>"),
    ([IMAGE], [{"type": "box", "box": [1, 2, 3, 4], "label": None}]),
    ([IMAGE], "<quad>(1,2),(3,4),(5,6),(7,8)</quad> and 3 < 4 <b>", "more?", "no"),
]


@pytest.mark.parametrize("contents", GOOD, ids=range(len(GOOD)))
def test_good_records_have_no_problems(contents):
    assert found(*contents, max_length=2048) == []


BAD = [
    (("hi", " \n"), 1, "the answer is empty", "write one"),
    (("hi", "", "more?", "yes"), 1, "the answer is empty", "write one"),
    (("hi", "<ref>a"), 1, "<ref> at character 0 is not closed", "add </ref>"),
    (("hi", "<ref>a<box>(1,2),(3,4)</box>"), 1, "<ref> at character 0 is not closed", "add </ref>"),
    (("hi", "a</box>"), 1, "</box> at character 1 closes nothing", "put <box> before it"),
    (("hi", "<box>(1,2),(3,1001)</box>"), 1, "out of range", "0 to 1000"),
    (("hi", "<box>(3,2),(1,4)</box>"), 1, "turned round", "top left corner first"),
    (("hi", "<box>somewhere</box>"), 1, "not of the form (x1,y1),(x2,y2)", ""),
    (("hi", "<quad>(1,2),(3,4)</quad>"), 1, "not of the form (x1,y1),(x2,y2),(x3,y3),(x4,y4)", ""),
    (([{"type": "image", "image": "nowhere.png"}], "x"), 0, "nowhere.png: no such file", "--image-root"),
    (([{"type": "image", "image": "https://host/a.png"}], "x"), 0, "URLs are not fetched here", "fetch the picture"),
    (([{"type": "image", "image": "a\0b"}], "x"), 0, "cannot be read", "mend the path"),
    (([{"type": "image", "image": b"no picture"}], "x"), 0, "not a picture", "replace the picture"),
    (([{"type": "image", "image": Path(SHAPES).read_bytes()[:3000]}], "x"), 0, "damaged or cut off", "replace"),
    (([{"type": "video", "video": "a.mp4"}], "x"), 0, "is 'video'", "use one of text"),
    (([{"type": ["image"]}], "x"), 0, "is ['image']", "use one of text"),
    (([IMAGE, {"type": "box", "box": [0, 0, 999, 10]}], "x"), 0, "is not inside its picture of 211 x 97", "give [left"),
    (([IMAGE, {"type": "box", "box": [0, 0, 10**400, 10]}], "x"), 0, "must be four numbers", ""),
]  # fmt: skip


@pytest.mark.parametrize(
    ("contents", "number", "wrong", "advice"), BAD, ids=[f"{i}-{row[2][:20]}" for i, row in enumerate(BAD)]
)
def test_bad_records_are_named(contents, number, wrong, advice):
    (problem,) = found(*contents)
    assert problem.where == "a.json:3"
    assert problem.field.startswith(f"messages[{number}].content")
    assert wrong in problem.wrong
    assert problem.advice
    assert advice in problem.advice
    assert str(problem).startswith(f"a.json:3: messages[{number}].content")


def test_all_pictures_and_answers_are_looked_at():
    missing = [{"type": "image", "image": f"{name}.png"} for name in ("one", "two")]
    problems = found(missing, "", [IMAGE, missing[0]], "<ref>")
    assert [problem.field for problem in problems] == [
        "messages[1].content", "messages[3].content",
        "messages[0].content[0]", "messages[0].content[1]", "messages[2].content[1]",
    ]  # fmt: skip


def test_rejected_answers_are_looked_at():
    assert found("hi", "yes", rejected="no", max_length=100) == []
    for rejected, wrong in (
        (" ", "the answer is empty"),
        ("yes", "the same as the answer"),
        ("<box>", "is not closed"),
    ):
        (problem,) = found("hi", "yes", rejected=rejected)
        assert (problem.field, wrong in problem.wrong) == ("rejected", True)


def test_only_text_behind_the_last_picture_is_cut():
    contents = [IMAGE, {"type": "text", "text": "What? " * 20}], "a circle " * 20
    prompt, labels = processor.training(record(*contents).messages, answers_only=True)
    last = int(np.flatnonzero(prompt.image_slots >= 0)[-1]) + 2
    first_learnt = int(np.flatnonzero(labels >= 0)[0])
    for length in range(last, len(labels) + 2):
        cut, kept = validate.fit(prompt, labels, length)
        assert len(cut.input_ids) == len(cut.image_slots) == len(kept) == min(length, len(labels))
        assert (cut.image_slots >= 0).sum() == SPAN - 2
        assert cut.input_ids.tolist() == prompt.input_ids[:length].tolist()
        assert kept.tolist() == labels[:length].tolist()
    with pytest.raises(UserError, match=f"the last picture ends at {last}, behind the {last - 1} allowed"):
        validate.fit(prompt, labels, last - 1)
    (problem,) = found(*contents, max_length=last - 1)
    assert "the last picture ends at" in problem.wrong
    (problem,) = found(*contents, max_length=first_learnt)
    assert "nothing of an answer is among the first" in problem.wrong
    assert found(*contents, max_length=first_learnt + 1) == []
    seen = validate.examine(record(*contents), processor, first_learnt + 1)
    assert (seen.tokens, seen.pictures, seen.needed, seen.cut) == (len(labels), 1, first_learnt + 1, True)


def test_a_rejected_answer_too_long_to_be_seen_is_fine_as_the_other():
    assert found("hi", "yes", rejected="no " * 500, max_length=100) == []


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from([SHAPES, "<image>"]),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "text", "image", "image_url", "url", "box", "ref", "from"]), children
        )
    ),
    max_leaves=6,
)
roles = st.sampled_from(["user", "assistant", "human", "gpt", "system", "tool"])
bits = ["<ref>", "</ref>", "<box>", "(1,2),(3,4)", "</box>", "<quad>", "<img>", "</img>", "<image>", SHAPES]
tags = st.lists(st.sampled_from([*bits, "Picture 1: ", "a", "\n", "\0", "\ud800", "<|im_end|>"])).map("".join)
kinds = ["text", "image", "box", "quad", "ref", "image_url"]
part = st.fixed_dictionaries(
    {"type": st.sampled_from(kinds)}, optional={key: st.one_of(tags, json_values) for key in [*kinds, "label"]}
)
content = st.one_of(tags, json_values, st.lists(part, max_size=3))
turn = st.one_of(
    json_values,
    st.fixed_dictionaries({"from": roles, "value": content}),
    st.fixed_dictionaries({"role": roles, "content": content}),
)
keys = ["conversations", "messages", "image", "images", "system", "question", "answer", "rejected", "chosen"]


def as_turns(pair) -> dict:
    return {"conversations": [{"from": "user", "value": pair[0]}, {"from": "assistant", "value": pair[1]}]}


def as_messages(pair) -> dict:
    return {"messages": [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]}


rows = st.one_of(
    json_values,
    st.dictionaries(st.sampled_from(keys), st.one_of(json_values, tags, st.lists(turn, max_size=3))),
    st.tuples(content, tags).map(as_turns),
    st.tuples(content, content).map(as_messages),
)


@settings(deadline=None, max_examples=150)
@given(rows=st.lists(rows, min_size=1, max_size=4))
def test_any_json_gives_problems_or_good_records(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("fuzz") / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = open_records(str(path))
    for line, seen in enumerate(validate.check(records, processor, 300, None), start=1):
        for problem in seen.problems:
            assert problem.where == f"{path}:{line}"
            assert problem.wrong
            assert problem.advice
            str(problem).encode()
        if not seen.problems:
            processor.training(records[line - 1].messages)


@settings(deadline=None, max_examples=60)
@given(content=st.binary(max_size=60), name=st.sampled_from(["a.json", "a.jsonl", "a.parquet", "a.arrow", "a.x"]))
def test_any_bytes_give_problems_or_one_error(tmp_path_factory, content, name):
    path = tmp_path_factory.mktemp("bytes") / name
    path.write_bytes(content)
    try:
        records = open_records(str(path))
    except UserError:
        return
    assert all(seen.problems for seen in validate.check(records, processor, None, None))


@pytest.mark.parametrize("depth", [300, 900, 950, 975, 985, 995, 5000])
def test_deep_nesting_is_a_problem(tmp_path, depth):
    deep = "[" * depth + "]" * depth
    turns = '[{"role": "user", "content": [{"type": %s}]}, {"role": "assistant", "content": "x"}]'
    rows = ['{"messages": %s}', f'{{"messages": {turns}}}']
    (tmp_path / "a.jsonl").write_text("\n".join(row % deep for row in rows))
    for seen in validate.check(open_records(str(tmp_path / "a.jsonl")), processor, None, None):
        assert len(seen.problems) == 1


def bad_file(folder: Path) -> Path:
    """Three records, of which the last two are bad."""
    Image.new("RGB", (40, 30), "red").save(folder / "red.png")
    rows = [
        {"image": "red.png", "question": "What colour?", "answer": "red"},
        {"image": "blue.png", "question": "What colour?", "answer": "blue"},
        {"conversations": [{"from": "human", "value": "[red]hi[/]"}, {"from": "bot", "value": "hello"}]},
    ]
    (folder / "a.json").write_text(json.dumps(rows, indent=1))
    return folder / "a.json"


def test_the_command(tmp_path):
    """In a process of its own, as a user calls it."""
    path = bad_file(tmp_path)
    command = [sys.executable, "-m", "qwenvl_jax.data.validate", str(path), "--max-length", "512"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stderr
    missing, unknown = done.stdout.splitlines()[:2]
    assert missing.startswith(f"{path}:7: question: {tmp_path}/blue.png: no such file; mend the path")
    assert unknown.startswith(f"{path}:12: conversations[1].from: unknown role 'bot'; use one of user, human")
    assert done.stderr == ""


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = validate.main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


def test_exit_statuses(tmp_path, capsys):
    path = bad_file(tmp_path)
    status, out, _ = run(capsys, path, "--limit", 1)
    assert status == 0
    assert {"good": "1", "bad": "0"}.items() <= table(out).items()
    status, out, _ = run(capsys, path)
    assert status == 1
    assert {"records": "3", "good": "1", "bad": "2", "pictures in good ones": "1"}.items() <= table(out).items()
    status, out, _ = run(capsys, path, "--image-root", FIXTURES, "--limit", 1)
    assert status == 1
    (tmp_path / "b.json").write_text("[{]")
    status, out, _ = run(capsys, tmp_path / "b.json")
    assert (status, out.startswith(f"{tmp_path}/b.json:1: not JSON")) == (1, True)


def test_rejected_answers_are_counted(tmp_path, capsys):
    row = {"question": "What is it?", "answer": "red"}
    (tmp_path / "a.json").write_text(json.dumps([row, row | {"rejected": "blue"}, row | {"rejected": "red"}], indent=0))
    _, out, _ = run(capsys, tmp_path / "a.json")
    assert {"good": "2", "bad": "1", "with a rejected answer": "1"}.items() <= table(out).items()
    _, out, _ = run(capsys, tmp_path / "a.json", "--limit", 1)
    assert "rejected" not in out


def table(out: str) -> dict[str, str]:
    cells = [line.strip("│ ").split("│") for line in out.splitlines() if line.startswith("│")]
    return {name.strip(): value.strip() for name, value in cells}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.json"], "nowhere.json: no such file"),
        (["FILE", "--checkpoint", "nowhere"], "nowhere: no such checkpoint folder"),
        (["FILE", "--image-root", "nowhere"], "nowhere: no such folder of pictures"),
        (["FILE", "--max-length", "-3"], "'-3' is not a whole number above 0"),
        (["FILE", "--maxlength", "3"], "unrecognized arguments: --maxlength"),
    ],
)
def test_mistyped_commands(tmp_path, capsys, arguments, message):
    path = bad_file(tmp_path)
    try:
        status, _, err = run(capsys, *[path if argument == "FILE" else argument for argument in arguments])
    except SystemExit as stopped:
        status, err = stopped.code, capsys.readouterr().err
    assert status == 2
    assert message in err
