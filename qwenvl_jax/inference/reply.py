"""One reply of an engine while it grows: tokens and log-probabilities in, updates for its listener out."""

from collections import deque
from collections.abc import Mapping

import numpy as np

from qwenvl_jax.inference.requests import FinishReason, Listener, Request, TokenChoice, Update
from qwenvl_jax.inference.sampling import Controls
from qwenvl_jax.inference.speculation import draftable
from qwenvl_jax.inference.steps import Choice, Grown
from qwenvl_jax.inference.text import TextStream


class Reply:
    """What an engine knows of a request.

    controls: its options, one row. blocks: digests of the prompt's. table: the bytes of each token.
    """

    def __init__(
        self, request: Request, listener: Listener, controls: Controls, blocks: list[bytes], table: Mapping[int, bytes]
    ):
        self.request, self.controls, self.blocks = request, controls, blocks
        self.cancelled = self.finished = False
        self.encoded = 0  # pictures encoded for it
        self.cached = 0  # tokens of the prompt that needed no computing
        self._listener = listener
        options = request.options
        self._stream = TextStream(table, stop=options.stop, min_tokens=options.min_new_tokens, strip=request.strip)
        self.generated = 0  # tokens that were read, a stop token included
        self.draftable = bool(draftable(controls, np.full(1, options.min_new_tokens))[0])  # sooner or later
        self._held: deque[tuple[int, int, TokenChoice]] = deque()  # choices with the characters they begin and end at

    def grow(self, grown: Grown, row: int) -> None:
        """Takes the new tokens of a row, on the host; tells the listener."""
        generated = int(grown.generated[row])
        tokens = grown.tokens[row, : generated - self.generated].tolist()
        self.generated = generated
        if grown.broken[row]:
            return self.fail("the model's logits are no numbers")
        reason: FinishReason | None = None
        if grown.done[row]:
            reason = "length"
            if tokens and self.controls.stops[0, tokens[-1]]:
                tokens.pop()
                reason = "stop"
        if self.request.constraint is not None:
            for token in tokens:
                self.request.constraint.accept(token)
        text = self._feed(tokens, None if grown.choices is None else _row(grown.choices, row))
        if self._stream.stopped:
            reason, generated = "stop", self._stream.tokens
        elif reason is not None:
            text += self._stream.finish()
        choices = self._certain(at_end=reason is not None)
        self.finished = reason is not None
        if text or choices or self.finished:
            self._tell(Update(text, generated, choices, reason, cached_tokens=self.cached))
        return None

    def fail(self, error: str) -> None:
        """Ends the reply in an error."""
        self.finished = True
        self._tell(Update("", self.generated, finish_reason="error", error=error))

    def _tell(self, update: Update) -> None:
        if not self.cancelled:
            self._listener(update)

    def _feed(self, tokens: list[int], choices: Choice | None) -> str:
        text = ""
        wanted = self.request.alternatives
        for place, token in enumerate(tokens):
            if self._stream.stopped:
                break
            begin = self._stream.decoded
            text += self._stream.feed([token])
            if choices is not None and wanted is not None:
                others = zip(choices.top_ids[place, :wanted], choices.top_logprobs[place, :wanted], strict=True)
                choice = TokenChoice(
                    token, float(choices.logprob[place]), tuple((int(id), float(logprob)) for id, logprob in others)
                )
                self._held.append((begin, self._stream.decoded, choice))
        return text

    def _certain(self, at_end: bool) -> tuple[TokenChoice, ...]:
        """The choices of the tokens whose text is certain; at the end also that of one that the end cuts in two."""
        certain, released = self._stream.certain, []
        while self._held and (self._held[0][1] <= certain or (at_end and self._held[0][0] < certain)):
            begin, end, choice = self._held.popleft()
            if not begin < end <= self._stream.skipped:
                released.append(choice)
        return tuple(released)


def _row(choices: Choice, row: int) -> Choice:
    return Choice(*(np.asarray(part)[row] for part in choices))
