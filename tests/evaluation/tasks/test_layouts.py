"""The official releases beside the original's files, and what is said of files that are missing or malformed."""

import dataclasses
import json

import pytest

from qwenvl_jax.config import UserError
from qwenvl_jax.evaluation.task import Reading
from qwenvl_jax.evaluation.tasks import captions, mme, multiple_choice, tables, tsv, vqa_sources
from qwenvl_jax.evaluation.tasks.files import choose
from qwenvl_jax.evaluation.tasks.registry import TASKS

ALL_SOURCES = {
    **captions.SOURCES,
    **vqa_sources.SOURCES,
    **multiple_choice.SOURCES,
    **{name: sources for name, (_, sources, _) in tables.DATASETS.items()},
    "mme": mme.SOURCES,
}
HAVE_NO_FILE = {  # sources after the first that the miniature does not draw: the same readers under other names
    "flickr/flickr30k_karpathy_test.json",
    "coco/annotations/coco_karpathy_test.json",
    "vizwiz/val.json",
    "vizwiz/test.json",
    "docvqa/val_v1.0_withQT.json",
    "docvqa/test_v1.0.json",
    "chartqa/test/test_human.json",
    "chartqa/test/test_augmented.json",
}


def samples(name, data, **reading):
    return list(TASKS[name].read(data, Reading(**reading)))


def essence(sample):
    """What must agree between two layouts of the same questions: not ids, groups and paths."""
    reference = {
        name: value for name, value in sample.reference.items() if name not in ("question_id", "image_id", "index")
    }
    return sample.prompt, sample.choices, reference, len(sample.pictures)


SECOND = [
    (name, number)
    for name, sources in ALL_SOURCES.items()
    for number, source in enumerate(sources[1:], 1)
    if "mmbench" not in name and name not in ("mme", "pope") and not set(source.files) & HAVE_NO_FILE
]


@pytest.mark.parametrize(("name", "number"), SECOND)
def test_the_official_release_asks_the_same(name, number, data):
    before = samples(name, data)
    for source in ALL_SOURCES[name][:number]:
        for file in source.files:
            if not any(file in other.files for other in ALL_SOURCES[name][number:]):
                for path in data.glob(file):
                    path.rename(path.with_name("gone-" + path.name))
    assert choose(name, data, ALL_SOURCES[name]) is ALL_SOURCES[name][number]
    after = samples(name, data)
    assert [essence(sample) for sample in after] == [essence(sample) for sample in before]
    assert all(isinstance(path, bytes) or path.is_file() for sample in after for path in sample.pictures)


def test_the_release_of_mme(data):
    before = samples("mme", data)
    (data / "mme" / "Your_Results").rename(data / "mme" / "gone")
    after = samples("mme", data)
    assert [essence(sample) for sample in after] == [essence(sample) for sample in before]
    assert [sample.id for sample in after] == [sample.id for sample in before]
    assert all(path.is_file() for sample in after for path in sample.pictures)
    assert len({sample.reference["task"] for sample in after}) == 14


def test_pope_as_a_table(data):
    before = samples("pope", data)
    (data / "pope" / "coco").rename(data / "pope" / "gone")
    after = samples("pope", data)
    assert [(s.prompt, s.reference, s.groups) for s in after] == [(s.prompt, s.reference, s.groups) for s in before]


@pytest.mark.parametrize("name", [name for name in TASKS if name != "scenes"])
def test_a_missing_dataset_is_one_error_that_names_the_file(name, tmp_path):
    with pytest.raises(UserError) as error:
        samples(name, tmp_path)
    message = str(error.value)
    assert f"{tmp_path}/{TASKS[name].files[0].split('/')[0]}" in message
    assert "missing" in message
    assert "docs/evaluation.md says where" in message
    assert "\n" not in message
    with pytest.raises(UserError, match="no such folder of data"):
        samples(name, tmp_path / "nothing")


def test_of_a_dataset_half_there_the_missing_half_is_named(data):
    for path in (data / "vqav2").glob("v2_*val2014*"):
        path.unlink()
    with pytest.raises(
        UserError, match=r"vqav2/v2_mscoco_val2014_annotations.json: is missing \(or vqav2/v2_OpenEnded"
    ):
        samples("vqav2_val", data)


def spoil_line(path, number, **fields):
    lines = path.read_text().splitlines()
    row = json.loads(lines[number - 1]) | fields
    lines[number - 1] = json.dumps({name: value for name, value in row.items() if value is not None})
    path.write_text("\n".join(lines) + "\n")


REFCOCO, GQA = ("refcoco_val", "refcoco/refcoco_val.jsonl"), ("gqa_testdev", "gqa/testdev_balanced.jsonl")
SCIENCE = ("scienceqa_test_img", "scienceqa/scienceqa_test_img.jsonl")


@pytest.mark.parametrize(
    ("named", "fields", "message"),
    [
        (REFCOCO, {"bbox": [1, 2, 3]}, "line 2: field 'bbox' holds [1, 2, 3], not 4 numbers"),
        (REFCOCO, {"width": "wide"}, "field 'width' holds \"wide\", not a whole number"),
        (REFCOCO, {"sent": 7}, "field 'sent' holds 7, not a text"),
        (REFCOCO, {"sent": None}, "field 'sent' is missing; there are 'image', 'bbox'"),
        (GQA, {"answer": None}, "line 2: field 'answer' is missing"),
        (GQA, {"question_id": [1]}, "field 'question_id' holds [1], not an id"),
        (SCIENCE, {"answer": 9}, "field 'answer' is 9, the options are 0 to"),
        (SCIENCE, {"choices": ["a"]}, "'choices' holds 1 options"),
        (("vqav2_val", "vqav2/vqav2_val.jsonl"), {"question_id": 5}, "no annotation with the question_id 5"),
        (("pope", "pope/coco/coco_pope_random.json"), {"label": "maybe"}, "line 2: field 'answer' holds 'maybe'"),
    ],
)
def test_a_malformed_line_is_named(named, fields, message, data):
    name, file = named
    spoil_line(data / file, 2, **fields)
    with pytest.raises(UserError) as error:
        samples(name, data)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


