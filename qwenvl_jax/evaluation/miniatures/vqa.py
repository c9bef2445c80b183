"""Miniatures of the question answering benchmarks: the original's jsonl beside the files of the official releases."""

from collections.abc import Sequence

from qwenvl_jax.data.scenes import Scene
from qwenvl_jax.evaluation.miniatures.studio import Asked, Studio, people

ANSWER_TYPES = {"count": "number", "exist": "yes/no"}


def draw(studio: Studio) -> None:
    for name, form in (("vqav2", "v2_{}mscoco_{}.json"), ("okvqa", "{}mscoco_{}.json")):
        for split, folder, scenes in (("val", "val2014", "test"), ("train", "train2014", "train")):
            coco(studio, name, form, split, folder, studio.scenes(scenes))
    coco_hidden(studio)
    textvqa(studio)
    vizwiz(studio)
    docvqa(studio)
    infographics(studio)
    chartqa(studio)
    gqa(studio)
    ocrvqa(studio)
    ai2diagram(studio)


def _asked(studio: Studio, scenes: Sequence[Scene]) -> list[tuple[Scene, Asked]]:
    return [(scene, studio.asked(scene)) for scene in scenes]


def _coco_id(scene: Scene) -> int:
    return 1000 + scene.index


def _answers(answer: str) -> list[dict]:
    return [
        {"answer": text, "answer_confidence": "yes", "answer_id": number}
        for number, text in enumerate(people(answer), 1)
    ]


def coco(studio: Studio, name: str, form: str, split: str, folder: str, scenes: Sequence[Scene]) -> None:
    """VQAv2 and OK-VQA."""
    rows, questions, annotations = [], [], []
    for scene, asked in _asked(studio, scenes):
        image, id = _coco_id(scene), _coco_id(scene) * 1000
        path = studio.picture(scene, f"coco/{folder}/COCO_{folder}_{image:012d}.jpg")
        rows.append({"image": path, "question": asked.question, "question_id": id, "answer": asked.answer})
        questions.append({"image_id": image, "question": asked.question, "question_id": id})
        annotations.append(
            {
                "question_type": " ".join(asked.question.split()[:2]).lower(),
                "multiple_choice_answer": asked.answer,
                "answers": _answers(asked.answer),
                "image_id": image,
                "answer_type": ANSWER_TYPES.get(asked.kind, "other"),
                "question_id": id,
            }
        )
    about = {"info": {}, "license": {}, "data_subtype": folder, "data_type": "mscoco"}
    studio.lines(f"{name}/{name}_{split}.jsonl", rows)
    questions_file = form.format("OpenEnded_", f"{folder}_questions")
    studio.json(f"{name}/{questions_file}", {**about, "task_type": "Open-Ended", "questions": questions})
    studio.json(f"{name}/{form.format('', f'{folder}_annotations')}", {**about, "annotations": annotations})


def coco_hidden(studio: Studio) -> None:
    """VQAv2 test-dev, whose answers nobody has."""
    rows, questions = [], []
    for scene, asked in _asked(studio, studio.scenes()):
        image, id = _coco_id(scene), _coco_id(scene) * 1000
        path = studio.picture(scene, f"coco/test2015/COCO_test2015_{image:012d}.jpg")
        rows.append({"image": path, "question": asked.question, "question_id": id})
        questions.append({"image_id": image, "question": asked.question, "question_id": id})
    studio.lines("vqav2/vqav2_testdev.jsonl", rows)
    studio.json("vqav2/v2_OpenEnded_mscoco_test-dev2015_questions.json", {"questions": questions})


