"""A whole model with quantised maps: stacked and listed, and what the compiled decode keeps in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qwenvl_jax.config import QwenVLConfig, UserError, VisionConfig
from qwenvl_jax.inference.decode import Generator
from qwenvl_jax.inference.sampling import SamplingOptions, controls
from qwenvl_jax.models.quantised import FORMS, LINEARS, Quantisation, dequantise, form_of, quantise, quantised_linears
from qwenvl_jax.models.qwen_vl import QwenVL, frequencies, unstack
from qwenvl_jax.nn.attention import causal_mask
from qwenvl_jax.processing.template import Prompt
from qwenvl_jax.sharding import param_paths

each_form = pytest.mark.parametrize("form", FORMS)
LAYERS = 4
VISUAL = VisionConfig(
    image_size=28, patch_size=14, width=16, layers=1, heads=2, mlp_ratio=2.0, output_dim=128, n_queries=4,
    image_start_id=60,
)  # fmt: skip
CONFIG = QwenVLConfig(
    vocab_size=64, hidden_size=128, num_hidden_layers=LAYERS, num_attention_heads=2, kv_channels=64,
    intermediate_size=1024, seq_length=64, max_position_embeddings=256, initializer_range=0.1, visual=VISUAL,
)  # fmt: skip
LAYER_BYTES = 4 * (4 * 128 * 128 + 3 * 128 * 512)  # float32 weights of one layer


@pytest.fixture(scope="module")
def model() -> QwenVL:
    return QwenVL(CONFIG, rngs=nnx.Rngs(0))


def logits(model: QwenVL, ids: np.ndarray) -> np.ndarray:
    @jax.jit
    def run(model, ids):
        positions = jnp.arange(ids.shape[1])[None]
        context = model.context(causal_mask(jnp.ones(ids.shape, bool)), positions, frequencies(CONFIG, [0]))
        return model.logits(model(model.embed(ids), context)[0])

    return np.asarray(run(model, ids))


@each_form
def test_stacked_listed_and_dequantised_compute_the_same(model, form):
    ids = np.random.default_rng(0).integers(0, 60, (1, 12))
    quantised = quantise(model, Quantisation(form))
    expected = logits(dequantise(quantised), ids)
    np.testing.assert_allclose(logits(quantised, ids), expected, atol=2e-5)
    np.testing.assert_allclose(logits(unstack(quantised), ids), expected, atol=2e-5)
    exact = logits(model, ids)
    error = np.sqrt(np.mean((expected - exact) ** 2) / np.var(exact))
    assert 0 < error < {"int8": 0.06, "int4": 0.8, "nf4": 0.8}[form]


def test_only_the_maps_of_the_language_model_are_quantised(model):
    quantised = quantise(unstack(model), Quantisation("int8"))
    names = {f"layers.{layer}.{name}" for layer in range(LAYERS) for name in LINEARS}
    assert {path for path, _ in quantised_linears(quantised)} == names
    assert {form_of(linear) for _, linear in quantised_linears(quantised)} == {"int8"}
    before, after = param_paths(unstack(model)), param_paths(quantised)
    for path in ("embedding.table", "lm_head.kernel", "visual.projection.kernel", "layers.0.qkv.bias"):
        np.testing.assert_array_equal(after[path], before[path], err_msg=path)
    with pytest.raises(UserError, match=r"quantised already \(int8\)"):
        quantise(quantised, Quantisation("nf4"))


@each_form
def test_the_compiled_decode_widens_one_layer_at_a_time(model, form):
    """Its layers are a list inside a loop over tokens, where a compiler would like to widen all of them ahead."""

    def temporary_bytes(model: QwenVL) -> int:
        generator = Generator(model)
        ids = np.arange(8, dtype=np.int32)
        prompt = Prompt(ids, np.full(8, -1, np.int32), np.zeros((0, 3, 28, 28), np.float32), [])
        past, state, fixed, _ = generator.prefill(generator.batch([prompt]), controls([SamplingOptions()], [], 64))
        stopped = np.zeros(1, bool)
        lowered = generator.decode_steps.jitted.lower(
            generator.leaves, past, fixed, np.int32(0), np.int32(8), stopped, state=state
        )
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(quantise(model, Quantisation(form))) < temporary_bytes(model) + LAYER_BYTES
