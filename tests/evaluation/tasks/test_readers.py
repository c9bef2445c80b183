"""Every dataset read from its miniature: numbers, ids, prompts, references and pictures, in both styles."""

import collections
import io
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwenvl_jax.config import UserError
from qwenvl_jax.evaluation.task import PICTURE, Reading
from qwenvl_jax.evaluation.tasks.registry import TASKS, task

SAMPLES = 8
COUNTS = collections.defaultdict(lambda: SAMPLES) | {
    "chartqa_test": 2 * SAMPLES,
    "mme": 14 * 2 * (SAMPLES // 4),
    "pope": 3 * SAMPLES,
    "mmmu_dev": 3 * SAMPLES,
    "mmmu_val": 3 * SAMPLES,
    "seed_bench": 12,
    "seed_bench_image": 9,
    "seed_bench_video": 3,
    "scenes": 9895,
}
REFERENCES = {
    "captions": {"references"},
    "vqa_accuracy": {"answers", "question_id"},
    "anls": {"answers", "question_id"},
    "relaxed_accuracy": {"answers"},
    "exact_match": {"answers"},
    "gqa": {"answers"},
    "grounding": {"box", "width", "height"},
    "choice_accuracy": {"answer", "choices"},
    "mmbench": {"index", "choices"},
    "mmstar": {"answer", "choices"},
    "realworldqa": {"answer", "choices"},
    "seed_bench": {"answer", "choices", "type"},
    "mme": {"task", "image", "answer"},
    "mmmu": {"question_type", "answer", "choices"},
    "pope": {"answer"},
    "hallusionbench": {"answer", "category", "subcategory", "set_id", "figure_id", "question_id"},
    "ocrbench": {"answers", "type"},
    "mathvista": {"question_type", "answer_type", "precision", "answer", "choices"},
    "touchstone": {"question", "human_annotation", "gpt4_ha_answer"},
    "scenes": {"kind", "expected", "width", "height"},
    "": {"question_id"},
}
SERVER_ONLY = {"vqav2_testdev", "vizwiz_test", "docvqa_test", "infographicsvqa_test"}
SERVER_ONLY |= {name for name in TASKS if name.startswith("mmbench_test")}


def samples(name, data, **reading):
    return list(TASKS[name].read(data, Reading(**reading)))


def first(name, data, **reading):
    return next(iter(TASKS[name].read(data, Reading(**reading))))


def opened(picture) -> Image.Image:
    image = Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture)
    image.load()
    return image


@pytest.mark.parametrize("style", ["qwenvl", "chat"])
@pytest.mark.parametrize("name", [name for name in TASKS if name != "scenes"])
def test_every_sample_is_complete(name, style, drawn):
    found = samples(name, drawn, style=style)
    number = COUNTS[name] if "mmbench" not in name else len({s.reference["index"] for s in found})
    assert len(found) == number
    assert len({sample.id for sample in found}) == len(found)
    for sample in found:
        assert sample.prompt.count(PICTURE) == len(sample.pictures)
        assert REFERENCES["mmbench" if "mmbench" in name else TASKS[name].metric] <= set(sample.reference), sample.id
        assert json.loads(json.dumps(sample.reference)) == sample.reference
        assert all(isinstance(label, str) and label for label in sample.groups.values())
        assert sample.question
        assert all(opened(picture).width > 50 for picture in sample.pictures)
    assert samples(name, drawn, style=style) == found


def test_the_scenes_are_those_of_the_test_set(drawn):
    found = samples("scenes", drawn)
    assert len(found) == COUNTS["scenes"]
    assert len({sample.id for sample in found}) == len(found)
    for sample in itertools.islice(found, 0, 200, 7):
        image = opened(sample.pictures[0])
        assert image.size == (sample.reference["width"], sample.reference["height"])
        assert REFERENCES["scenes"] <= set(sample.reference)
    inside = next(sample for sample in found if sample.reference["kind"] == "inside")
    assert "<box>(" in inside.prompt


