"""What requests share: the threads for pictures, how few there are, and what is left of a picture afterwards."""

import asyncio
import os
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image
from serving.process import encoded, user
from serving.simple_engine import SimpleEngine
from serving.test_pictures import file

import qwenvl_jax
from qwenvl_jax.inference.text import token_bytes
from qwenvl_jax.serving import prompts
from qwenvl_jax.serving.schema import ChatRequest
from qwenvl_jax.serving.settings import Settings
from qwenvl_jax.serving.state import MOST_DECODES, Server

THREADS = min(max((os.cpu_count() or 2) - 2, 2), MOST_DECODES)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(Settings())
    yield server
    server.close()


class Gate:
    """Work that begins and goes on until it is let go."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.open = threading.Event()

    def __call__(self, number: int) -> int:
        self.begun.append(number)
        assert self.open.wait(10)
        return number


async def until(true) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


def test_few_pictures_are_decoded_at_one_time(server):
    gate = Gate()

    async def run() -> list[int]:
        tasks = [asyncio.ensure_future(server.with_pictures(gate, number)) for number in range(40)]
        await until(lambda: len(gate.begun) == THREADS)
        await asyncio.sleep(0.1)
        assert len(gate.begun) == THREADS
        gate.open.set()
        return await asyncio.gather(*tasks)

    assert asyncio.run(run()) == list(range(40))


def test_who_goes_away_leaves_the_queue(server):
    gate = Gate()

    async def run() -> None:
        first = [asyncio.ensure_future(server.with_pictures(gate, number)) for number in range(THREADS)]
        gone = asyncio.ensure_future(asyncio.wait_for(server.with_pictures(gate, 100), 60))
        stays = asyncio.ensure_future(server.with_pictures(gate, 101))
        await until(lambda: len(gate.begun) == THREADS)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        first[0].cancel()  # it runs already: its thread is not given to another before it ends
        await asyncio.sleep(0.1)
        assert len(gate.begun) == THREADS
        gate.open.set()
        await stays

    asyncio.run(run())
    assert sorted(gate.begun) == [*range(THREADS), 101]


def test_slow_downloads_hold_up_no_data(server):
    gate = Gate()

    async def run() -> None:
        waiting = [asyncio.ensure_future(server.with_downloads(gate, number)) for number in range(40)]
        assert await asyncio.wait_for(server.with_pictures(int, "7"), 5) == 7
        gate.open.set()
        await asyncio.gather(*waiting)

    asyncio.run(run())


@pytest.fixture(scope="module")
def vlm() -> qwenvl_jax.VLM:
    return qwenvl_jax.load("tiny")


@pytest.mark.parametrize("size", [(1001, 333), (20, 700), (1, 1), (224, 224)], ids=str)
def test_a_picture_is_kept_at_the_models_size_and_its_boxes_are_its_own(server, vlm, size):
    """The prompt is that of the whole picture, to the bit."""
    server.install(vlm, SimpleEngine(vlm.generator, token_bytes(vlm.processor.tokenizer), 512))
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    asked = [{"type": "box", "box": [0, 0, size[0] / 3, size[1] / 7]}, {"type": "text", "text": "?"}]
    body = ChatRequest.model_validate({"model": "tiny", "messages": user([encoded(file(pixels)), *asked])})
    prompt = asyncio.run(prompts.from_messages(body.messages, server)).prompt
    expected = vlm.processor.chat(user([{"type": "image", "image": Image.fromarray(pixels)}, *asked]))
    np.testing.assert_array_equal(prompt.input_ids, expected.input_ids)
    np.testing.assert_array_equal(prompt.pixels, expected.pixels)
    side = vlm.config.visual.image_size
    assert [source.square.size for source in prompt.sources] == [(side, side)]
    assert vlm.processor.load is not server.processor.load  # the model's own still loads
