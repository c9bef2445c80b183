"""Cached features are those of the tower; pictures are known by what they show, towers by their weights."""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from qwenvl_jax.config import QwenVLConfig, UserError, VisionConfig
from qwenvl_jax.data.feature_cache import CHUNK, FeatureCache, fingerprint
from qwenvl_jax.data.measure import measure
from qwenvl_jax.data.mixture import Mixture
from qwenvl_jax.data.record_batches import BatchRecipe, RecordBatches, record_batches
from qwenvl_jax.data.records import Record
from qwenvl_jax.models.qwen_vl import QwenVL
from qwenvl_jax.processing.processor import Processor
from qwenvl_jax.processing.tokenizer import Tokenizer
from qwenvl_jax.training.record_rows import record_hidden


@pytest.fixture(scope="module")
def processor():
    tokenizer = Tokenizer.from_file("qwenvl_jax/assets/tiny/qwen.tiktoken", 4)
    vision = VisionConfig(
        image_size=8, patch_size=4, width=8, layers=1, heads=1, mlp_ratio=2.0, output_dim=128, n_queries=4,
        image_start_id=tokenizer.image_start_id,
    )  # fmt: skip
    return Processor(tokenizer, QwenVLConfig(1024, 128, 1, 1, 64, vision))


@pytest.fixture(scope="module")
def model(processor):
    return QwenVL(processor.config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))


def picture(shade: int) -> Image.Image:
    return Image.fromarray(np.full((5, 4, 3), shade, np.uint8))


def record(number: int, pictures: list[Image.Image]) -> Record:
    content = [*({"type": "image", "image": image} for image in pictures), {"type": "text", "text": "what?"}]
    return Record([{"role": "user", "content": content}, {"role": "assistant", "content": "red"}], f"m:{number}")


RECORDS = [record(number, [picture(number % 20), picture(100)][: number % 3]) for number in range(30)]
DIFFERENT = len({shade for number in range(30) for shade in [number % 20, 100][: number % 3]})


@pytest.fixture(scope="module")
def cache(model, processor, tmp_path_factory):
    cache = FeatureCache(tmp_path_factory.mktemp("features"), model)
    bad = Record([{"role": "user", "content": "no answer"}], "m:99")
    assert DIFFERENT > CHUNK  # more than is encoded at once
    assert cache.fill(model, [*RECORDS, bad], processor) == DIFFERENT
    assert cache.fill(model, RECORDS, processor) == 0
    return cache


def test_batches_of_features_give_the_numbers_of_batches_of_pixels(model, processor, cache):
    measures = measure(RECORDS, processor)
    shape = {"rows": 2, "epochs": 1, "measures": measures}
    plain = RecordBatches(BatchRecipe(max_length=160), Mixture([RECORDS]), processor, **shape)
    cached = RecordBatches(BatchRecipe(max_length=160), Mixture([RECORDS]), processor, features=cache, **shape)
    hidden = jax.jit(lambda model, batch: record_hidden(model, batch, longest=plain.longest)[0])
    for number in (0, len(plain) - 1):
        assert "pixels" not in cached[number]
        assert cached[number]["features"].dtype == jnp.bfloat16
        assert np.array_equal(cached[number]["slots"], plain[number]["slots"])
        real = plain[number]["group"] > 0
        expected = np.asarray(hidden(model, plain[number]), np.float32)[real]
        found = np.asarray(hidden(model, cached[number]), np.float32)[real]
        np.testing.assert_allclose(found, expected, atol=0.06)  # bfloat16, rounded elsewhere in the two programs
        assert np.abs(expected).mean() > 0.3


def test_workers_read_features(processor, cache, model):
    batches = RecordBatches(
        BatchRecipe(max_length=160), Mixture([RECORDS]), processor, rows=2, epochs=1, features=cache
    )
    assert len(batches) > 1
    for found, expected in zip(record_batches(batches, workers=1), record_batches(batches, workers=0), strict=True):
        assert all(np.array_equal(found[name], expected[name]) for name in expected)
        assert found["features"].dtype == expected["features"].dtype


def test_another_tower_or_picture_is_not_found(model, processor, cache, tmp_path):
    other = QwenVL(processor.config, dtype=jnp.bfloat16, rngs=nnx.Rngs(1))
    assert fingerprint(other) != fingerprint(model)
    with pytest.raises(UserError, match="fill again"):
        FeatureCache(cache.folder.parent, other).read(picture(100))
    with pytest.raises(UserError, match="fill again"):
        cache.read(picture(101))
    assert cache.read(picture(100)).shape == (4, 128)
    other.layers = model.layers  # the language model is not the tower
    assert fingerprint(QwenVL(processor.config, dtype=jnp.bfloat16, rngs=nnx.Rngs(1))) == fingerprint(other)


def test_a_damaged_file_is_named(model, processor, tmp_path):
    cache = FeatureCache(tmp_path, model)
    cache.fill(model, RECORDS[:2], processor)
    path = cache.file(picture(1))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{path}.*remove it"):
        cache.read(picture(1))


def test_hosts_of_the_same_process_number_write_the_same_file(cache):
    """As the hosts of a cluster do that run in containers, each as its first process; here threads of one."""
    path, features = cache.folder / "00" / "shared", np.zeros(1 << 16, np.float32)
    with ThreadPoolExecutor(4) as hosts:
        list(hosts.map(lambda _: cache.write(path, features), range(100)))
    assert [file.name for file in path.parent.iterdir() if "shared" in file.name] == ["shared"]
    assert path.read_bytes() == features.tobytes()
