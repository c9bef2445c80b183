"""The steps of training and inference lower for TPUs and for CUDA, so that nothing in them is for CPUs alone.

Lowering is all that a machine without accelerators can do: it finds operations and kernels that a platform lacks, not
what its compiler makes of them.
"""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest

from qwenvl_jax.checkpoints.folder import locate
from qwenvl_jax.checkpoints.huggingface import load_model
from qwenvl_jax.data.record_batches import BatchRecipe
from qwenvl_jax.inference import batch_programs
from qwenvl_jax.inference.batch_programs import with_slots
from qwenvl_jax.inference.decode import Generator
from qwenvl_jax.inference.layout import Layout
from qwenvl_jax.inference.sampling import SamplingOptions, controls
from qwenvl_jax.inference.steps import decode, extend, in_int8
from qwenvl_jax.models.qwen_vl import frequencies
from qwenvl_jax.nn.lora import LoraRecipe
from qwenvl_jax.processing.template import Prompt
from qwenvl_jax.training.placement import MeshRecipe
from qwenvl_jax.training.plan import abstract_step
from qwenvl_jax.training.recipe import Recipe, RecordsRecipe

PLATFORMS = ("tpu", "cuda")
RECIPE = Recipe(
    start="tiny",
    records=RecordsRecipe(batches=BatchRecipe(max_length=640)),  # longer than a block of attention
    batch_size=16,
    accumulate=2,
    dtype="bfloat16",
    remat="layers",
)
LORA = dataclasses.replace(RECIPE, lora=LoraRecipe(rank=2))
RECIPES = {
    "full": RECIPE,
    "scenes": dataclasses.replace(RECIPE, records=None, start=None),
    "lora": LORA,
    "nf4": dataclasses.replace(LORA, quantize="nf4"),
}


def lowered(step, *arguments, **named) -> jax.export.Exported:
    """A jitted step for all platforms at once."""
    return jax.export.export(step, platforms=PLATFORMS)(*arguments, **named)


@pytest.mark.parametrize("name", RECIPES)
def test_a_training_step(name):
    step, arguments = abstract_step(RECIPES[name], jax.devices()[:1], 1)
    assert lowered(step, *arguments).platforms == PLATFORMS


def test_a_training_step_on_a_mesh():
    recipe = dataclasses.replace(RECIPES["nf4"], mesh=MeshRecipe("fsdp_tensor"))
    step, arguments = abstract_step(recipe, jax.devices()[:8], 1)
    found = lowered(step, *arguments)
    assert (found.platforms, found.nr_devices) == (PLATFORMS, 8)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_encoding_prefill_and_decoding(quantize):
    generator = Generator(load_model(locate("tiny"), quantize=quantize))
    size = generator.config.visual.image_size
    assert lowered(generator._encode.jitted, generator.leaves, np.zeros((1, 3, size, size), np.float32))

    ids = np.arange(8, dtype=np.int32)
    batch = generator.batch([Prompt(ids, np.full(8, -1, np.int32), np.zeros((0, 3, size, size), np.float32), [])])
    wanted = controls([SamplingOptions(temperature=0.5, top_p=0.5, seed=1)], [], generator.config.vocab_size)
    one = np.zeros(1, np.int32)
    prompt = (*batch, wanted, frequencies(generator.config, batch.lengths), one, np.zeros(1, bool))
    assert lowered(generator._prefill.jitted, generator.leaves, *prompt).platforms == PLATFORMS

    past, state, fixed, _ = jax.eval_shape(lambda: generator.prefill(batch, wanted))
    int8 = jax.eval_shape(in_int8, past)
    extending = generator.program(extend, Layout.batch).jitted
    for kept in (past, int8):
        new = (*batch[:3], batch.features, wanted, frequencies(generator.config, [1]), fixed.in_prompt)
        found = lowered(extending, generator.leaves, *new, one, np.zeros(1, bool), None, past=with_slots(kept, 600))
        assert found.platforms == PLATFORMS
        steps = (kept, fixed, np.int32(0), np.int32(8), np.zeros(1, bool))
        found = lowered(generator.decode_steps.jitted, generator.leaves, *steps, state=state)
        assert found.platforms == PLATFORMS
    speculating = state._replace(history=jax.ShapeDtypeStruct((1, 64), np.int32))
    program = generator.program(partial(decode, drafts=3), Layout.batch).jitted
    assert lowered(program, generator.leaves, *steps, state=speculating).platforms == PLATFORMS
    assert lowered(jax.jit(in_int8), past).platforms == PLATFORMS
    moved = lowered(jax.jit(batch_programs._flush), int8.k[0], state.recent_k[0], one, state.taken)
    assert moved.platforms == PLATFORMS
