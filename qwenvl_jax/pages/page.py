"""A page of one file that loads nothing and runs no script. What it is given as content is markup; `e` makes markup of
text, and all text of others goes through it."""

import html
from collections.abc import Iterable, Mapping

from qwenvl_jax.pages.style import STYLE

e = html.escape


def page(title: str, sections: Iterable[str], style: str = "") -> str:
    """The whole page. style: rules beside those of all pages."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{e(title)}</title>'
        f"<style>{STYLE}{style}</style></head>\n"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def section(title: str, content: str) -> str:
    """A part of the page under a heading; "" where there is no content."""
    return f"<section><h2>{e(title)}</h2>{content}</section>\n" if content else ""


def facts(of: Mapping[str, str]) -> str:
    """Names with their values, all of them text."""
    return "<dl>" + "".join(f"<div><dt>{e(name)}</dt><dd>{e(value)}</dd></div>" for name, value in of.items()) + "</dl>"
