"""The whole model against transformers and torch: logits, the loss, gradients of every parameter, greedy replies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from parity.reference import (
    CONFIGS,
    original_tensors,
    random_inputs,
    random_model,
    relative_error,
    tensor,
    tiny_config,
    torch_model,
    torch_names,
)
from torch.nn import functional

from qwenvl_jax.inference.decode import Generator
from qwenvl_jax.inference.generate import Generation
from qwenvl_jax.inference.sampling import SamplingOptions
from qwenvl_jax.models.qwen_vl import QwenVL, Remat, frequencies, unstack
from qwenvl_jax.nn.attention import causal_mask
from qwenvl_jax.processing.template import Prompt
from qwenvl_jax.training.loss import next_token_loss

LOGITS = 5e-5  # absolute, on logits of magnitude 5
GRADIENT = 1e-4  # relative to the largest value of each gradient
SHORTEST_MARGIN = 1e-3  # between the two best tokens of a greedy step: far beyond rounding


def forward(model: QwenVL, inputs, *, remat: Remat = "none"):
    """Hidden states [B, T, D] of a batch in evaluation mode; NTK and logn are off at this length."""
    positions = np.broadcast_to(np.arange(inputs.ids.shape[1]), inputs.ids.shape)
    rotary = frequencies(model.config, [inputs.ids.shape[1]] * len(inputs.ids))
    context = model.context(causal_mask(jnp.asarray(inputs.valid)), positions, rotary)
    return model(model.embed(inputs.ids, model.encode_images(inputs.pixels), inputs.slots), context, remat=remat)[0]


def loss_of(model: QwenVL, inputs, remat: Remat):
    hidden = forward(model, inputs, remat=remat)
    positions = np.broadcast_to(np.arange(inputs.ids.shape[1] - 1), inputs.ids[:, 1:].shape)
    total, count = next_token_loss(model, hidden, positions, inputs.labels[:, 1:], chunk=16)
    return total / count, model.logits(hidden)


@functools.cache
def theirs(name: str):
    """(logits, loss, gradients by torch name) of the reference."""
    model, inputs = random_model(CONFIGS[name]), random_inputs(CONFIGS[name])
    reference = torch_model(model)
    arrays = (inputs.ids, inputs.pixels, inputs.slots, inputs.valid)
    ids, pixels, slots, valid = (tensor(array) for array in arrays)
    logits = reference(ids.long(), pixels, slots.long(), valid)
    targets = tensor(inputs.labels)[:, 1:].long()
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100)
    loss.backward()
    gradients = {key: parameter.grad.numpy() for key, parameter in reference.named_parameters()}
    return logits.detach().numpy(), float(loss.detach()), gradients


@pytest.mark.parametrize(("name", "remat"), [*((name, "none") for name in CONFIGS), ("small_grid", "layers")])
def test_loss_and_gradients_of_every_parameter(name, remat):
    model, inputs = random_model(CONFIGS[name]), random_inputs(CONFIGS[name])
    both = jax.jit(jax.value_and_grad(lambda m: loss_of(m, inputs, remat), has_aux=True))
    (loss, logits), gradients = both(model)
    reference_logits, reference_loss, reference_gradients = theirs(name)
    difference = np.abs(np.asarray(logits) - reference_logits)[inputs.valid]
    assert difference.max() < LOGITS
    assert float(loss) == pytest.approx(reference_loss, rel=2e-6)
    ours = torch_names(model.config, original_tensors(gradients))
    assert set(ours) == set(reference_gradients)
    # Without rotary positions a bias on keys moves all scores of a query alike: its gradient is rounding, nothing else.
    nothing = {key for key in ours if key.startswith("vision.") and key.endswith("k_proj.bias")}
    errors = {key: relative_error(ours[key], reference_gradients[key]) for key in ours.keys() - nothing}
    assert {key: error for key, error in errors.items() if not error < GRADIENT} == {}
    for key in nothing:
        scale = np.abs(reference_gradients[key.replace("k_proj", "q_proj")]).max()
        assert np.abs(ours[key]).max() < GRADIENT * scale, key


@pytest.mark.parametrize("name", CONFIGS)
def test_unstacked_layers_give_the_same_logits(name):
    model, inputs = unstack(random_model(CONFIGS[name])), random_inputs(CONFIGS[name])
    logits = jax.jit(lambda m: m.logits(forward(m, inputs)))(model)
    assert np.abs(np.asarray(logits) - theirs(name)[0])[inputs.valid].max() < LOGITS


@torch.inference_mode()
def reply_of_transformers(language, ids: list[list[int]], tokens: int) -> list[list[int]]:
    """Greedy replies to a left-padded batch. Fails if any step was a close call."""
    longest = max(map(len, ids))
    padded = torch.tensor([[0] * (longest - len(row)) + row for row in ids])
    valid = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
    out = language.generate(
        padded,
        attention_mask=valid,
        do_sample=False,
        max_new_tokens=tokens,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(out.logits).topk(2, dim=-1).values
    assert float((best[..., 0] - best[..., 1]).min()) > SHORTEST_MARGIN, "choose another seed"
    return out.sequences[:, longest:].tolist()


@pytest.mark.parametrize("seed", [0, 1])
def test_greedy_replies(seed):
    """Prompts of different lengths, alone and together, with replies that outgrow the cache's recent part."""
    model = random_model(tiny_config(), seed=seed)
    language = torch_model(model).language
    generator = np.random.default_rng(seed)
    ids = [generator.integers(0, 190, length).tolist() for length in (30, 7, 61)]
    expected = reply_of_transformers(language, ids, tokens=40)
    size = model.config.visual.image_size
    prompts = [
        Prompt(np.array(row, np.int32), np.full(len(row), -1, np.int32), np.zeros((0, 3, size, size), np.float32), [])
        for row in ids
    ]
    ours = Generator(model)
    for rows in ([0, 1, 2], [0], [1]):
        generation = Generation(ours, [prompts[row] for row in rows], [SamplingOptions(max_new_tokens=40)] * len(rows))
        replies = [[] for _ in rows]
        while not generation.finished:
            for reply, new in zip(replies, generation.advance(), strict=True):
                reply += new
        assert replies == [expected[row] for row in rows]
