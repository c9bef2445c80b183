"""The picture with boxes as tests use it: a component on a page, and values for it."""

import json

from playwright.sync_api import Locator, Page, expect

GREY = (120, 120, 120)
SIZES = {"street.png": (640, 480), "garden.jpg": (300, 500)}
CAR = {"image": 0, "label": "red car", "x1": 64, "y1": 96, "x2": 256, "y2": 288}
TREE = {"image": 0, "label": "a tree", "x1": 320, "y1": 48, "x2": 608, "y2": 432}
SECOND_CAR = {"image": 0, "label": "red car", "x1": 0, "y1": 400, "x2": 640, "y2": 480}
UNNAMED = {"image": 0, "label": None, "x1": 400, "y1": 100, "x2": 500, "y2": 200}
FLOWER = {"image": 1, "label": "flower", "x1": 30, "y1": 50, "x2": 150, "y2": 250}


class View:
    """One component on a page."""

    def __init__(self, page: Page, language: str = "en"):
        self.page, self.language = page, language
        self.element = page.locator(f"#view-{language}")
        self.shows = 0

    def part(self, name: str) -> Locator:
        return self.element.locator(f"[data-part={name}]")

    def show(self, *values: dict) -> None:
        """Streams the values into the component; returns when the last one is there."""
        self.shows += 1
        wanted = json.dumps({"name": str(self.shows), "values": values})
        self.page.locator(f"#wanted-{self.language}").locator("input, textarea").fill(wanted)
        self.page.locator(f"#go-{self.language}").click()
        done = self.page.locator(f"#done-{self.language}").locator("input, textarea")
        expect(done).to_have_value(str(self.shows))
        expect(self.part("rows").locator("tr")).to_have_count(len(values[-1]["boxes"]))
        if values[-1]["pictures"]:
            self.part("stage").scroll_into_view_if_needed()  # the mouse reaches no other part of the page

    def heard(self) -> Locator:
        return self.page.locator(f"#heard-{self.language}").locator("input, textarea")

    def rectangles(self) -> list[dict]:
        """Of the boxes' lines on the screen: place, colour, dash, and the number of the box."""
        return self.part("lines").evaluate(
            """lines => Array.from(lines.querySelectorAll(".box-line"), line => {
                const {left, top, right, bottom} = line.getBoundingClientRect();
                return {corners: [left, top, right, bottom], colour: line.getAttribute("stroke"),
                        dash: line.getAttribute("stroke-dasharray"), box: line.parentNode.dataset.box};
            })"""
        )

    def plates(self) -> list[dict]:
        return self.part("plates").evaluate(
            """plates => Array.from(plates.children, plate => {
                const {left, top, right, bottom} = plate.querySelector("rect").getBoundingClientRect();
                return {corners: [left, top, right, bottom], text: plate.textContent,
                        fill: plate.querySelector("rect").getAttribute("fill"),
                        ink: plate.querySelector("text").getAttribute("fill")};
            })"""
        )

    def on_screen(self, size: tuple[int, int], x: float, y: float) -> tuple[float, float]:
        """Where a source pixel of the shown picture, whose size is given, is on the screen."""
        place = self.part("image").bounding_box()
        return place["x"] + x / size[0] * place["width"], place["y"] + y / size[1] * place["height"]

    def cells(self, row: int) -> list[str]:
        return self.part("rows").locator("tr").nth(row).locator("th, td").all_inner_texts()

    def drag(self, size: tuple[int, int], *corners: int) -> None:
        self.part("stage").scroll_into_view_if_needed()
        mouse = self.page.mouse
        mouse.move(*self.on_screen(size, *corners[:2]))
        mouse.down()
        mouse.move(*self.on_screen(size, (corners[0] + corners[2]) / 2, (corners[1] + corners[3]) / 2))
        mouse.move(*self.on_screen(size, *corners[2:]))
        mouse.up()

    def drawn(self) -> Locator:
        return self.part("draft").locator("g:not(.box-hair)")


def open_view(page: Page, address: str, language: str = "en", theme: str = "light") -> View:
    page.goto(f"{address}?__theme={theme}")
    view = View(page, language)
    expect(view.part("noPicture")).to_be_visible()
    return view
