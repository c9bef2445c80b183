"""Miniatures of the benchmarks of captions and of boxes."""

from qwenvl_jax.evaluation.miniatures.studio import Studio

DOMAINS = ("in-domain", "near-domain", "out-domain")
REFERRING = {
    "refcoco": ("val", "testA", "testB"),
    "refcoco+": ("val", "testA", "testB"),
    "refcocog": ("val", "test"),
}


def draw(studio: Studio) -> None:
    flickr(studio)
    nocaps(studio)
    coco(studio)
    referring(studio)


def _karpathy(studio: Studio, name: str, number: int, split: str, captions: list[str], **more: object) -> dict:
    sentences = [
        {"tokens": text.lower().split(), "raw": text, "sentid": 5 * number + i} for i, text in enumerate(captions)
    ]
    return {"imgid": number, "filename": name, "split": split, "sentences": sentences, **more}


def flickr(studio: Studio) -> None:
    everything = []
    for split, scenes in (("test", "test"), ("train", "train")):
        images: list[dict] = []
        annotations: list[dict] = []
        for scene in studio.scenes(scenes):
            name = f"{split}{scene.index}.jpg"
            number = scene.index if split == "test" else 10_000 + scene.index
            path = studio.picture(scene, f"flickr30k/flickr30k-images/{name}")
            images.append({"id": number, "image": path})
            for caption in studio.captions(scene):
                annotation = {"image_id": number, "id": len(annotations), "caption": caption}
                annotations.append(annotation if split == "test" else {**annotation, "image": path})
            everything.append(_karpathy(studio, name, number, split, studio.captions(scene)))
        studio.json(f"flickr30k/flickr30k_karpathy_{split}.json", {"images": images, "annotations": annotations})
    studio.json("flickr30k/dataset_flickr30k.json", {"images": everything, "dataset": "flickr30k"})


def nocaps(studio: Studio) -> None:
    images, converted, annotations = [], [], []
    for scene in studio.scenes():
        name = f"{scene.index:016x}.jpg"
        path = studio.picture(scene, f"nocaps/images/{name}")
        domain = DOMAINS[scene.index % len(DOMAINS)]
        images.append(
            {"id": scene.index, "file_name": name, "height": scene.height, "width": scene.width, "domain": domain}
        )
        converted.append({"id": scene.index, "image": path})
        captions = studio.captions(scene) * 2  # ten of each picture there
        annotations += [
            {"image_id": scene.index, "id": 10 * scene.index + i, "caption": text} for i, text in enumerate(captions)
        ]
    studio.json("nocaps/nocaps_val.json", {"images": converted, "annotations": annotations})
    studio.json("nocaps/nocaps_val_4500_captions.json", {"info": {}, "images": images, "annotations": annotations})


def coco(studio: Studio) -> None:
    everything, tests, trains = [], [], []
    for split, folder, scenes in (("test", "val2014", "test"), ("train", "train2014", "train")):
        for scene in studio.scenes(scenes):
            number = 1000 + scene.index
            name = f"COCO_{folder}_{number:012d}.jpg"
            studio.picture(scene, f"coco/{folder}/{name}")
            captions = studio.captions(scene)
            everything.append(_karpathy(studio, name, scene.index, split, captions, filepath=folder, cocoid=number))
            if split == "test":
                tests.append({"image": f"{folder}/{name}", "caption": captions})
            else:
                trains += [
                    {"image": f"{folder}/{name}", "caption": text, "image_id": f"coco_{number}"} for text in captions
                ]
    studio.json("coco/dataset_coco.json", {"images": everything, "dataset": "coco"})
    studio.json("coco/coco_karpathy_test.json", tests)
    studio.json("coco/coco_karpathy_train.json", trains)


def referring(studio: Studio) -> None:
    for name, splits in REFERRING.items():
        for split in splits:
            rows = []
            for scene in studio.scenes():
                path = studio.picture(scene, f"coco/train2014/COCO_train2014_{5000 + scene.index:012d}.jpg")
                phrase, box = studio.phrase(scene)
                rows.append({"image": path, "sent": phrase, "bbox": box, "height": scene.height, "width": scene.width})
            studio.lines(f"{name}/{name}_{split}.jsonl", rows)
