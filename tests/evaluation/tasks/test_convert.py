"""Converters: the original's files from the official ones, frames of videos, and forms of submission."""

import json
import subprocess
import sys
import zipfile
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from qwenvl_jax.config import UserError
from qwenvl_jax.evaluation import frames, submissions
from qwenvl_jax.evaluation.convert import VIDEO_FOLDERS, convert
from qwenvl_jax.evaluation.task import Reading
from qwenvl_jax.evaluation.tasks.registry import TASKS


def samples(name, data, **reading):
    return list(TASKS[name].read(data, Reading(**reading)))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("vqav2_val", "vqav2/vqav2_val.jsonl"),
        ("vqav2_testdev", "vqav2/vqav2_testdev.jsonl"),
        ("okvqa_val", "okvqa/okvqa_val.jsonl"),
        ("textvqa_val", "textvqa/textvqa_val.jsonl"),
        ("vizwiz_test", "vizwiz/vizwiz_test.jsonl"),
        ("docvqa_val", "docvqa/val.jsonl"),
        ("docvqa_test", "docvqa/test.jsonl"),
        ("chartqa_test_human", "chartqa/test_human.jsonl"),
        ("gqa_testdev", "gqa/testdev_balanced.jsonl"),
        ("ocrvqa_test", "ocrvqa/ocrvqa_test.jsonl"),
    ],
)
def test_official_questions_become_the_original_s_lines(name, file, drawn, tmp_path):
    convert(name, drawn, tmp_path / "lines.jsonl")
    assert lines(tmp_path / "lines.jsonl") == lines(drawn / file)


def test_mmbench(data):
    before = samples("mmbench_dev_20230712", data)
    folder = data / "mmbench" / "mmbench_dev_20230712"
    convert("mmbench", folder / "mmbench_dev_20230712.tsv", folder)
    row = lines(folder / "mmbench_dev_20230712.jsonl")[0]
    assert set(row) == {"index", "image", "hint", "question", "choices", "answer"}
    assert row["image"] == "data/mmbench/mmbench_dev_20230712/images/0.jpg"
    assert row["hint"] == "N/A"
    (folder / "mmbench_dev_20230712.tsv").unlink()
    after = samples("mmbench_dev_20230712", data)
    assert [(s.prompt, s.choices, s.reference) for s in after] == [(s.prompt, s.choices, s.reference) for s in before]
    assert all(path.is_file() for sample in after for path in sample.pictures)


def test_mmbench_without_answers(drawn, tmp_path):
    convert("mmbench", drawn / "mmbench" / "MMBench_TEST_EN_V11.tsv", tmp_path)
    assert all("answer" not in row for row in lines(tmp_path / "MMBench_TEST_EN_V11.jsonl"))


def test_mme(drawn, tmp_path):
    convert("mme", drawn / "mme" / "MME_Benchmark_release_version", tmp_path / "mme")
    for path in (drawn / "mme" / "Your_Results").iterdir():
        assert (tmp_path / "mme" / "Your_Results" / path.name).read_text() == path.read_text()
    assert [s.id for s in samples("mme", tmp_path)] == [s.id for s in samples("mme", drawn)]
    with pytest.raises(UserError, match="existence: no such folder; name the one of MME's release"):
        convert("mme", drawn, tmp_path)


@pytest.mark.parametrize(
    ("length", "count", "expected"),
    [
        (9, 4, [1, 3, 5, 7]),
        (100, 4, [12, 37, 62, 86]),
        (101, 8, [6, 18, 31, 44, 56, 68, 81, 94]),  # halves go to the even number, as numpy rounds
        (4, 4, [0, 1, 2, 2]),
        (3, 4, [0, 1, 2]),
        (0, 4, []),
    ],
)
def test_where_frames_are_taken(length, count, expected):
    assert frames.frame_offsets(length, count) == expected