def test_hidden_answers_are_not_there(drawn):
    assert {name for name, task in TASKS.items() if not task.metric} == SERVER_ONLY
    for name in SERVER_ONLY:
        assert all(not {"answer", "answers"} & set(sample.reference) for sample in samples(name, drawn))
    assert all("answer" in sample.reference for sample in samples("mmbench_dev_20230712", drawn))


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("flickr", "<img>{}</img>Describe the image in English:"),
        ("nocaps", "<img>{}</img>Describe the image in English:"),
        ("vqav2_val", "<img>{}</img>{q} Answer:"),
        ("docvqa_val", "<img>{}</img>{q} Answer:"),
        ("chartqa_test_human", "<img>{}</img>{q} Answer:"),
        ("refcoco_val", "<img>{}</img><ref>{q}</ref><box>"),
        ("refcocog_test", "<img>{}</img><ref>{q}</ref><box>"),
        ("scienceqa_test_img", "<img>{}</img>Context: N/A\nQuestion: {q}\nOptions: {o}\nAnswer:"),
        ("mmbench_dev_20230712", "<img>{}</img>Context: N/A\nQuestion: {q}\nOptions: {o}\nAnswer:"),
        ("seed_bench_image", "<img>{}</img>\nQuestion: {q}\nOptions: {o}\nAnswer:"),
        (
            "seed_bench_video",
            "<img>{}</img>\n<img>{}</img>\n<img>{}</img>\n<img>{}</img>\nQuestion: {q}\nOptions: {o}\nAnswer:",
        ),
        ("mme", "<img>{}</img>\n{q}"),
    ],
)
def test_raw_prompts_are_the_original_s(name, prompt, drawn):
    """Character for character as eval_mm writes them, with nothing for a path."""
    sample = first(name, drawn)
    options = "\n".join(f"{'ABCD'[i]}. {text}" for i, text in enumerate(sample.reference.get("choices", ())))
    assert sample.prompt == prompt.replace("{}", "").replace("{q}", sample.question).replace("{o}", options)


def test_a_hint_stands_in_the_context(drawn):
    sample = samples("scienceqa_test_img", drawn)[1]
    assert sample.prompt.startswith(PICTURE + "Context: Shapes lie on a plain background.\nQuestion: ")


def test_letters_are_ranked_in_raw_style_and_generated_otherwise(drawn):
    for name in ("scienceqa_test_img", "mmbench_dev_20230712", "seed_bench", "mmstar", "ai2d_test"):
        sample = first(name, drawn)
        assert sample.choices == (" A", " B", " C", " D")
        assert sample.reference["choices"][sample.reference["answer"]]
        generated = first(name, drawn, generate=True)
        assert (generated.prompt, generated.choices) == (sample.prompt, ())
        chat = first(name, drawn, style="chat")
        assert chat.choices == ()
        assert chat.prompt.endswith("\nAnswer with the option's letter from the given choices directly.")
    lengths = {len(sample.choices) for sample in samples("mmbench_dev_20230712", drawn)}
    assert lengths == {2, 4}, "questions of yes or no have two options"


def test_closing_lines_of_chat(drawn):
    short = "\nAnswer the question using a single word or phrase."
    assert all(sample.prompt.endswith(short) for sample in samples("vqav2_val", drawn, style="chat"))
    vizwiz = first("vizwiz_val", drawn, style="chat").prompt
    assert "\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n" in vizwiz
    assert first("hallusionbench", drawn, style="chat").prompt.endswith("\nPlease answer yes or no.")
    assert first("mme", drawn, style="chat").prompt.count("lease answer yes or no.") == 1


def test_what_ten_people_answered(drawn):
    sample = first("vqav2_val", drawn)
    assert len(sample.reference["answers"]) == 10
    assert set(sample.groups) == {"question_type", "answer_type"}


def test_rotations_of_mmbench_share_a_picture_and_ask_the_same(drawn):
    found = {sample.reference["index"]: sample for sample in samples("mmbench_dev_20230712", drawn)}
    base, turned = found[0], found[1_000_000]
    assert turned.pictures == base.pictures
    assert turned.question == base.question
    assert turned.reference["choices"] == base.reference["choices"][1:] + base.reference["choices"][:1]
    right = [sample.reference["choices"][sample.reference["answer"]] for sample in (base, turned)]
    assert right[0] == right[1]
    assert set(base.groups) == {"category", "l2_category"}


