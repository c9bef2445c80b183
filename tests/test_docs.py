"""The pages that people read: links lead somewhere, and nothing is left to be filled in."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PAGES = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("**/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_relative_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    relative = [link for link in links if "://" not in link]
    assert [link for link in relative if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_no_placeholder_is_left(page):
    assert "FILL-ME" not in page.read_text(encoding="utf-8")


def test_the_commands_of_the_readme_name_files_that_exist():
    """Every script, recipe and picture in the README's shell and Python blocks, but what a user is to bring."""
    text = "\n".join(re.findall(r"```\w*\n(.*?)```", (REPOSITORY / "README.md").read_text(encoding="utf-8"), re.DOTALL))
    named = set(re.findall(r"(?<![\w/.-])(?:[\w-]+/)*[\w-]+\.(?:py|yaml|png)\b", text)) - {"boxes.png"}
    assert {"demo.py", "train.py"} <= named
    assert {name for name in named if not (REPOSITORY / name).exists()} == set()