def test_segments_of_videos():
    assert frames.frame_numbers(101, 25.0, None, 4) == [12, 37, 62, 86]
    assert frames.frame_numbers(500, 25.0, [100, 200], 4) == [112, 137, 162, 186]
    assert frames.frame_numbers(150, 25.0, [100, 200], 4) == [106, 118, 130, 143]
    assert frames.frame_numbers(500, 25.0, [4.0, 8.0], 4) == [112, 137, 162, 186]
    assert frames.frame_numbers(150, 25.0, [4.0, 8.0], 4) == [106, 118, 130, 142]


def write_video(path, length=40):
    """Frame i is a grey of 5 i."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuvj420p"
        for number in range(length):
            grey = np.full((64, 64, 3), 5 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())


def test_seed_bench(data):
    pytest.importorskip("av", reason="videos need PyAV")
    folder = data / "seed_bench"
    rows = json.loads((folder / "SEED-Bench.json").read_text())["questions"]
    for row in rows:
        if row["question_type_id"] == 11:
            row["segment"] = [1.0, 3.0]
        if row["question_type_id"] == 12:
            row["segment"] = [10, 30]
        if row["question_type_id"] > 9:
            write_video(folder / VIDEO_FOLDERS[row["question_type_id"]] / row["data_id"])
    (folder / "SEED-Bench.json").write_text(json.dumps({"questions": rows}))
    before = samples("seed_bench", data)
    assert convert("seed_bench", folder, folder) == f"9 questions about pictures and 3 about videos in {folder}"
    (row,) = [row for row in lines(folder / "video_input_4.jsonl") if row["question_id"] == "v11"]
    assert row["prompt"].startswith("<img>data/seed_bench/video_imgs_4/v11_0.jpg</img>\n<img>data/")
    greys = [np.asarray(Image.open(folder / "video_imgs_4" / f"v11_{i}.jpg")).mean() / 5 for i in range(4)]
    assert np.round(greys).tolist() == [12, 17, 22, 26], "segment 10 to 30: offsets 2, 7, 12, 16"
    (folder / "SEED-Bench.json").unlink()
    after = samples("seed_bench", data)
    assert [(s.id, s.prompt, s.choices, s.pictures) for s in after] == [
        (s.id, s.prompt, s.choices, s.pictures) for s in before
    ]
    assert [s.reference["answer"] for s in after] == [s.reference["answer"] for s in before]


def test_videos_that_cannot_be_read_are_counted(data):
    pytest.importorskip("av", reason="videos need PyAV")
    folder = data / "seed_bench"
    write_video(folder / VIDEO_FOLDERS[10] / "video_9.mp4")
    done = convert("seed_bench", folder, folder, frames=2)
    assert "2 videos cannot be read, the first: " in done
    found = {row["question_id"]: row["prompt"] for row in lines(folder / "video_input_2.jsonl")}
    assert found["v9"].count("<img>") == 2
    assert found["v10"].startswith("Error: ")


def test_without_pyav_it_says_so(drawn, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match="decoded by PyAV, which is missing: pip install"):
        convert("seed_bench", drawn / "seed_bench", tmp_path)


def predictions(name, data, path, reply=lambda sample: "yes\tand\nmore"):
    """As a run writes them."""
    rows = []
    for sample in samples(name, data):
        row = {"id": sample.id, "reference": sample.reference, "question": sample.question}
        choice = (
            {"choice": sample.reference.get("answer", 0), "reply": "A"} if sample.choices else {"reply": reply(sample)}
        )
        rows.append({**row, **choice})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_answers_for_servers(drawn, tmp_path):
    source = predictions("vqav2_testdev", drawn, tmp_path / "p.jsonl", lambda sample: " red ")
    convert("submit-vqav2", source, tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())[0] == {"question_id": 1000000, "answer": "red"}
    source = predictions("docvqa_test", drawn, tmp_path / "p.jsonl")
    convert("submit-docvqa", source, tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())[0] == {"questionId": 49000, "answer": "yes\tand\nmore"}
    source = predictions("vizwiz_test", drawn, tmp_path / "p.jsonl")
    convert("submit-vizwiz", source, tmp_path / "out.json")
    assert set(json.loads((tmp_path / "out.json").read_text())[0]) == {"image", "answer"}
    source = predictions("nocaps", drawn, tmp_path / "p.jsonl")
    convert("submit-captions", source, tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())[0] == {"image_id": 0, "caption": "yes\tand\nmore"}


def test_mme_for_its_own_script(drawn, tmp_path):
    source = predictions("mme", drawn, tmp_path / "p.jsonl")
    convert("submit-mme", source, tmp_path / "results")
    assert len(list((tmp_path / "results").iterdir())) == 14
    for line, question in zip(
        (tmp_path / "results" / "count.txt").read_text().splitlines(),
        (drawn / "mme" / "Your_Results" / "count.txt").read_text().splitlines(),
        strict=True,
    ):
        assert line == f"{question}\tyes and more"


def test_letters_for_seed_bench(drawn, tmp_path):
    convert("submit-seed_bench", predictions("seed_bench", drawn, tmp_path / "p.jsonl"), tmp_path / "out.jsonl")
    official = {
        row["question_id"]: row["answer"]
        for row in json.loads((drawn / "seed_bench/SEED-Bench.json").read_text())["questions"]
    }
    assert {row["question_id"]: row["prediction"] for row in lines(tmp_path / "out.jsonl")} == official


def test_touchstone_for_its_own_script(drawn, tmp_path):
    convert("submit-touchstone", predictions("touchstone_cn", drawn, tmp_path / "p.jsonl"), tmp_path / "out.tsv")
    header = (tmp_path / "out.tsv").read_text().splitlines()[0]
    assert header == "index\tquestion\thuman_annotation\tgpt4_ha_answer\tcategory\ttask_name\tresponse"


def test_a_sheet_for_mmbench(drawn, tmp_path):
    convert("submit-mmbench", predictions("mmbench_dev_en_v11", drawn, tmp_path / "p.jsonl"), tmp_path / "out.xlsx")
    with zipfile.ZipFile(tmp_path / "out.xlsx") as file:
        trees = {name: ElementTree.fromstring(file.read(name)) for name in file.namelist()}
    rows = [["".join(cell.itertext()) for cell in row] for row in trees["xl/worksheets/sheet1.xml"][0]]
    assert rows[0] == ["index", "question", "A", "B", "C", "D", "prediction"]
    found = samples("mmbench_dev_en_v11", drawn)
    assert len(rows) == len(found) + 1
    assert [row[-1] for row in rows[1:]] == ["ABCD"[sample.reference["answer"]] for sample in found]


def test_text_that_xml_cannot_hold(tmp_path):
    submissions.write_xlsx(tmp_path / "a.xlsx", [["<a> & b\x00\n", 3]])
    with zipfile.ZipFile(tmp_path / "a.xlsx") as file:
        tree = ElementTree.fromstring(file.read("xl/worksheets/sheet1.xml"))
    assert ["".join(cell.itertext()) for cell in tree[0][0]] == ["<a> & b\n", "3"]


def test_mistakes_of_the_command(drawn, tmp_path):
    command = [sys.executable, "-m", "qwenvl_jax.evaluation.convert"]
    for arguments, message in [
        (["mmbnch", str(drawn), str(tmp_path)], "did you mean mmbench?"),
        (["mmbench", str(tmp_path / "no.tsv"), str(tmp_path)], "no.tsv: no such file or folder to convert"),
        (["submit-docvq", str(drawn / "docvqa" / "val.jsonl"), str(tmp_path / "x")], "did you mean docvqa?"),
        (["submit-docvqa", str(drawn / "docvqa" / "val.jsonl"), str(tmp_path / "x")], "field 'reference' is missing"),
        (["ai2diagram_test", str(drawn), str(tmp_path / "x")], "has no official files that could be converted"),
    ]:
        done = subprocess.run([*command, *arguments], capture_output=True, text=True)
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