def textvqa(studio: Studio) -> None:
    for split, scenes in (("val", "test"), ("train", "train")):
        rows, data, questions, annotations = [], [], [], []
        for scene in studio.scenes(scenes):
            asked = studio.asked(scene, ("read", "color", "count"))
            id, image = 34000 + scene.index, f"{split}{scene.index:012x}"
            path = studio.picture(scene, f"textvqa/train_images/{image}.jpg")
            rows.append({"image": path, "question": asked.question, "question_id": id, "answer": asked.answer})
            questions.append({"image_id": image, "question": asked.question, "question_id": id})
            annotations.append({"image_id": image, "question_id": id, "answers": _answers(asked.answer)})
            data.append(
                {**questions[-1], "image_classes": ["Shape"], "answers": people(asked.answer), "set_name": split}
            )
        studio.lines(f"textvqa/textvqa_{split}.jsonl", rows)
        studio.json(f"textvqa/textvqa_{split}_questions.json", {"questions": questions})
        studio.json(f"textvqa/textvqa_{split}_annotations.json", {"annotations": annotations})
        studio.json(
            f"textvqa/TextVQA_0.5.1_{split}.json",
            {"dataset_type": split, "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": data},
        )


def vizwiz(studio: Studio) -> None:
    for split, scenes in (("val", "test"), ("train", "train"), ("test", "test")):
        rows, official, questions, annotations = [], [], [], []
        for scene, asked in _asked(studio, studio.scenes(scenes)):
            name = f"VizWiz_{split}_{scene.index:08d}.jpg"
            path = studio.picture(scene, f"vizwiz/{split}/{name}")
            row = {"image": path, "question": asked.question, "question_id": name if split == "test" else scene.index}
            answers = [{"answer_confidence": "yes", "answer": text} for text in people(asked.answer)]
            kind = {"answer_type": ANSWER_TYPES.get(asked.kind, "other"), "answerable": 1}
            hidden = split == "test"
            rows.append(row if hidden else {**row, "answer": asked.answer})
            official.append(
                {"image": name, "question": asked.question, **({} if hidden else {"answers": answers, **kind})}
            )
            questions.append({"image_id": name, "question": asked.question, "question_id": scene.index})
            annotations.append(
                {"image_id": name, "question_id": scene.index, "answers": _answers(asked.answer), **kind}
            )
        studio.lines(f"vizwiz/vizwiz_{split}.jsonl", rows)
        studio.json(f"vizwiz/Annotations/{split}.json", official)
        if split != "test":
            studio.json(f"vizwiz/vizwiz_{split}_questions.json", {"questions": questions})
            studio.json(f"vizwiz/vizwiz_{split}_annotations.json", {"annotations": annotations})


def docvqa(studio: Studio) -> None:
    for split, scenes in (("val", "test"), ("train", "train"), ("test", "test")):
        rows, data = [], []
        for scene, asked in _asked(studio, studio.scenes(scenes)):
            name = f"documents/{split}{scene.index}_1.png"
            path = studio.picture(scene, f"docvqa/{split}/{name}")
            id = 49000 + scene.index
            answers = {} if split == "test" else {"answers": [asked.answer, asked.answer.upper()]}
            row = {"image": path, "question": asked.question, "question_id": id}
            rows.append({**row, "answer": answers["answers"]} if answers else row)
            data.append(
                {
                    "questionId": id,
                    "question": asked.question,
                    **(
                        {}
                        if split == "test"
                        else {"question_types": ["figure/diagram", "layout"][: 1 + scene.index % 2]}
                    ),
                    "image": name,
                    "docId": scene.index,
                    **answers,
                    "data_split": split,
                }
            )
        about = {"dataset_name": "SP-DocVQA", "dataset_version": "1.0", "dataset_split": split}
        studio.lines(f"docvqa/{split}.jsonl", rows)
        studio.json(f"docvqa/{split}/{split}_v1.0.json", {**about, "data": data})


