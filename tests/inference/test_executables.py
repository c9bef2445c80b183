"""Programs kept on disk: what starts again reads them, says the same, and never takes one that is not its own."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwenvl_jax.inference import executables

START = """
import dataclasses, json, sys, threading
import jax
from qwenvl_jax.inference.engine import Engine, EngineOptions
from qwenvl_jax.inference.requests import Request
from qwenvl_jax.inference.text import token_bytes
import qwenvl_jax

jax.config.update("jax_compilation_cache_dir", sys.argv[1])
vlm = qwenvl_jax.load("tiny")
engine = Engine(vlm.generator, token_bytes(vlm.processor.tokenizer), EngineOptions(1, 128, prefixes=0))
engine.warm_up()
compiled = vlm.generator.programs.compiled
engine.start()
done, texts = threading.Event(), []

def listen(update):
    texts.append(update.text)
    if update.finish_reason:
        done.set()

question = [{"type": "image", "image": sys.argv[2]}, {"type": "text", "text": "Where is the yellow cross?"}]
prompt = vlm.processor.chat([{"role": "user", "content": question}], 120)
engine.submit(Request(prompt, vlm.defaults, tuple(vlm.chat_stop_ids)), listen)
done.wait(60)
engine.stop()
print(json.dumps({"compiled": compiled, "text": "".join(texts)}))
"""


def start(folder: Path, picture: Path) -> dict:
    ran = subprocess.run([sys.executable, "-c", START, folder, picture], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_a_second_start_compiles_nothing(tmp_path):
    picture = Path(executables.__file__).parents[1] / "assets" / "pictures" / "word.png"
    first, second = start(tmp_path, picture), start(tmp_path, picture)
    assert first["compiled"] > 5
    assert second["compiled"] == 0
    assert second["text"] == first["text"] != ""


@pytest.fixture
def cache(tmp_path):
    """JAX's cache in a folder of the test."""
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)


def program(scale: float) -> jax.stages.Compiled:
    return jax.jit(lambda x: x * scale).lower(jax.ShapeDtypeStruct((3,), jnp.float32)).compile()


def test_keeps_and_finds(cache):
    with executables.kept() as found:
        assert found.load("twice", jax.devices()[:1]) is None
        found.save("twice", program(2))
    with executables.kept() as again:
        np.testing.assert_array_equal(again.load("twice", jax.devices()[:1])(np.arange(3, dtype=np.float32)), [0, 2, 4])


def test_what_was_cut_short_is_as_if_not_there(cache):
    with executables.kept() as found:
        found.save("twice", program(2))
        path = next(path for path in cache.rglob("twice"))
        path.write_bytes(path.read_bytes()[:1000])
        assert found.load("twice", jax.devices()[:1]) is None


def test_a_full_disk_is_no_error(cache, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device")

    with executables.kept() as found:
        monkeypatch.setattr(Path, "write_bytes", full)
        found.save("twice", program(2))
        assert found.load("twice", jax.devices()[:1]) is None
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_another_setting_has_programs_of_its_own(cache):
    with executables.kept() as found:
        found.save("twice", program(2))
    with jax.default_matmul_precision("highest"), executables.kept() as here:
        assert here.load("twice", jax.devices()[:1]) is None


def test_keys_tell_programs_apart():
    shape = jax.ShapeDtypeStruct((3,), jnp.float32)
    others = [
        jax.ShapeDtypeStruct((4,), jnp.float32),
        jax.ShapeDtypeStruct((3,), jnp.int32),
        [shape],
        {"a": shape},
        3,
        4,
    ]
    keys = {executables.key("f", executables.arguments(((one,), {}))) for one in [shape, *others]}
    assert len(keys) == 7
    assert executables.key("f", 1) != executables.key("f", 2) != executables.key("g", 2)
    assert executables.key("f", 1) == executables.key("f", 1)


def test_without_a_cache_nothing_is_kept(cache):
    jax.config.update("jax_compilation_cache_dir", None)
    with executables.kept() as found:
        assert found is None
