"""Miniatures of the multiple choice benchmarks."""

from typing import Any

from qwenvl_jax.data.scenes import Scene
from qwenvl_jax.evaluation.miniatures.studio import Studio
from qwenvl_jax.evaluation.tasks.mmmu import SPLITS
from qwenvl_jax.evaluation.tasks.multiple_choice import MMBENCH
from qwenvl_jax.evaluation.tasks.prompts import LETTERS
from qwenvl_jax.evaluation.tasks.seed_bench import FRAMES, frame_name

ROTATION = 1_000_000
MMMU_SUBJECTS = ("Art", "Clinical_Medicine", "Physics")
PROFILE = ("natural science", "social science", "language science")


def draw(studio: Studio) -> None:
    scienceqa(studio)
    for name, official in MMBENCH.items():
        mmbench(studio, name, official)
    tables(studio)
    seed_bench(studio)
    mmmu(studio)


def scienceqa(studio: Studio) -> None:
    rows, problems = [], {}
    for scene in studio.scenes():
        asked = studio.asked(scene)
        choices, answer = studio.choices(scene, asked)
        hint = "Shapes lie on a plain background." if scene.index % 2 else ""
        path = studio.picture(scene, f"scienceqa/images/test/{scene.index}/image.png")
        common = {"question": asked.question, "choices": choices, "answer": answer, "hint": hint}
        rows.append({"image": path, **common})
        problems[str(scene.index)] = {
            **common,
            "image": "image.png",
            "task": "closed choice",
            "grade": f"grade{2 + scene.index % 8}",
            "subject": PROFILE[scene.index % 3],
            "topic": "geometry",
            "split": "test",
        }
    problems["900"] = {**problems["0"], "image": None}  # neither this nor the next belongs to the test with pictures
    problems["901"] = {**problems["0"], "split": "train"}
    studio.lines("scienceqa/scienceqa_test_img.jsonl", rows)
    studio.json("scienceqa/problems.json", problems)


def _table_row(studio: Studio, scene: Scene, rotation: int = 0) -> dict[str, Any]:
    """index, question, hint, A to D, answer and category; the image is left to the caller."""
    asked = studio.asked(scene)
    choices, answer = studio.choices(scene, asked)
    turn = rotation % len(choices)
    choices, answer = choices[turn:] + choices[:turn], (answer - turn) % len(choices)
    letters = dict(zip("ABCD", choices, strict=False))
    return {
        "index": scene.index + rotation * ROTATION,
        "question": asked.question,
        "hint": "Look at the shapes." if scene.index % 2 else "",
        **{letter: letters.get(letter, "") for letter in "ABCD"},
        "answer": LETTERS[answer],
        "category": f"shape_{asked.kind}",
    }


def mmbench(studio: Studio, name: str, official: str) -> None:
    """Every question with all its rotations; a rotation's picture is that of the first, by its index."""
    hidden = "_test_" in name
    rows = []
    for scene in studio.scenes():
        count = sum(bool(_table_row(studio, scene)[letter]) for letter in "ABCD")
        for rotation in range(count):
            row = _table_row(studio, scene, rotation)
            if hidden:
                del row["answer"]
            image = str(scene.index) if rotation else studio.encoded(scene)
            rows.append({**row, "l2-category": "coarse_perception", "split": name.split("_")[1], "image": image})
    file = f"mmbench/{name}/{name}.tsv" if name.endswith("20230712") else f"mmbench/{official}.tsv"
    studio.table(file, sorted(rows, key=lambda row: row["index"]))


def tables(studio: Studio) -> None:
    plain = [{**_table_row(studio, scene), "image": studio.encoded(scene)} for scene in studio.scenes()]
    studio.table("ai2d/AI2D_TEST.tsv", [_without(row, "hint", "category") for row in plain])
    levels = [{**_without(row, "hint"), "l2_category": "attribute"} for row in plain]
    studio.table("mmstar/MMStar.tsv", levels)
    words = []
    for row in plain:
        row = _without(row, "hint", "category")
        if row["index"] % 4 == 3:  # some ask for a word
            row |= {"answer": row[row["answer"]]} | dict.fromkeys("ABCD", "")
        words.append(row)
    studio.table("realworldqa/RealWorldQA.tsv", words)


def _without(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


def seed_bench(studio: Studio) -> None:
    """Types 1 to 12 in turn; a video is a few scenes, and what is asked is about the first."""
    questions = []
    for scene in studio.scenes(count=max(12, studio.samples)):
        kind = scene.index % 12 + 1
        asked = studio.asked(scene, ("color", "shape", "count"))
        choices, answer = studio.choices(scene, asked)
        id = f"v{scene.index}" if kind > 9 else f"{scene.index}"
        if kind > 9:
            data_id = f"video_{scene.index}.mp4"
            for number in range(FRAMES):
                studio.picture(scene, f"seed_bench/video_imgs_{FRAMES}/{frame_name(id, number)}")
        else:
            data_id = f"{scene.index}_0"
            (studio.path(f"seed_bench/SEED-Bench-image/{data_id}")).write_bytes(studio.bytes(scene))
        row = {
            "answer": LETTERS[answer],
            **{f"choice_{letter}": text for letter, text in zip("abcd", choices, strict=True)},
            "data_id": data_id,
            "data_type": "video" if kind > 9 else "image",
            "question": asked.question,
            "question_id": id,
            "question_type_id": kind,
        }
        questions.append({**row, "segment": [0, 100]} if kind == 12 else row)
    types = {"Scene Understanding": 1}
    studio.json("seed_bench/SEED-Bench.json", {"question_type": types, "questions": questions})


def mmmu(studio: Studio) -> None:
    """Questions of three subjects: with one picture, with two, and open ones."""
    import pyarrow
    import pyarrow.parquet

    for split in SPLITS.values():
        for subject in MMMU_SUBJECTS:
            rows = [_mmmu_row(studio, scene, split, subject) for scene in studio.scenes()]
            path = studio.path(f"mmmu/{subject}/{split}-00000-of-00001.parquet")
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def _mmmu_row(studio: Studio, scene: Scene, split: str, subject: str) -> dict[str, Any]:
    asked = studio.asked(scene)
    choices, answer = studio.choices(scene, asked)
    is_open, two = scene.index % 4 == 2, scene.index % 4 == 1
    second = studio.scene("test", scene.index + 1)
    images = {1: studio.bytes(scene, "PNG"), **({2: studio.bytes(second, "PNG")} if two else {})}
    mark = "<image 1> Beside it: <image 2>. In the first one: " if two else "<image 1> "
    listed = [asked.answer, asked.answer.upper()]
    return {
        "id": f"{split}_{subject}_{scene.index + 1}",
        "question": mark + asked.question,
        "options": "[]" if is_open else str(choices),
        "explanation": "",
        **{
            f"image_{number}": {"bytes": images[number], "path": f"{scene.index}_{number}.png"}
            if number in images
            else None
            for number in range(1, 8)
        },
        "img_type": "['Diagrams']",
        "answer": (str(listed) if scene.index % 8 == 6 else asked.answer) if is_open else LETTERS[answer],
        "topic_difficulty": "Easy",
        "question_type": "open" if is_open else "multiple-choice",
        "subfield": "Shapes",
    }
