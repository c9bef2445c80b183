"""Replies that must be JSON, follow a JSON schema or match a regular expression, through llguidance.

A reply is constrained token by token: after each one the grammar says which may follow. Only the form is assured; a
reply that is cut off by its length is not whole.
"""

import contextlib
import json
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from qwenvl_jax.config import UserError
from qwenvl_jax.processing.tokenizer import SPLIT_PATTERN, Tokenizer

LONGEST_GRAMMAR = 65536  # bytes
# Of what a schema may ask for, two things have no bound in llguidance 1.9 itself.
MOST_STEPS = 100_000  # of `multipleOf`, in units of its last digit: ten times as many take ten seconds
LEAST_INTEGER = -9 * 10**18  # the smallest of 64 bits ends the whole process, by a stack overflow
# No blanks where JSON leaves them free: a model that may write blanks can write them until its length is used up.
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# Bounds on what a hostile grammar may cost, per token and in all.
_LIMITS = LLParserLimits(initial_lexer_fuel=1_000_000, step_lexer_fuel=200_000, max_grammar_size=500_000)


class Grammars:
    """Makes constraints for the tokens of one tokenizer. Threads may share it.

    vocab_size: the model's, which may be more. end: the token that ends a reply.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end: int):
        self._vocab_size = vocab_size
        self._tokenizer = LLTokenizer.from_tiktoken(  # type: ignore[attr-defined]
            encoder=tokenizer.ranks,
            special_tokens=tokenizer.special_tokens,
            pattern=SPLIT_PATTERN,
            eos_token=end,
            n_vocab=vocab_size,
        )

    def json_object(self) -> "GrammarConstraint":
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def json_schema(self, schema: dict[str, Any]) -> "GrammarConstraint":
        """JSON that the schema describes. Raises UserError for a keyword that is not known, and a schema too long."""
        check_numbers(schema)
        try:
            with _panics():
                grammar = LLMatcher.grammar_from_json_schema(_bounded(json.dumps(schema)), overrides=_COMPACT)  # type: ignore[arg-type]
        except (ValueError, RecursionError, RuntimeError) as error:
            raise UserError(f"the schema cannot be followed: {_reason(error)}") from None
        return self._constraint(grammar, "the schema cannot be followed")

    def regex(self, pattern: str) -> "GrammarConstraint":
        """Text that the whole of the pattern matches. Raises UserError for one with look-around, say, or too long."""
        return self._constraint(LLMatcher.grammar_from_regex(_bounded(pattern)), "the pattern cannot be followed")

    def lark(self, grammar: str) -> "GrammarConstraint":
        """Text of a grammar in llguidance's form of Lark. Raises UserError for one that is none, or too long.

        Schemas in it must have passed `check_numbers`.
        """
        return self._constraint(LLMatcher.grammar_from_lark(_bounded(grammar)), "the grammar cannot be followed")

    def _constraint(self, grammar: str, problem: str) -> "GrammarConstraint":
        try:
            with _panics():
                error = LLMatcher.validate_grammar(grammar, self._tokenizer, limits=_LIMITS)
                matcher = None if error else LLMatcher(self._tokenizer, grammar, limits=_LIMITS)
        except RuntimeError as panic:
            error, matcher = str(panic), None
        if matcher is None:
            raise UserError(f"{problem}: {_reason(error)}")
        return GrammarConstraint(matcher, self._vocab_size)


def check_numbers(schema: Any) -> None:
    """Raises UserError for numbers in a schema that llguidance would not survive, or not in time."""
    steps: list[Fraction] = []
    left = [schema]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += value.values()
            step = value.get("multipleOf")
            if isinstance(step, int | float) and step > 0:
                steps.append(Fraction(str(step)))
        elif isinstance(value, list):
            left += value
        elif isinstance(value, int) and value < LEAST_INTEGER:
            raise UserError(f"the schema cannot be followed: an integer is below {LEAST_INTEGER}")
    # Several may hold for one number, which must then be a multiple of them all. Denominators divide a power of ten.
    digit = math.lcm(*(step.denominator for step in steps))
    together = 1
    for step in steps:
        together = math.lcm(together, int(step * digit))
        if together > MOST_STEPS:
            raise UserError(f"the schema cannot be followed: multipleOf is above {MOST_STEPS:,} times its last digit")


@contextlib.contextmanager
def _panics() -> Iterator[None]:
    """Makes a RuntimeError of what Rust raises on a mistake of its own, which is no Exception and goes by no name."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RuntimeError(str(error)) from None


class GrammarConstraint:
    """What may come next in one reply; a `Constraint` of inference/requests.py."""

    def __init__(self, matcher: LLMatcher, vocab_size: int):
        self._matcher = matcher
        self._vocab_size = vocab_size

    def copy(self) -> "GrammarConstraint":
        """The same for another reply."""
        return GrammarConstraint(self._matcher.deep_copy(), self._vocab_size)

    def allowed(self) -> np.ndarray:
        """bool [V]. Raises RuntimeError when the grammar has cost more than it may."""
        bits = np.zeros(-(-self._vocab_size // 32), np.uint32)
        with _panics():
            self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        if self._matcher.is_error():
            raise RuntimeError(self._matcher.get_error())
        return np.unpackbits(bits.view(np.uint8), bitorder="little")[: self._vocab_size].astype(bool)

    def accept(self, token: int) -> None:
        """Goes on with a token. Raises RuntimeError for one that was not allowed."""
        with _panics():
            accepted = self._matcher.consume_token(token)
        if not accepted:
            raise RuntimeError(self._matcher.get_error())


def _bounded(text: str) -> str:
    if len(text.encode(errors="surrogatepass")) > LONGEST_GRAMMAR:
        raise UserError(f"longer than {LONGEST_GRAMMAR} bytes")
    return text


def _reason(error: Any) -> str:
    """What is wrong, without the drawing of where: the line that begins with "error:", or the first."""
    lines = str(error).strip().splitlines()
    return next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])[:200]
