"""What an engine needs of memory, and that what is advised where it does not fit can be done."""

import re

import pytest

import qwenvl_jax
from qwenvl_jax.config import UserError
from qwenvl_jax.inference.engine import EngineOptions
from qwenvl_jax.inference.memory import USABLE, check_memory, plan_memory
from qwenvl_jax.serving import cli


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
