"""An engine that answers one request after another in a thread, and goes wrong on demand.

It has the interface of the real one, and run as a program it serves with the options of serve.py. Faults are asked for
by the seed of a request.
"""

import dataclasses
import queue
import sys
import threading
import time
from collections.abc import Callable

import numpy as np

import qwenvl_jax
from qwenvl_jax.inference.generate import Generation
from qwenvl_jax.inference.requests import Listener, Request, TokenChoice, Update
from qwenvl_jax.inference.text import TextStream, token_bytes
from qwenvl_jax.serving import cli, run
from qwenvl_jax.serving.settings import Settings

BREAKS, DIES, STALLS, SLOW, PAUSES, BLOCKS = 9001, 9002, 9003, 9004, 9005, 9006  # seeds
TOKENS_BEFORE_A_FAULT = 3
SLOW_SECONDS = 0.1  # for a token


class Ticket:
    def __init__(self, request: Request, listener: Listener):
        self.request, self.listener = request, listener
        self.cancelled = self.done = False


class Death(BaseException):
    """Ends the engine's thread."""


class SimpleEngine:
    recompiles = 0
    cache_usage = 0.0
    picture_hits = prefix_hits = 0, 0

    def __init__(self, generator, table: dict[int, bytes], max_length: int):
        self.max_length = max_length
        self.last_step = time.monotonic()
        self.running = 0
        self._generator, self._table = generator, table
        self._queue: queue.Queue[Ticket | None] = queue.Queue()
        self._tickets: set[Ticket] = set()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        return sum(not ticket.cancelled for ticket in list(self._tickets)) - self.running

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def submit(self, request: Request, listener: Listener) -> Ticket:
        ticket = Ticket(request, listener)
        if not self._tickets:
            self.last_step = time.monotonic()
        self._tickets.add(ticket)
        self._queue.put(ticket)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        ticket.cancelled = True

    def _run(self) -> None:
        while (ticket := self._queue.get()) is not None:
            self.last_step = time.monotonic()
            if ticket.request.options.seed == BLOCKS:
                time.sleep(3600)
            self.running = 1
            try:
                if not ticket.cancelled:
                    self._answer(ticket)
            except Death:
                return
            except Exception as error:
                ticket.listener(Update("", 0, finish_reason="error", error=f"secret: {error!r}"))
            self._tickets.discard(ticket)
            self.running = 0

    def _answer(self, ticket: Ticket) -> None:
        request = ticket.request
        options = request.options
        stream = TextStream(self._table, stop=options.stop, min_tokens=options.min_new_tokens, strip=request.strip)
        generation = Generation(self._generator, [request.prompt], [options], request.stop_ids)
        waiting: list[TokenChoice] = []
        while not generation.finished and not ticket.cancelled:
            (tokens,) = generation.advance(1)
            self.last_step = time.monotonic()
            self._fault(options.seed, int(generation.generated[0]))
            text = stream.feed(tokens)
            if request.alternatives is not None:
                waiting += [choice(generation.logits[0], token, request.alternatives) for token in tokens]
            if stream.stopped:
                generation.stop(0)
            choices = ()
            if generation.finished:
                text += stream.finish()
            if generation.finished or not stream._held:
                choices, waiting = tuple(waiting), []
            count = stream.tokens if stream.stopped else int(generation.generated[0])
            reason = generation.finish_reasons[0] if generation.finished else None
            if not ticket.cancelled:
                ticket.listener(Update(text, count, choices, reason))

    def _fault(self, seed: int, tokens: int) -> None:
        if seed == SLOW:
            time.sleep(SLOW_SECONDS)
        if tokens != TOKENS_BEFORE_A_FAULT:
            return
        if seed == BREAKS:
            raise RuntimeError("/root/a/path")
        if seed == DIES:
            raise Death
        if seed == STALLS:
            time.sleep(3600)
        if seed == PAUSES:
            time.sleep(1)


def choice(logits: np.ndarray, token: int, alternatives: int) -> TokenChoice:
    logits = logits.astype(np.float64)
    logprobs = logits - logits.max()
    logprobs -= np.log(np.exp(logprobs).sum())
    best = np.argsort(-logprobs, kind="stable")[:alternatives]
    return TokenChoice(token, float(logprobs[token]), tuple((int(other), float(logprobs[other])) for other in best))


def main(change: Callable[[Settings], Settings] = lambda settings: settings) -> int:
    """Serves until a signal comes. change: of what the options say."""
    parser = cli.parser()
    parser.add_argument("--loading-seconds", type=float, default=0)
    options = parser.parse_args()

    def build(say):
        time.sleep(options.loading_seconds)
        vlm = qwenvl_jax.load(options.checkpoint)
        engine = SimpleEngine(vlm.generator, token_bytes(vlm.processor.tokenizer), cli.max_length(options, vlm))
        engine.start()
        return vlm, engine

    settings = dataclasses.replace(change(cli.settings(options)), ping_seconds=0.3)
    with cli.listen(options.host, options.port) as listening:
        return run.serve(settings, listening, build, options.log_level)


if __name__ == "__main__":
    sys.exit(main())
