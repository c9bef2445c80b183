"""How fast the tiny model learns a shape that it has never seen: LoRA, QLoRA and full fine-tuning through `train.py`.

Draws pictures in which one thing is a heart: 200 for training, as conversations about the shape of the heart and of
another thing, and others to examine, where the heart's place is asked, too, which is not learnt. Each way of training
starts from the tiny model and is examined at every checkpoint; at the end also on the questions that the tiny model
knew before. See docs/training.md.
"""

import dataclasses
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import qwenvl_jax as qv
from qwenvl_jax import convert
from qwenvl_jax.data.questions import Question, View, clipped_box, pick
from qwenvl_jax.data.scene_shapes import UNIT_SHAPES
from qwenvl_jax.data.scene_text import QUESTIONS
from qwenvl_jax.data.scenes import Scene, sample_scene, scene_rng
from qwenvl_jax.evaluation import scenes

ROOT = Path(__file__).parents[1]
SHAPE = "heart"
SEED = 7  # of the pictures; the tiny model has learnt those of seed 0
COMMON = """--start tiny --mesh.preset single --dtype float32 --remat none --batch-size 2 --accumulate 1 --keep 100
--records.batches.max-length 512 --records.batches.answers-only --optimizer.warmup-share 0.05 --log-every 10"""
# A word that the tiny model has never said: its head and embeddings are trained with the adapter, as the original does
# for base models.
LORA = (
    "--lora.rank 16 --lora.alpha 16 --lora.dropout 0 --lora.modules-to-save wte lm_head --optimizer.learning-rate 0.002"
)
WAYS = {  # what is changed of the recipes, which are for the 9.6B model
    "LoRA": f"configs/lora.yaml {LORA}",
    "QLoRA": f"configs/qlora.yaml {LORA} --quantize nf4",
    "full": "configs/finetune.yaml --optimizer.learning-rate 0.0005",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is drawn, learnt and examined."""

    output: Path = Path("runs/new_shape")
    records: int = 200
    test_pictures: int = 200  # examined at the end, two questions about a shape and one about a place for each
    curve_pictures: int = 50  # of them, examined at every checkpoint
    old_scenes: int = 60  # of the test split, about ten questions each, for what is forgotten
    steps: int = 120
    checkpoints: int = 6
    ways: tuple[str, ...] = tuple(WAYS)
    picture: Path = Path("docs/images/new_shape.png")  # of the curve


def heart() -> np.ndarray:
    """Corners of a heart in a unit square around the origin, y down; float64 [V, 2]."""
    t = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x / 34, (y - 2.5) / 30], axis=1)


def new_scene(split: str, index: int) -> tuple[Scene, list[int]]:
    """A scene with a heart, and the numbers of the things that can be named without their shape, the heart first."""
    UNIT_SHAPES.setdefault(SHAPE, heart())  # an outline that can be drawn; no scene that is sampled has it
    attempt = 0
    while True:
        scene = sample_scene(SEED, split, 1000 * index + attempt, max_objects=4)
        chosen = (index + attempt) % len(scene.objects)
        things = [dataclasses.replace(t, shape=SHAPE) if i == chosen else t for i, t in enumerate(scene.objects)]
        scene = dataclasses.replace(scene, objects=tuple(things))
        others = View(scene).referable(("shape",))
        if chosen in others and len(others) > 1:
            return scene, [chosen, *(i for i in others if i != chosen)]
        attempt += 1


def questions(split: str, index: int) -> tuple[Scene, list[Question]]:
    """A scene, and about it: what shape the heart is, what shape another thing is, where the heart is."""
    scene, (chosen, *others) = new_scene(split, index)
    rng, view = scene_rng(SEED, split, index, stream=1), View(scene)
    asked = []
    for number in (chosen, pick(rng, others)):
        name, answer = view.refer(rng, number, without=("shape",)).name("en"), scene.objects[number].shape
        text = pick(rng, QUESTIONS["shape"]["en"]).format(ref=name)
        asked.append(Question("shape", text, answer, "en", {"answer": answer}))
    label, box = f"{scene.objects[chosen].color} {SHAPE}", clipped_box(scene, scene.objects[chosen].box)
    text = pick(rng, QUESTIONS["ground"]["en"]).format(ref=label)
    place = Question("ground", text, [{"type": "box", "box": box, "label": label}], "en", {"box": box})
    return scene, [*asked, place]


def write_records(folder: Path, count: int) -> Path:
    """Pictures and one conversation about each, in the format of docs/data.md."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(count):
        scene, asked = questions("train", index)
        scene.draw().save(folder / f"{index}.png")
        order = np.random.default_rng(index).permutation(2)  # the place is not learnt
        turns = [turn for i in order for turn in asked[i].messages(f"{index}.png")]
        for turn in turns[2::2]:
            turn["content"] = turn["content"][1:]  # the picture stands in the first question alone
        lines.append(json.dumps({"messages": turns}))
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "records.jsonl"


def examine(vlm, pictures: int) -> dict[str, float]:
    """Shares of right answers on test pictures, each question asked alone: by kind, and of both shapes together."""
    asked = [
        (scene.draw(), question)
        for scene, three in (questions("test", i) for i in range(pictures))
        for question in three
    ]
    replies = vlm.batch([question.messages(picture)[:1] for picture, question in asked], max_new_tokens=32)
    right = [
        scenes.score(question, reply.text, [(b.x1, b.y1, b.x2, b.y2) for b in reply.boxes])["right"]
        for (_, question), reply in zip(asked, replies, strict=True)
    ]
    hearts, others, places = (float(np.mean(right[i::3])) for i in range(3))
    return {"heart": hearts, "other shapes": others, "shapes": (hearts + others) / 2, "where": places}


def remembered(vlm, old_scenes: int) -> float:
    """The share of right answers to the questions of the test split that the tiny model was made for."""
    found = scenes.evaluate(vlm, old_scenes)
    return float(np.mean([scenes.score(scenes.question_of(p), p["reply"], p["boxes"])["right"] for p in found]))


def load(way: str, folder: Path):
    if way == "full":
        return qv.load(folder)
    return qv.load("tiny", adapter=folder, quantize="nf4" if way == "QLoRA" else None)


def learn(way: str, records: Path, options: Options) -> dict:
    """Trains through `train.py`, and examines every checkpoint and the end."""
    output = options.output / way
    command = [
        sys.executable,
        "train.py",
        *WAYS[way].split(),
        *COMMON.split(),
        "--records.files",
        str(records.absolute()),
    ]
    command += ["--steps", str(options.steps), "--save-every", str(options.steps // options.checkpoints)]
    command += ["--output", str(output.absolute())]
    print(" ".join(command), flush=True)
    began = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True)
    minutes = (time.perf_counter() - began) / 60
    curve = []
    for step in sorted(int(folder.name) for folder in (output / "checkpoints").iterdir()):
        folder = output / "exported" / str(step)
        if convert.main([str(output / "checkpoints" / str(step)), str(folder)]):
            raise SystemExit(2)
        vlm = load(way, folder)
        curve.append({"step": step} | examine(vlm, options.curve_pictures))
        print(way, curve[-1], flush=True)
    return {
        "command": command[1:],
        "minutes": minutes,
        "curve": curve,
        "after": examine(vlm, options.test_pictures),
        "old questions": remembered(vlm, options.old_scenes),
    }


def draw(result: dict, path: Path) -> None:
    """The curve: right answers over steps, one line for each way."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    titles = {"shapes": "What shape is it?", "where": "Where is the heart?"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for way, found in result["ways"].items():
            points = [{"step": 0} | result["before"], *found["curve"]]
            axis.plot([p["step"] for p in points], [100 * p[name] for p in points], "o-", label=way)
        axis.axhline(90, color="grey", linewidth=0.8, linestyle="--")
        axis.set(title=title, xlabel="step of 2 rows, about 10 records", ylim=(0, 102))
    axes[0].set_ylabel("right on test pictures, %")
    axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def show(result: dict) -> None:
    table = Table(title=f"A shape never seen before, {result['records']} records")
    for heading in ("right, %", "heart", "other shapes", "both", "where", "old questions", "minutes"):
        table.add_column(heading, justify="left" if heading == "right, %" else "right")
    rows = {"before": (result["before"], result["old questions"], None)}
    rows |= {way: (f["after"], f["old questions"], f["minutes"]) for way, f in result["ways"].items()}
    for name, (shares, old, minutes) in rows.items():
        cells = [f"{100 * share:.1f}" for share in (*shares.values(), old)]
        table.add_row(name, *cells, "" if minutes is None else f"{minutes:.1f}")
    Console(width=110).print(table)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if options.output.exists():
        sys.exit(f"{options.output} exists; remove it, or name another --output")
    records = write_records(options.output / "data", options.records)
    tiny = qv.load("tiny")
    result: dict = {
        "records": options.records,
        "before": examine(tiny, options.test_pictures),
        "old questions": remembered(tiny, options.old_scenes),
        "ways": {},
    }
    for way in options.ways:
        result["ways"][way] = learn(way, records, options)
        (options.output / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(result, options.picture)
    show(result)


if __name__ == "__main__":
    main()
