"""What is asked of an engine and what comes back: token ids and pixels in, text and its tokens out.

No part of this knows HTTP, messages or a model; `engine.py` runs requests, `serving/` makes them.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, Protocol

import numpy as np

from qwenvl_jax.inference.sampling import SamplingOptions
from qwenvl_jax.processing.template import Prompt

FinishReason = Literal["stop", "length", "error"]


class Constraint(Protocol):
    """What a reply must look like, token by token: a grammar, a schema. Used by one thread at a time."""

    def allowed(self) -> np.ndarray:
        """bool [V]: the tokens that may come next, those that end the reply included."""

    def accept(self, token: int) -> None:
        """The reply goes on with this token, one of the allowed ones."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One reply to be generated.

    stop_ids: tokens that end the reply besides those of the options. strip: leave out blanks at both ends.
    alternatives: None for no log-probabilities, else how many of other tokens to give with each, 0 to
    `steps.MOST_ALTERNATIVES`. picture_keys: a digest of each picture of the prompt, by which its features are found
    again; equal keys must mean equal pixels. adapter: which of the model's adapters, from 1 on in their order, reads
    the prompt and writes the reply; 0 is the base model.
    """

    prompt: Prompt
    options: SamplingOptions
    stop_ids: tuple[int, ...] = ()
    strip: bool = False
    alternatives: int | None = None
    picture_keys: tuple[bytes, ...] = ()
    constraint: Constraint | None = None
    adapter: int = 0


@dataclasses.dataclass(frozen=True)
class TokenChoice:
    """A token of a reply and its natural log-probability, before penalties and temperature.

    alternatives: the most likely tokens there, most likely first, whether or not the chosen one is among them.
    """

    token: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Times:
    """Of a reply, in seconds of time.monotonic(): when it was queued, when work for it began, when it had its first
    token and its last."""

    queued: float
    begun: float
    first: float
    last: float


@dataclasses.dataclass(frozen=True)
class Update:
    """What a reply has grown by.

    text: certain from now on; no broken character, no part of a stop string. tokens: of the reply so far, the stop
    token included. choices: of the tokens that `text` is made of, where log-probabilities were asked for.
    finish_reason: set in the last update of a reply; with "error" there is an `error` for the log, which may hold
    anything but must not be shown to a client. cached_tokens: of the prompt, those that needed no computing. times: in
    the last update, unless it is an error.
    """

    text: str
    tokens: int
    choices: tuple[TokenChoice, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    cached_tokens: int = 0
    times: Times | None = None


Listener = Callable[[Update], None]
