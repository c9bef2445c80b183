"""What axe, the checker of accessibility, says of a page."""

from pathlib import Path

import axe_playwright_python
from playwright.sync_api import Page

AXE = Path(axe_playwright_python.__file__).with_name("axe.min.js")


def serious_faults(page: Page, *selectors: str) -> list[str]:
    """Serious and critical faults in the whole page, or in what the selectors name: rule and element."""
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate(
        "selectors => axe.run(selectors.length ? {include: selectors} : document, {resultTypes: ['violations']})",
        list(selectors),
    )
    assert len(found["passes"]) > 5  # it did look
    return [
        f"{fault['id']}: {fault['nodes'][0]['html'][:200]}"
        for fault in found["violations"]
        if fault["impact"] in ("serious", "critical")
    ]
