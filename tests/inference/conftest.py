"""Models for tests of generation: a small random one, and the tiny checkpoint of tests/fixtures."""

import pytest
from flax import nnx

import qwenvl_jax
from qwenvl_jax.config import QwenVLConfig, VisionConfig
from qwenvl_jax.inference.decode import Generator
from qwenvl_jax.models.qwen_vl import QwenVL


@pytest.fixture(scope="session")
def small_model() -> QwenVL:
    """Random, with a training length of 64, so that prompts on both sides of NTK and logn scaling are cheap."""
    visual = VisionConfig(
        image_size=28, patch_size=14, width=16, layers=1, heads=2, mlp_ratio=2.0, output_dim=128, n_queries=4,
        image_start_id=300,
    )  # fmt: skip
    config = QwenVLConfig(
        vocab_size=320, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, kv_channels=64,
        intermediate_size=128, seq_length=64, max_position_embeddings=256, initializer_range=0.3, visual=visual,
    )  # fmt: skip
    return QwenVL(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="session")
def generator(small_model) -> Generator:
    return Generator(small_model)


@pytest.fixture(scope="session")
def vlm(fixtures) -> "qwenvl_jax.VLM":
    """With pictures read as the original reads them."""
    return qwenvl_jax.load(fixtures / "qwen-vl-chat-tiny", image_mode="reference")
