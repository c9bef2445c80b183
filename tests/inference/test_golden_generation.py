"""Greedy tokens and the logits that chose them, against the original: every case of every `*.npz` of the golden folder.

Logits of whole sequences and gradients are tested in tests/models.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden_folder

from qwenvl_jax.checkpoints.huggingface import abstract_model, checkpoint_tensors
from qwenvl_jax.config import QwenVLConfig
from qwenvl_jax.inference.decode import Generator
from qwenvl_jax.inference.generate import Generation
from qwenvl_jax.inference.sampling import SamplingOptions
from qwenvl_jax.models.qwen_vl import frequencies
from qwenvl_jax.processing.template import Prompt
from qwenvl_jax.sharding import param_paths

FLOAT32 = 5e-5  # absolute, on logits of magnitude 9


class Golden:
    """One file: its arrays, and a generator with its weights."""

    def __init__(self, path: Path):
        self.values = np.load(path, allow_pickle=False)
        self.meta = json.loads(str(self.values["meta_json"]))
        self.config = QwenVLConfig.from_hf(json.loads(str(self.values["config_json"])))
        shapes = abstract_model(self.config, stacked=True)
        arrays = {name: np.zeros(leaf.shape, np.float32) for name, leaf in param_paths(shapes).items()}
        for tensor in checkpoint_tensors(self.config):
            target = arrays[tensor.path] if tensor.layer is None else arrays[tensor.path][tensor.layer]
            target[...] = tensor.to_parameter(self.values[f"w/{tensor.name}"])
        model = jax.tree.unflatten(jax.tree.structure(shapes), [jnp.asarray(array) for array in arrays.values()])
        self.generator = Generator(model)

    def prompts(self, case: str) -> list[Prompt]:
        """The rows of a case without their padding."""
        ids = self.values[f"{case}/input_ids"]
        mask = np.ones_like(ids)
        if f"{case}/attention_mask" in self.values.files:
            mask = self.values[f"{case}/attention_mask"]
        return [self.prompt(row[valid == 1]) for row, valid in zip(ids, mask, strict=True)]

    def prompt(self, ids: np.ndarray) -> Prompt:
        visual, queries = self.config.visual, self.config.visual.n_queries
        rows_of = {path: int(number) for number, path in self.meta["image_paths"].items()}
        slots, pictures = np.full(len(ids), -1, np.int32), []
        for start in np.flatnonzero(ids == visual.image_start_id) + 1:
            span = ids[start : start + queries]
            path = bytes(span[span < visual.image_start_id].tolist()).decode()
            slots[start : start + queries] = len(pictures) * queries + np.arange(queries)
            pictures.append(self.values["vis/pixels"][rows_of[path]])
        pixels = np.stack(pictures) if pictures else np.zeros((0, 3, visual.image_size, visual.image_size), np.float32)
        return Prompt(ids.astype(np.int32), slots, pixels, [])


@functools.cache
def load(path: Path) -> Golden:
    return Golden(path)


def greedy_cases() -> list:
    cases = []
    for path in sorted(golden_folder().glob("*.npz")):
        with np.load(path, allow_pickle=False) as values:
            names = [key.removesuffix("/greedy") for key in values.files if key.endswith("/greedy")]
        cases += [pytest.param(path, name, id=f"{path.stem}-{name}") for name in names]
    return cases


@pytest.mark.parametrize(("path", "case"), greedy_cases())
def test_greedy_tokens_and_their_logits(path, case):
    golden = load(path)
    ids, greedy = golden.values[f"{case}/input_ids"], golden.values[f"{case}/greedy"]
    prompts = golden.prompts(case)
    rows, length = ids.shape
    new_tokens = greedy.shape[1] - length
    # The original counts padding: positions are shifted by it, and one NTK factor comes from the padded length.
    shift = np.array([length - len(prompt.input_ids) for prompt in prompts])
    rotary = frequencies(golden.config, [length] * rows)
    options = [SamplingOptions(max_new_tokens=new_tokens)] * rows
    generation = Generation(golden.generator, prompts, options, shift=shift, rotary=rotary)
    replies, logits = [[] for _ in prompts], []
    while not generation.finished:
        for reply, new in zip(replies, generation.advance(1), strict=True):
            reply += new
        logits.append(generation.logits)
    np.testing.assert_array_equal(replies, greedy[:, length:])
    np.testing.assert_allclose(np.stack(logits), golden.values[f"{case}/step_logits"], atol=FLOAT32, rtol=0)


def uncached_cases() -> list:
    return [case for case in greedy_cases() if f"{case.values[1]}/greedy_uncached" in np.load(case.values[0]).files]


@pytest.mark.parametrize(("path", "case"), uncached_cases())
def test_greedy_tokens_without_a_cache(path, case):
    """One pass over everything per token, in which dynamic NTK follows the growing length."""
    golden = load(path)
    expected = golden.values[f"{case}/greedy_uncached"][0]
    ids = golden.values[f"{case}/input_ids"][0]
    while len(ids) < len(expected):
        batch = golden.generator.batch([golden.prompt(ids)])
        valid = np.arange(batch.ids.shape[1])[None] < len(ids)
        logits = golden.generator.logits(batch, valid, frequencies(golden.config, [len(ids)]))
        ids = np.append(ids, int(np.argmax(logits[0, len(ids) - 1])))
    np.testing.assert_array_equal(ids, expected)
