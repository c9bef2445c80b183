"""Records from every kind of file: the same rows come back, lazily, in worker processes too, and errors name lines."""

import json
import pickle
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenvl_jax.config import UserError
from qwenvl_jax.data.problems import RecordError
from qwenvl_jax.data.records import Record, Records, open_records

FIXTURES = Path(__file__).parents[1] / "fixtures"
SHAPES = FIXTURES / "images" / "shapes.png"
COUNT = 7


def row(number: int) -> dict:
    return {"messages": [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": str(number)}]}


ROWS = [row(number) for number in range(COUNT)]


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def check(records: Records, rows=ROWS) -> None:
    """All of `rows`, in any order, also from a copy in another process."""
    copy = pickle.loads(pickle.dumps(records))
    assert len(records) == len(copy) == len(rows)
    for index in [*range(len(rows))[::-1], 0]:
        question, answer = (message["content"] for message in rows[index]["messages"])
        assert records[index].messages[0]["content"] == [{"type": "text", "text": question}]
        assert records[index].messages[1]["content"] == answer
        assert copy[index] == records[index]
    with pytest.raises(IndexError):
        records[len(rows)]


def write_array_record(path: Path, rows) -> str:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for each in rows:
        writer.write(json.dumps(each).encode())
    writer.close()
    return str(path)


def write_arrow(path: Path, rows) -> str:
    """As `datasets.save_to_disk` does: the stream format, in batches."""
    table = pyarrow.Table.from_pylist(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=2)
    return str(path)


def write_parquet(path: Path, rows) -> str:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)
    return str(path)


@pytest.mark.parametrize(
    ("name", "writer"),
    [
        ("a.jsonl", lambda path, rows: write(path, lines(rows))),
        ("a.json", lambda path, rows: write(path, json.dumps(rows))),
        ("lines.json", lambda path, rows: write(path, lines(rows))),
        ("a.txt", lambda path, rows: write(path, "\ufeff" + json.dumps(rows, indent=2))),
        ("a.parquet", write_parquet),
        ("a.arrow", write_arrow),
        ("a.array_record", write_array_record),
    ],
)
def test_every_kind_of_file(tmp_path, name, writer):
    check(open_records(writer(tmp_path / name, ROWS)))


def test_lines_of_json_files(tmp_path):
    blank = open_records(write(tmp_path / "a.jsonl", "\n" + lines(ROWS[:1]) + "\n  \n" + lines(ROWS[1:2])))
    assert [blank[i].where for i in range(2)] == [f"{tmp_path}/a.jsonl:2", f"{tmp_path}/a.jsonl:5"]
    listed = open_records(write(tmp_path / "a.json", json.dumps(ROWS, indent=1)))
    text = (tmp_path / "a.json").read_text().splitlines()
    starts = [number for number, line in enumerate(text, start=1) if line == " {"]
    assert [listed[i].where for i in range(COUNT)] == [f"{tmp_path}/a.json:{start}" for start in starts]


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
layouts = st.tuples(st.sampled_from([None, 0, 1, 3]), st.booleans(), st.sampled_from(["", "\ufeff", "\n \n"]))


@settings(deadline=None, max_examples=30)
@given(st.lists(texts, min_size=1, max_size=5), layouts)
def test_lists_of_any_layout_are_cut_right(tmp_path_factory, contents, layout):
    indent, ascii_only, start = layout
    rows = [{"question": content, "answer": "x"} for content in contents]
    path = tmp_path_factory.mktemp("layout") / "a.json"
    text = start + json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    path.write_bytes(text.encode())
    records = open_records(str(path))
    assert len(records) == len(rows)
    for index, content in enumerate(contents):
        expected = [{"type": "text", "text": content}] if content else ""
        assert records[index].messages[0]["content"] == expected
        line = 1 if indent is None else 2 + 4 * index
        assert records[index].where == f"{path}:{line + start.count(chr(10))}"


def test_rows_of_tables_are_counted_in_each_file(tmp_path):
    for number in range(2):
        write_parquet(tmp_path / f"train-{number:05}-of-00002.parquet", ROWS[:4])
    records = open_records(str(tmp_path))
    check(records, ROWS[:4] * 2)
    assert [records[i].where for i in (0, 3, 4)] == [
        f"{tmp_path}/train-00000-of-00002.parquet:1",
        f"{tmp_path}/train-00000-of-00002.parquet:4",
        f"{tmp_path}/train-00001-of-00002.parquet:1",
    ]


def test_pictures_in_tables_stay_bytes(tmp_path):
    picture = {"bytes": SHAPES.read_bytes(), "path": None}
    path = write_parquet(tmp_path / "a.parquet", [{"images": [picture], "question": "What?", "answer": "x"}])
    assert open_records(path)[0].messages[0]["content"][0] == {"type": "image", "image": SHAPES.read_bytes()}


def test_splits_of_folders(tmp_path):
    (tmp_path / "data").mkdir()
    write_parquet(tmp_path / "data" / "train-0.parquet", ROWS)
    write_parquet(tmp_path / "data" / "test-0.parquet", ROWS[:2])
    check(open_records(str(tmp_path)))
    check(open_records(f"{tmp_path}#test"), ROWS[:2])
    with pytest.raises(UserError, match="no file of the split 'validation'; there are test-0"):
        open_records(f"{tmp_path}#validation")


def test_saved_datasets(tmp_path):
    """The two layouts of `save_to_disk`: one split, and a dictionary of them."""
    for folder in (tmp_path / "one", tmp_path / "many" / "train", tmp_path / "many" / "test"):
        write_arrow(folder / "data-00000-of-00001.arrow", ROWS)
        write(folder / "state.json", "{}")
    write(tmp_path / "many" / "dataset_dict.json", '{"splits": ["train", "test"]}')
    check(open_records(str(tmp_path / "one")))
    check(open_records(str(tmp_path / "many")))
    check(open_records(f"{tmp_path}/many#test"))
    with pytest.raises(UserError, match="no split 'dev'; name one of test, train"):
        open_records(f"{tmp_path}/many#dev")


def test_tensorflow_datasets(tmp_path, monkeypatch):
    """A dataset made and read without TensorFlow; its pictures stay files."""
    import io
    import sys

    import tensorflow_datasets as tfds

    class TwoShapes(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            turns = tfds.features.Sequence({"from": tfds.features.Text(), "value": tfds.features.Text()})
            features = {"image": tfds.features.Image(), "conversations": turns}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager):
            return {"train": self._generate_examples(), "test": self._generate_examples()}

        def _generate_examples(self):
            for number in range(2):
                turns = [{"from": "human", "value": "<image>\n是什么?"}, {"from": "gpt", "value": str(number)}]
                yield number, {"image": io.BytesIO(SHAPES.read_bytes()), "conversations": turns}

    TwoShapes(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    records = pickle.loads(pickle.dumps(open_records("tfds:two_shapes")))
    assert len(records) == len(open_records("tfds:two_shapes#test")) == 2
    by_answer = {record.messages[1]["content"]: record for record in (records[0], records[1])}
    picture = {"type": "image", "image": SHAPES.read_bytes()}
    assert by_answer["1"].messages[0]["content"] == [picture, {"type": "text", "text": "是什么?"}]
    assert {record.where for record in by_answer.values()} == {"tfds:two_shapes#train:1", "tfds:two_shapes#train:2"}
    assert "tensorflow" not in sys.modules
    for wrong in ("tfds:three_shapes", "tfds:two_shapes#dev"):
        with pytest.raises(UserError, match=f"{wrong}.*cannot be opened"):
            open_records(wrong)


def test_pictures_are_found_from_the_file_or_the_given_root(tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps({"image": "images/shapes.png", "question": "?", "answer": "x"}))

    def picture(records: Records) -> str:
        return records[0].messages[0]["content"][0]["image"]

    assert picture(open_records(path)) == f"{tmp_path}/images/shapes.png"
    assert picture(open_records(path, FIXTURES)) == str(SHAPES)
    with pytest.raises(UserError, match="no such folder of pictures"):
        open_records(path, tmp_path / "nowhere")


def test_a_wrong_line_spoils_no_other(tmp_path):
    records = open_records(write(tmp_path / "a.jsonl", lines(ROWS[:1]) + '{"messages": [\n[1]\n' + lines(ROWS[1:2])))
    assert [records[i].messages[1]["content"] for i in (0, 3)] == ["0", "1"]
    with pytest.raises(RecordError, match=r"a\.jsonl:2: not JSON \(Expecting value at character 15\)"):
        records[1]
    with pytest.raises(RecordError, match=r"a\.jsonl:3: a list, not an object") as caught:
        records[2]
    assert pickle.loads(pickle.dumps(caught.value)).problem == caught.value.problem


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"a": 1},\n{"b": }]', r"a\.json:2: not JSON \(Expecting value\)"),
        ("a.json", b'[{"a": 1}\n\n{"b": 2}]', r"a\.json:1: not JSON \(a comma or \] is missing"),
        ("a.json", b'[{"a": 1}]\n\nx', r"a\.json:3: not JSON \(something follows"),
        ("a.json", b'[{"a": 1},', r"a\.json:1: not JSON"),
        ("a.json", b'[{"a": "\xff"}]', r"a\.json:1: not UTF-8"),
        ("a.json", b"[" * 100_000, r"a\.json:1: not JSON \(.*recursion"),
        ("a.json", b'[{"a": ' + b"1" * 5000 + b"}]", r"a\.json:1: not JSON \(Exceeds the limit"),
        ("a.json", b'{"messages":\n []\n}\n', r"a\.json:1: one JSON object over many lines"),
        ("a.json", b" [ ] ", "holds no records"),
        ("a.jsonl", b"\n", "holds no records"),
        ("a.json", b"", "holds no records"),
        ("a.parquet", b"PAR1 and no more", "not a whole parquet or Arrow file"),
        ("a.arrow", b"\xff\xff\xff\xff\x00", "not a whole parquet or Arrow file"),
        ("a.array_record", b"nothing", "not an ArrayRecord file"),
        ("a.bin", b"\x00\x01", "neither JSON, JSON lines, parquet"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_records(str(tmp_path / name))


def test_files_that_are_not_there(tmp_path):
    write(tmp_path / "a.jsonl", lines(ROWS))
    with pytest.raises(UserError, match="no such file; give a file"):
        open_records(str(tmp_path / "b.jsonl"))
    with pytest.raises(UserError, match="a file has no splits"):
        open_records(f"{tmp_path}/a.jsonl#test")
    with pytest.raises(UserError, match="a folder without .parquet"):
        open_records(str(tmp_path))


def test_a_record_is_its_messages_and_place(tmp_path):
    records = open_records(write(tmp_path / "a.jsonl", json.dumps(ROWS[0] | {"rejected": "9"})))
    expected = [{"role": "user", "content": [{"type": "text", "text": "0?"}]}, {"role": "assistant", "content": "0"}]
    fields = ("messages[0].content", "messages[1].content")
    assert records[-1] == Record(expected, f"{tmp_path}/a.jsonl:1", "9", fields)
