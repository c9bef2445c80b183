"""Grammars: whatever a model would say, what comes out has the form."""

import json
import re

import jsonschema
import numpy as np
import pytest

import qwenvl_jax
from qwenvl_jax.config import UserError
from qwenvl_jax.inference.grammar import LEAST_INTEGER, LONGEST_GRAMMAR, MOST_STEPS, Grammars

SCHEMA = {
    "type": "object",
    "properties": {
        "shape": {"enum": ["circle", "Kreuz", "方块"]},
        "label": {"type": "string", "maxLength": 5},
        "corners": {"type": "array", "items": {"enum": [1, 20]}, "minItems": 2, "maxItems": 2},
    },
    "required": ["shape", "label", "corners"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def vlm(fixtures) -> "qwenvl_jax.VLM":
    return qwenvl_jax.load(fixtures / "qwen-vl-chat-tiny")


@pytest.fixture(scope="module")
def grammars(vlm) -> Grammars:
    return Grammars(vlm.processor.tokenizer, vlm.config.vocab_size, vlm.processor.tokenizer.im_end_id)


def drawn(vlm, constraint, seed: int) -> str:
    """A text of tokens drawn from all that are allowed, which is worse than any model."""
    generator = np.random.default_rng(seed)
    tokens: list[int] = []
    while len(tokens) < 400:
        token = int(generator.choice(np.flatnonzero(constraint.allowed())))
        if token == vlm.processor.tokenizer.im_end_id:
            return vlm.processor.decode(tokens)
        constraint.accept(token)
        tokens.append(token)
    raise AssertionError(f"no end: {vlm.processor.decode(tokens)}")


@pytest.mark.parametrize("seed", range(5))
def test_a_schema_is_followed(vlm, grammars, seed):
    jsonschema.validate(json.loads(drawn(vlm, grammars.json_schema(SCHEMA), seed)), SCHEMA)


@pytest.mark.parametrize("seed", range(5))
def test_a_pattern_is_matched(vlm, grammars, seed):
    pattern = "(ja|nein|可能), [0-9]{2,3}°"
    assert re.fullmatch(pattern, drawn(vlm, grammars.regex(pattern), seed))


def test_an_object_begins_like_one(vlm, grammars):
    allowed = np.flatnonzero(grammars.json_object().allowed())
    assert {vlm.processor.decode([token])[0] for token in allowed} == {"{"}


def test_a_copy_goes_its_own_way(vlm, grammars):
    constraint = grammars.regex("ab?")
    other = constraint.copy()
    (a,) = vlm.processor.tokenizer.encode_ordinary("a")
    constraint.accept(a)
    assert not other.allowed()[vlm.processor.tokenizer.im_end_id]
    assert constraint.allowed()[vlm.processor.tokenizer.im_end_id]
    with pytest.raises(RuntimeError):
        constraint.accept(a)


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"type": "object", "if": {}}, 'Unimplemented keys: ["if"]'),
        ({"type": "nonsense"}, "Invalid type: nonsense"),
        ({"$ref": "http://example.com/schema"}, "does not fetch"),
        ({"const": -(2**63)}, "an integer is below"),
        ({"properties": {"a": {"enum": [1, {"b": [-(10**40)]}]}}}, "is below"),
        ({"type": "integer", "multipleOf": 2**31}, "multipleOf is above"),
        ({"type": "number", "multipleOf": 12345.678}, "multipleOf is above"),
        ({"allOf": [{"type": "integer", "multipleOf": 997}, {"multipleOf": 991}]}, "multipleOf is above"),
        ({"required": "😀" * 50}, "char boundary"),  # a mistake in llguidance
        ({"description": "x" * LONGEST_GRAMMAR}, f"longer than {LONGEST_GRAMMAR} bytes"),
    ],
)
def test_a_schema_that_cannot_be_followed(grammars, schema, problem):
    with pytest.raises(UserError, match=re.escape(problem)):
        grammars.json_schema(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": [LEAST_INTEGER, {"a": LEAST_INTEGER}]},
        {"enum": [2**63 - 1]},
        {"type": "integer", "multipleOf": MOST_STEPS},
        {"anyOf": [{"type": "number", "multipleOf": 0.01}, {"type": "number", "multipleOf": 0.5}, {"multipleOf": 5}]},
        {"type": "number", "multipleOf": 1e-9},
        {"type": "object", "properties": {"multipleOf": {"type": "string"}}},
    ],
    ids=str,
)
def test_numbers_that_can_be_followed(grammars, schema):
    assert grammars.json_schema(schema).allowed().any()


@pytest.mark.parametrize(("pattern", "problem"), [("(?=a)b", "look-around"), ("a[", "unclosed character class")])
def test_a_pattern_that_cannot_be_followed(grammars, pattern, problem):
    with pytest.raises(UserError, match=f"the pattern cannot be followed: .*{problem}"):
        grammars.regex(pattern)
