"""From a language model and a vision transformer to a chat model: the three pre-training recipes, a step of each."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from weights import folder_tensors, language_folder, openclip_folder

import qwenvl_jax as qv
from qwenvl_jax.checkpoints.assemble import VISUAL, assemble
from qwenvl_jax.training.recipe import Recipe, read_recipe
from qwenvl_jax.training.run import train

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "qwenvl_jax" / "assets" / "pictures" / "word.png"
VISION = {"width": 32, "layers": 1, "head_width": 16, "mlp_ratio": 2.0, "patch_size": 14, "image_size": 28}
PAIR = {"messages": [{"role": "user", "content": [{"type": "image", "image": str(PICTURE)}]},
                     {"role": "assistant", "content": "A word."}]}  # fmt: skip


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("records") / "pairs.jsonl"
    path.write_text(json.dumps(PAIR) + "\n")
    return path


def one_step(name: str, start: Path, records: Path, output: Path, **changes) -> Recipe:
    """A shipped recipe, made so small that a step of it runs here."""
    recipe = read_recipe(ROOT / "configs" / f"{name}.yaml")
    assert recipe.records is not None
    data = dataclasses.replace(recipe.records, files=(str(records),))
    data = dataclasses.replace(data, batches=dataclasses.replace(data.batches, max_length=384))
    here = {"output": str(output), "start": str(start), "steps": 1, "batch_size": 8, "accumulate": 1, "workers": 1}
    # The step must be seen after its rounding to bfloat16.
    optimizer = dataclasses.replace(recipe.optimizer, learning_rate=0.01, warmup_steps=0)
    return dataclasses.replace(
        recipe, **{**here, "dtype": "float32", "records": data, "optimizer": optimizer, "remat": "none", **changes}
    )


def moved(before: Path, after: Path) -> set[str]:
    """The parts of the model with a tensor that another folder holds differently."""
    old, new = folder_tensors(before), folder_tensors(after)
    changed = {name for name in old if old[name].tobytes() != new[name].tobytes()}
    kinds = {f"{VISUAL}attn_pool.": "resampler", VISUAL: "vit", "transformer.h.": "language", "": "embeddings"}
    return {next(kind for start, kind in kinds.items() if name.startswith(start)) for name in changed}


def test_three_stages_make_a_chat_model(fixtures, records, tmp_path):
    language = language_folder(fixtures / "qwen-vl-chat-tiny-safetensors", tmp_path / "language")
    assemble(language, openclip_folder(tmp_path / "vision", VISION), tmp_path / "start")
    first = train(one_step("pretrain", tmp_path / "start", records, tmp_path / "1", image_size=28))
    assert first is not None
    assert moved(tmp_path / "start", first) == {"vit", "resampler"}

    second = train(one_step("multitask", first, records, tmp_path / "2", image_size=56))
    assert second is not None
    assert moved(first, second) == {"vit", "resampler", "language", "embeddings"}
    assert json.loads((second / "config.json").read_text())["visual"]["image_size"] == 56
    assert not qv.load(second).is_chat

    third = train(one_step("instruct", second, records, tmp_path / "3"))
    assert third is not None
    assert moved(second, third) == {"resampler", "language", "embeddings"}
    vlm = qv.load(third)
    assert vlm.is_chat
    assert vlm.chat([PAIR["messages"][0]], max_new_tokens=2).usage.completion_tokens > 0
    assert np.isfinite(jax.tree.leaves(vlm.encode_image(PICTURE))[0]).all()