def infographics(studio: Studio) -> None:
    for split, scenes in (("val", "test"), ("train", "train"), ("test", "test")):
        rows, data = [], []
        for scene, asked in _asked(studio, studio.scenes(scenes)):
            name = f"{split}{scene.index}.jpeg"
            path = studio.picture(scene, f"infographicsvqa/infographicsvqa_images/{name}")
            id = 70000 + scene.index
            row = {"image": path, "question": asked.question, "question_id": id}
            rows.append(row if split == "test" else {**row, "answer": [asked.answer]})
            types = {
                "answers": [asked.answer],
                "answer_type": ["non span" if asked.kind == "count" else "image span"],
                "evidence": ["figure"],
                "operation/reasoning": ["counting"] if asked.kind == "count" else [],
            }
            known = {} if split == "test" else types
            data.append(
                {"questionId": id, "question": asked.question, "image_local_name": name, **known, "data_split": split}
            )
        ending = "_withQT" if split == "val" else ""
        studio.lines(f"infographicsvqa/{split}.jsonl", rows)
        about = {"dataset_name": "infographicsVQA", "dataset_version": "1.0", "dataset_split": split}
        studio.json(f"infographicsvqa/infographicsVQA_{split}_v1.0{ending}.json", {**about, "data": data})


def chartqa(studio: Studio) -> None:
    """The numbers of pictures of a scene stand for the numbers of a chart."""
    for split, scenes in (("test", "test"), ("train", "train")):
        for half, kinds in (("human", ("count", "color")), ("augmented", ("count", "read"))):
            rows, official = [], []
            for scene in studio.scenes(scenes):
                asked = studio.asked(scene, kinds)
                path = studio.picture(scene, f"chartqa/ChartQA Dataset/{split}/png/{scene.index}.png")
                rows.append(
                    {"image": path, "question": asked.question, "question_id": scene.index, "answer": asked.answer}
                )
                official.append({"imgname": f"{scene.index}.png", "query": asked.question, "label": asked.answer})
            studio.lines(f"chartqa/{split}_{half}.jsonl", rows)
            studio.json(f"chartqa/ChartQA Dataset/{split}/{split}_{half}.json", official)


def gqa(studio: Studio) -> None:
    for split, scenes in (("testdev_balanced", "test"), ("train_balanced", "train")):
        rows, official = [], {}
        for scene, asked in _asked(studio, studio.scenes(scenes)):
            image, id = f"n{scene.split}{scene.index}", f"20{scene.index:07d}"
            path = studio.picture(scene, f"gqa/images/{image}.jpg")
            rows.append({"image": path, "question": asked.question, "question_id": id, "answer": asked.answer})
            official[id] = {
                "semantic": [],
                "question": asked.question,
                "imageId": image,
                "isBalanced": True,
                "answer": asked.answer,
                "fullAnswer": f"It is {asked.answer}.",
                "types": {
                    "structural": "verify" if asked.kind == "exist" else "query",
                    "semantic": "attr",
                    "detailed": "",
                },
            }
        studio.lines(f"gqa/{split}.jsonl", rows)
        studio.json(f"gqa/{split}_questions.json", official)


def ocrvqa(studio: Studio) -> None:
    official = {}
    for number, (split, scenes) in enumerate((("train", "train"), ("val", "val"), ("test", "test")), 1):
        rows = []
        for scene in studio.scenes(scenes):
            asked = studio.asked(scene, ("read", "color"))
            book = f"{number}{scene.index:08d}"
            path = studio.picture(scene, f"ocrvqa/images/{book}.jpg")
            rows.append({"image": path, "question": asked.question, "question_id": f"{book}_0", "answer": asked.answer})
            official[book] = {
                "imageURL": f"{book}.jpg",
                "questions": [asked.question],
                "answers": [asked.answer],
                "title": "",
                "authorName": "",
                "genre": "",
                "split": number,
            }
        studio.lines(f"ocrvqa/ocrvqa_{split}.jsonl", rows)
    studio.json("ocrvqa/dataset.json", official)


def ai2diagram(studio: Studio) -> None:
    """Two questions share an id in each file, as a file of the kind may have it."""
    for split, scenes in (("test", "test"), ("train", "train")):
        rows = []
        for scene, asked in _asked(studio, studio.scenes(scenes)):
            path = studio.picture(scene, f"ai2diagram/images/{split}{scene.index}.png")
            id = f"{split}{scene.index // 2 * 2}.png"
            rows.append({"image": path, "question": asked.question, "question_id": id, "answer": asked.answer})
        studio.lines(f"ai2diagram/{split}.jsonl", rows)
