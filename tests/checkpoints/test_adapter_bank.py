"""Adapter folders loaded side by side: each gives what it gives alone; what a bank cannot hold is refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TESTS
from weights import trained

import qwenvl_jax
from qwenvl_jax.checkpoints.adapter_bank import load_adapters
from qwenvl_jax.checkpoints.huggingface import load_model
from qwenvl_jax.checkpoints.peft import load_adapter, save_adapter
from qwenvl_jax.config import UserError
from qwenvl_jax.models.qwen_vl import frequencies, unstack
from qwenvl_jax.nn.adapter_bank import banked_linears, with_chosen
from qwenvl_jax.nn.attention import causal_mask
from qwenvl_jax.nn.lora import LoraRecipe, merge_adapters
from qwenvl_jax.sharding import make_mesh

FIXTURES = TESTS / "fixtures"
BASE = FIXTURES / "qwen-vl-chat-tiny"
RECIPES = {
    "language": LoraRecipe(rank=3, alpha=5.0),
    "vision": LoraRecipe(rank=2, use_rslora=True, targets=("in_proj", "out_proj", "c_fc", "kv_proj")),
    "ends": LoraRecipe(rank=4, targets=("h.*.mlp.c_proj", "lm_head")),
}
FLOAT32 = 1e-5


@pytest.fixture(scope="module")
def base():
    return load_model(BASE, dtype="float32", stacked=True)


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    """Of our own, and PEFT's; one of them reaches a single layer of a stack, as only a list of layers may have it."""
    root, found = tmp_path_factory.mktemp("adapters"), {}
    for name, recipe in RECIPES.items():
        save_adapter(trained(base, recipe, len(found)), root / name, recipe, base="the-base")
        found[name] = root / name
    one = LoraRecipe(rank=2, targets=("h.1.attn.c_attn",))
    save_adapter(trained(unstack(base), one), root / "one", one, base="the-base")
    return found | {"one": root / "one", "golden": FIXTURES / "lora-adapter"}


@jax.jit
def outputs(model):
    """Logits [B, T, V] of texts and features of as many pictures: for the base and each of five adapters."""
    random, rows = np.random.default_rng(0), 6
    ids, size = random.integers(0, 1200, (rows, 9)), model.config.visual.image_size
    features = model.encode_images(jnp.asarray(random.standard_normal((rows, 3, size, size)), jnp.float32))
    rotary = jnp.asarray(frequencies(model.config, [9] * rows))
    context = model.context(causal_mask(jnp.ones(ids.shape, bool)), jnp.arange(9)[None], rotary)
    return model.logits(model(model.embed(ids), context)[0]), features


@pytest.fixture(scope="module")
def alone(base, folders):
    """Of the base model, and of each adapter loaded by itself, what each row gives."""
    models = [unstack(base), *(load_adapter(unstack(base), folder) for folder in folders.values())]
    return [[np.asarray(part) for part in outputs(model)] for model in models]


@pytest.mark.parametrize("form", ["stack", "list"])
def test_each_is_what_it_is_alone(base, folders, alone, form):
    """Row n with adapter n; without a choice all rows are the base's."""
    banked = load_adapters(base if form == "stack" else unstack(base), folders)
    together, untouched = outputs(with_chosen(banked, np.arange(6, dtype=np.int32))), outputs(banked)
    for number, expected in enumerate(alone):
        for part in (0, 1):
            difference = np.abs(together[part][number] - expected[part][number]).max()
            assert difference <= FLOAT32 * np.abs(expected[part][number]).max()
            np.testing.assert_allclose(untouched[part][number], alone[0][part][number], atol=FLOAT32, rtol=FLOAT32)


def test_only_maps_that_some_adapter_changes_have_a_bank(base, folders):
    assert set(banked_linears(load_adapters(base, {"a": folders["ends"]}))) == {("layers", "down"), ("lm_head",)}
    listed = load_adapters(unstack(base), {"a": folders["one"]})
    assert set(banked_linears(listed)) == {("layers", 1, "qkv")}
    assert load_adapters(base, {}) is base


def test_over_devices(folders):
    """Matrices lie as the weights under them do."""
    mesh = make_mesh("fsdp_tensor")
    model = load_model(BASE, dtype="float32", stacked=True, mesh=mesh)
    bank = load_adapters(model, folders, mesh=mesh).layers.qkv
    assert tuple(bank.a.sharding.spec) == (None, "fsdp", None, None)
    assert tuple(bank.b.sharding.spec) == (None, None, None, None, "tensor")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"use_dora": True}, "use_dora scales"),
        ({"modules_to_save": ("wte", "lm_head")}, r"modules_to_save \(lm_head, wte\) replaces weights"),
        ({"bias": "lora_only"}, "bias = 'lora_only' replaces biases"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_belongs_to_the_base_is_refused(base, folders, tmp_path, fields, named):
    recipe = LoraRecipe(rank=2, **fields)
    save_adapter(trained(base, recipe), tmp_path / "wrong", recipe)
    with pytest.raises(UserError, match=rf"adapter chess \(.*wrong\): adapter_config.json: {named}.*merge it"):
        load_adapters(base, {"first": folders["ends"], "chess": tmp_path / "wrong"})


def test_the_wrong_base_and_the_wrong_folder_are_named(base, folders, tmp_path):
    other = merge_adapters(trained(base, RECIPES["language"]))
    with pytest.raises(UserError, match=r"adapter ends \(.*\): .*another base model \(the-base\)"):
        load_adapters(other, {"ends": folders["ends"]})
    with pytest.raises(UserError, match=rf"adapter chess \({tmp_path}\): .*not an adapter folder"):
        load_adapters(base, {"chess": tmp_path})
    with pytest.raises(UserError, match="the model has an adapter already"):
        load_adapters(load_adapters(base, folders), folders)
    with pytest.raises(UserError, match="the model has an adapter already"):
        qwenvl_jax.load(BASE, adapter=folders["golden"], adapters=folders)
