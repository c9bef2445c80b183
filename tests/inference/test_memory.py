"""What an engine needs of memory, and that what is advised where it does not fit can be done."""

import math
import re

import jax
import pytest

import qwenvl_jax
from qwenvl_jax.config import UserError
from qwenvl_jax.inference.engine import EngineOptions
from qwenvl_jax.inference.memory import USABLE, MemoryPlan, check_memory, plan_memory
from qwenvl_jax.serving import cli
from qwenvl_jax.sharding import make_mesh


@pytest.fixture(scope="module")
def vlm():
    return qwenvl_jax.load("tiny")


def test_what_grows_with_what(vlm):
    base = plan_memory(vlm.generator, EngineOptions(4, 256))
    more = plan_memory(vlm.generator, EngineOptions(8, 256, prefixes=2 * 16384))
    assert more.cache == 2 * base.cache
    assert more.prefixes == 2 * base.prefixes
    assert (more.weights, more.pictures, more.work) == (base.weights, base.pictures, base.work)
    assert base.weights == sum(leaf.nbytes for leaf in vlm.generator.leaves)
    assert base.fits


def test_each_device_of_a_mesh_needs_its_part():
    def plan(slots: int, **sizes: int) -> MemoryPlan:
        mesh = make_mesh("fsdp_tensor", jax.devices()[: math.prod(sizes.values())], **sizes)
        generator = qwenvl_jax.load("tiny", mesh=mesh).generator
        found = plan_memory(generator, EngineOptions(slots, 256))
        for device in mesh.devices.flat:
            shards = (shard for leaf in generator.leaves for shard in leaf.addressable_shards)
            assert found.weights == sum(shard.data.nbytes for shard in shards if shard.device == device)
        return found

    one, tensor, data = plan(4, data=1, tensor=1), plan(4, data=1, tensor=2), plan(4, data=2, tensor=1)
    assert (tensor.cache, tensor.prefixes, tensor.work) == (one.cache // 2, one.prefixes // 2, one.work // 2)
    assert (data.cache, data.prefixes, data.work) == (one.cache // 2, one.prefixes, one.work)
    assert (data.sampling, tensor.sampling) == (one.sampling // 2, one.sampling)
    assert (data.weights, one.weights > 1.5 * tensor.weights) == (one.weights, True)
    assert plan(3, data=2, tensor=1).cache == plan(3, data=1, tensor=1).cache


def test_the_advice_of_what_does_not_fit_is_taken_by_the_server(vlm):
    def sizes(*words: str) -> EngineOptions:
        return cli.engine_options(cli.parser().parse_args(["--max-model-len", "256", *words]), vlm)

    without = plan_memory(vlm.generator, sizes("--slots", "2", "--prefixes", "0"))
    available = int(without.needed / USABLE) + 1
    with pytest.raises(UserError, match="slots 2 and prefixes 0 would fit") as caught:
        check_memory(vlm.generator, sizes("--slots", "8"), available)
    words = re.sub(
        r"(slots|prefixes) (\d+) ?(and )?", r"--\1 \2 ", re.search("slots.*(?= would)", str(caught.value))[0]
    ).split()
    assert check_memory(vlm.generator, sizes(*words), available).fits
    with pytest.raises(UserError, match="shorter max_length"):
        check_memory(vlm.generator, sizes(), 1000)