def test_open_questions_among_choices(drawn):
    words = [sample for sample in samples("realworldqa", drawn) if not sample.reference["choices"]]
    assert len(words) == 2
    assert all(sample.prompt == f"{PICTURE}{sample.question} Answer:" and not sample.choices for sample in words)
    opens = [sample for sample in samples("mmmu_val", drawn) if sample.reference["question_type"] == "open"]
    assert len(opens) == 6
    assert {type(sample.reference["answer"]) for sample in opens} == {str, list}


def test_pictures_of_mmmu_stand_where_their_marks_are(drawn):
    two = next(sample for sample in samples("mmmu_val", drawn) if len(sample.pictures) == 2)
    assert two.prompt.startswith(f"Question: {PICTURE} Beside it: {PICTURE}. In the first one: ")
    chat = next(sample for sample in samples("mmmu_val", drawn, style="chat") if len(sample.pictures) == 2)
    assert chat.prompt.startswith(f"{PICTURE}{PICTURE}Question: <image 1> Beside it: <image 2>. In the first one: ")
    assert chat.pictures == two.pictures
    assert two.groups == {"subject": "Art", "discipline": "Art and Design"}


def test_some_questions_have_several_pictures_or_none(drawn):
    assert {len(sample.pictures) for sample in samples("touchstone_en", drawn)} == {1, 2}
    assert {len(sample.pictures) for sample in samples("hallusionbench", drawn)} == {0, 1}


def test_ids_that_come_twice_are_told_apart(drawn):
    ids = [sample.id for sample in samples("ai2diagram_test", drawn)]
    assert ids[:4] == ["test0.png", "test0.png#2", "test2.png", "test2.png#2"]


def test_boxes_are_in_pixels_of_the_picture(drawn):
    for sample in samples("refcoco+_testA", drawn):
        x1, y1, x2, y2 = sample.reference["box"]
        image = opened(sample.pictures[0])
        assert image.size == (sample.reference["width"], sample.reference["height"])
        assert 0 <= x1 < x2 <= image.width
        assert 0 <= y1 < y2 <= image.height


def test_reading_is_lazy(data):
    """The first samples come though a later line is broken."""
    path = data / "refcoco" / "refcoco_val.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], "{", *lines[3:]]))
    found = iter(TASKS["refcoco_val"].read(data, Reading()))
    assert [next(found).id for _ in range(3)] == ["0", "1", "2"]
    with pytest.raises(UserError, match=r"refcoco_val.jsonl, line 4: not JSON"):
        next(found)


def test_a_missing_picture_is_no_error_of_the_reader(data):
    (data / "coco" / "val2014").rename(data / "elsewhere")
    sample = first("vqav2_val", data)
    assert sample.pictures[0] == data / "coco" / "val2014" / "COCO_val2014_000000001000.jpg"


def test_pictures_may_lie_beside_the_file(data):
    (data / "refcoco" / "pictures").mkdir()
    Image.fromarray(np.zeros((60, 60, 3), np.uint8)).save(data / "refcoco" / "pictures" / "a.png")
    path = data / "refcoco" / "refcoco_val.jsonl"
    row = json.loads(path.read_text().splitlines()[0])
    path.write_text(json.dumps({**row, "image": "pictures/a.png"}))
    assert first("refcoco_val", data).pictures == (data / "refcoco" / "pictures" / "a.png",)


def test_names_of_tasks():
    assert task("vqav2_val").family == "vqa"
    with pytest.raises(UserError, match="did you mean textvqa_val"):
        task("textvqa")
    with pytest.raises(UserError, match="mme is no vqa dataset; evaluate it with eval/mme.py"):
        task("mme", "vqa")
    with pytest.raises(UserError, match="there are flickr, nocaps, coco"):
        task("xxxxxxxx", "caption")
    assert all(name == found.name for name, found in TASKS.items())


def test_the_page_has_every_dataset():
    page = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for name, found in TASKS.items():
        shown = re.sub("_(dev|test)_(en|cn)_", "_{dev,test}_{en,cn}_", name)
        assert f"`{shown}`" in page, name
        assert f"`eval/{found.family}.py`" in page


def test_readers_need_no_jax():
    code = (
        "import sys; from qwenvl_jax.evaluation.tasks.registry import TASKS;"
        "print([name for name in ('jax', 'flax', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