FLICKR = ("flickr", "flickr30k/flickr30k_karpathy_test.json")
MME, MMSTAR = ("mme", "mme/Your_Results/count.txt"), ("mmstar", "mmstar/MMStar.tsv")
OCRBENCH = ("ocrbench", "ocrbench/OCRBench.tsv")
HALLUSION = ("hallusionbench", "hallusionbench/HallusionBench.tsv")
MMMU = ("mmmu_val", "mmmu/Art/validation-00000-of-00001.parquet")
COLUMNS = "index\tquestion\tA\tB\tanswer\timage\n"


@pytest.mark.parametrize(
    ("named", "content", "message"),
    [
        (FLICKR, "{", "flickr30k_karpathy_test.json: not JSON"),
        (FLICKR, "[]", "is not an object with fields"),
        (FLICKR, '{"images": 3, "annotations": []}', "'images' holds 3, not a list"),
        (FLICKR, '{"images": [{"id": 1}], "annotations": []}', "has the image_id 1"),
        (MME, "a.jpg\tWhat?\n", "count.txt, line 1: holds 2 fields, not picture, question"),
        (MME, "a.jpg\tWhat?\t3\n", "count.txt, line 1: field 'answer' holds '3'"),
        (MMSTAR, f"{COLUMNS}1\tWhat?\ta\n", "MMStar.tsv, line 2: does not have the 6 columns"),
        (MMSTAR, f"{COLUMNS}1\tWhat?\ta\tb\tA\tabc=\n", "line 2: field 'image' refers to the row with index 'abc='"),
        (MMSTAR, f'{COLUMNS}1\tWhat?\ta\tb\tA\t\n2\t"', "MMStar.tsv, line 3: does not have the 6 columns"),
        (OCRBENCH, "index\tquestion\tanswer\tcategory\n1\tWhat?\tyes\tx\n", "not a list as Python writes it"),
        (HALLUSION, "index\tquestion\tanswer\n1\tWhat?\tYes\n", "does not end in SET_FIGURE_QUESTION"),
        (MMMU, "PAR1", "cannot be read"),
    ],
)
def test_a_malformed_file_is_named(named, content, message, data):
    name, file = named
    (data / file).write_text(content)
    with pytest.raises(UserError) as error:
        samples(name, data)
    assert message in str(error.value)
    assert file.rpartition("/")[2] in str(error.value)


def test_an_answer_that_is_no_option(data):
    path = data / "mmstar" / "MMStar.tsv"
    header, row, *rest = path.read_text().splitlines()
    cells = row.split("\t")
    cells[header.split("\t").index("answer")] = "G"
    path.write_text("\n".join([header, "\t".join(cells), *rest]))
    with pytest.raises(UserError, match="line 2: field 'answer' holds 'G', and the options are A, B"):
        samples("mmstar", data)


def test_tables(tmp_path):
    path = tmp_path / "table.tsv"
    long = "QUJD" * 30
    path.write_text(
        "index\tquestion\tA\tB\thint\timage\n"
        f'0\t"two\nlines, ""quoted"""\tNone\tnan\t\t1\n'
        f"1\tq\tNA\tb\thint\t{long}\n"
        f"2\tq\ta\tb\thint\t\"['{long}', '{long}']\"\n"
        "3\tq\ta\tb\thint\t\n"
    )
    rows = list(tsv.read_tsv(path))
    assert rows[0][0].fields == {"index": "0", "question": 'two\nlines, "quoted"', "A": "None", "image": "1"}
    assert tsv.options(rows[1][0]) == ["NA", "b"]
    content = b"ABC" * 30
    assert [pictures for _, pictures in rows] == [(content,), (content,), (content, content), ()]


def test_questions_of_scienceqa_have_groups_in_the_official_file(data):
    (data / "scienceqa" / "scienceqa_test_img.jsonl").unlink()
    found = samples("scienceqa_test_img", data)
    assert {sample.groups["subject"] for sample in found} == {"NAT", "SOC", "LAN"}
    assert len(found) == 8, "those without a picture and those of other splits are left out"


def test_types_of_documents_are_groups(data):
    (data / "docvqa" / "val.jsonl").unlink()
    labels = {sample.groups["question_type"] for sample in samples("docvqa_val", data)}
    assert labels == {"figure/diagram", "figure/diagram, layout"}


def test_domains_of_nocaps(data):
    (data / "nocaps" / "nocaps_val.json").unlink()
    assert {sample.groups["domain"] for sample in samples("nocaps", data)} == {"in-domain", "near-domain", "out-domain"}


def test_decoding_is_the_original_s():
    expected = {
        "flickr": (30, 8),
        "vqav2_val": (10, 1),
        "docvqa_val": (100, 1),
        "chartqa_test": (100, 1),
        "refcoco_val": (28, 10),
    }
    for name, numbers in expected.items():
        decoding = dataclasses.astuple(TASKS[name].decoding)
        assert decoding == (*numbers, 0.0, 1.0)
