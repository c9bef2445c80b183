"""Miniatures of MME, TouchStone, OCRBench, MathVista, HallusionBench and POPE."""

from qwenvl_jax.data.questions import caption
from qwenvl_jax.evaluation.miniatures.studio import Studio
from qwenvl_jax.evaluation.tasks.mme import TASK_NAMES
from qwenvl_jax.evaluation.tasks.tables import POPE_PARTS

APART = ("artwork", "celebrity", "landmark", "posters", "scene")  # pictures and questions in folders of their own
MME_RELEASE = "mme/MME_Benchmark_release_version"
OCR_TYPES = (
    "Regular Text Recognition",
    "Scene Text-centric VQA",
    "Doc-oriented VQA",
    "Handwritten Mathematical Expression Recognition",
)
TOUCHSTONE = {
    "touchstone_20230831": ("Describe the picture in detail.", "basic_descriptive", "detailed_description"),
    "touchstone_20230831_cn": ("请详细描述这张图片。", "基础描述", "详细描述"),
}


def draw(studio: Studio) -> None:
    mme(studio)
    touchstone(studio)
    ocrbench(studio)
    mathvista(studio)
    hallusionbench(studio)
    pope(studio)


def mme(studio: Studio) -> None:
    """Both layouts. A quarter of the samples is enough pictures for each of fourteen tasks."""
    for task in TASK_NAMES:
        folder = f"{MME_RELEASE}/{task}"
        lines = []
        for scene in studio.scenes(count=max(1, studio.samples // 4)):
            name = f"{scene.index:04d}"
            asked = [
                (f"{question} Please answer yes or no.", "Yes" if yes else "No")
                for question, yes in studio.yes_no(scene)
            ]
            images = {"artwork": "images/toy_dataset/"}.get(task, "images/") if task in APART else ""
            studio.picture(scene, f"{folder}/{images}{name}.jpg")
            studio.picture(scene, f"mme/images/{task}/{name}.jpg")
            text = "".join(f"{question}\t{answer}\n" for question, answer in asked)
            apart = "questions_answers_YN/" if task in APART else ""
            studio.path(f"{folder}/{apart}{name}.txt").write_text(text, encoding="utf-8")
            lines += [f"{name}.jpg\t{question}\t{answer}\n" for question, answer in asked]
        studio.path(f"mme/Your_Results/{task}.txt").write_text("".join(lines), encoding="utf-8")


def touchstone(studio: Studio) -> None:
    for name, (question, category, task) in TOUCHSTONE.items():
        rows = []
        for scene in studio.scenes():
            second = studio.encoded(studio.scene("test", scene.index + 1))
            several = scene.index % 4 == 3
            images = str([studio.encoded(scene), second]) if several else studio.encoded(scene)
            described = caption(scene, "zh" if name.endswith("cn") else "en")
            rows.append(
                {
                    "index": scene.index,
                    "image": images,
                    "question": question,
                    "human_annotation": described,
                    "gpt4_ha_answer": described,
                    "category": category,
                    "task_name": task,
                }
            )
        studio.table(f"touchstone/{name}.tsv", rows)


def ocrbench(studio: Studio) -> None:
    rows = []
    for scene in studio.scenes():
        asked = studio.asked(scene, ("read", "color"))
        kind = OCR_TYPES[scene.index % len(OCR_TYPES)]
        rows.append(
            {
                "index": scene.index,
                "image": studio.encoded(scene),
                "question": asked.question,
                "answer": str([asked.answer]),
                "category": kind,
            }
        )
    studio.table("ocrbench/OCRBench.tsv", rows)


def mathvista(studio: Studio) -> None:
    rows = []
    for scene in studio.scenes():
        asked = studio.asked(scene, ("count",))
        choices, answer = studio.choices(scene, asked)
        free = scene.index % 2 == 0
        form = "an integer answer" if free else "the correct option letter"
        listed = "\n".join(f"({'ABCD'[i]}) {choice}" for i, choice in enumerate(choices))
        query = f"Hint: Please answer the question with {form} at the end.\nQuestion: {asked.question}"
        rows.append(
            {
                "index": scene.index + 1,
                "image": studio.encoded(scene),
                "question": query if free else f"{query}\nChoices:\n{listed}",
                "answer": asked.answer,
                "question_type": "free_form" if free else "multi_choice",
                "answer_type": "integer" if free else "text",
                "answer_option": "" if free else "ABCD"[answer],
                "choices": "" if free else str(choices),
                "precision": "1.0" if free else "",
                "task": "geometry problem solving",
                "context": "synthetic scene",
                "skills": str(["arithmetic reasoning", "geometry reasoning"][: 1 + scene.index % 2]),
            }
        )
    studio.table("mathvista/MathVista_MINI.tsv", rows)


def hallusionbench(studio: Studio) -> None:
    """Two questions about each figure; the last has no figure, as those that need knowledge alone."""
    official, rows = [], []
    for scene in studio.scenes():
        question, yes = studio.yes_no(scene)[scene.index % 2]
        category, subcategory = (("VD", "figure"), ("VS", "chart"))[scene.index % 2]
        shown = scene.index != studio.samples - 1
        set_id, figure = str(scene.index // 2), "1" if shown else "0"
        name = f"{category}/{subcategory}/{set_id}_{figure}.png"
        studio.picture(scene, f"hallusionbench/hallusion_bench/{name}")
        official.append(
            {
                "category": category,
                "subcategory": subcategory,
                "visual_input": "1" if shown else "0",
                "set_id": set_id,
                "figure_id": figure,
                "sample_note": "shapes",
                "question_id": "0",
                "question": question,
                "gt_answer_details": "",
                "gt_answer": str(int(yes)),
                "filename": f"./{name}" if shown else None,
            }
        )
        rows.append(
            {
                "index": f"{category}_{subcategory}_{int(shown)}_{set_id}_{figure}_0",
                "image": studio.encoded(scene) if shown else "",
                "question": question,
                "answer": "Yes" if yes else "No",
                "category": category,
                "l2-category": subcategory,
            }
        )
    studio.json("hallusionbench/HallusionBench.json", official)
    studio.table("hallusionbench/HallusionBench.tsv", rows)


def pope(studio: Studio) -> None:
    table: list[dict] = []
    for part in POPE_PARTS:
        rows = []
        for scene in studio.scenes():
            name = f"COCO_val2014_{1000 + scene.index:012d}.jpg"
            studio.picture(scene, f"coco/val2014/{name}")
            question, yes = studio.yes_no(scene)[scene.index % 2]
            answer = "yes" if yes else "no"
            rows.append({"question_id": scene.index + 1, "image": name, "text": question, "label": answer})
            table.append(
                {
                    "index": len(table),
                    "image": studio.encoded(scene),
                    "question": question,
                    "answer": answer.capitalize(),
                    "category": part,
                }
            )
        studio.lines(f"pope/coco/coco_pope_{part}.json", rows)
    studio.table("pope/POPE.tsv", table)
