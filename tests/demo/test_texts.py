"""The two languages say the same things."""

import dataclasses
import re
import string

import pytest

from qwenvl_jax.demo import client, page
from qwenvl_jax.demo.texts import EN, ZH


def holes(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(EN)])
def test_both_languages_have_the_same_words_and_holes(name):
    english, chinese = getattr(EN, name), getattr(ZH, name)
    if isinstance(english, str):
        if name not in ("empty", "schema_hint"):
            assert holes(english) == holes(chinese)
    else:
        assert list(english) == list(chinese)
        for key in english:
            pair = (english[key], chinese[key])
            if isinstance(pair[0], str):
                assert holes(pair[0]) == holes(pair[1])


def test_every_error_has_its_sentence():
    """Found in the sources, so that a new one cannot be forgotten."""
    kinds = set()
    for module in (client, page):
        with open(module.__file__, encoding="utf-8") as source:
            kinds |= set(re.findall(r'AskError\(\s*"(\w+)"', source.read()))
    assert kinds
    assert kinds <= set(EN.errors)
