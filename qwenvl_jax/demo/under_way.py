"""A reply under way: it can be stopped, and made to say nothing more."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator

from qwenvl_jax.demo.client import Answer

SECONDS_FOR_LAST_WORDS = 5  # of a reply whose visitor has gone, perhaps: Gradio may never ask it for more


class UnderWay:
    """abandoned: the conversation has gone on without the reply."""

    def __init__(self) -> None:
        self.stopped = asyncio.Event()
        self.ended = asyncio.Event()
        self.abandoned = False

    async def abandon(self) -> None:
        """Returns when the reply can show nothing more, so that what follows is not overwritten by its last words."""
        self.abandoned = True
        self.stopped.set()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.ended.wait(), SECONDS_FOR_LAST_WORDS)

    async def until_stopped(self, answers: AsyncIterator[Answer]) -> AsyncGenerator[Answer]:
        """The answers until there are no more, or until `stopped` is set, which closes their connection."""
        waiting = asyncio.ensure_future(self.stopped.wait())
        try:
            while True:
                coming = asyncio.ensure_future(anext(answers, None))
                await asyncio.wait({coming, waiting}, return_when=asyncio.FIRST_COMPLETED)
                if not coming.done():
                    coming.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await coming
                    return
                if (answer := coming.result()) is None:
                    return
                yield answer
        finally:
            waiting.cancel()
            await answers.aclose()  # type: ignore[attr-defined]  # they are a generator
