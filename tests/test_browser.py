"""The page in a real browser: sort, filter, open, keyboard, accessibility, and no request.

Needs the extra [browser] and a Chromium (ROBUSTDEQ_CHROMIUM names another than Debian's).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from reports import Row, made_run, repeated

from robustdeq.reporting.page.build import write_page
from robustdeq.verdict import Failure

CHROMIUM = os.environ.get("ROBUSTDEQ_CHROMIUM") or shutil.which("chromium")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
    pytest.mark.skipif(
        importlib.util.find_spec("playwright") is None, reason="needs the extra [browser]"
    ),
]
QUIET = (
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
HOSTILE = "<img src=https://example.invalid/x onerror=\"document.title='owned'\">"
ROWS = [
    Row("Alpha", "deq", about={"title": HOSTILE}),
    Row("Beta", "lyadeq", broken=(0, 0, 0, 0)),
    Row("Gamma", "deq", threat="Linf:1/16", broken=(9, 0, 0, 0)),
    Row(HOSTILE, "deq", attacked=2, failures=(Failure("pgd", 0, "it broke down"),)),
    Row("Delta", "deq", attacked=None),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        held = started.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield held
        held.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    return write_page(made_run(folder, ROWS))


class Opened:
    """A page, with all that the browser complained of and asked the network for."""

    def __init__(self, browser: Any, file: Path, width: int = 1280, **more: Any) -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 900}, **more)
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())

    def ids(self) -> list[str]:
        """The names of the rows that are shown, in order."""
        names = self.page.locator("#rows tbody tr:not(:has(td[colspan])) .open").all()
        return [name.inner_text() for name in names]

    def sorted(self, column: str, order: str) -> None:
        """Wait until it is: the page may sort a moment after it was asked to."""
        heading = self.page.locator(f"#rows th[aria-sort={order}]", has_text=column)
        heading.first.wait_for(timeout=10_000)


@pytest.fixture
def opened(browser: Any, page_file: Path) -> Iterator[Opened]:
    held = Opened(browser, page_file)
    yield held
    outside = [url for url in held.requests if not url.startswith(("file:", "data:"))]
    assert (held.messages, outside) == ([], [])
    assert "owned" not in held.page.title()
    held.page.close()


def test_a_click_sorts_and_missing_figures_stand_at_the_end(opened: Opened) -> None:
    assert opened.page.locator("#shown").inner_text() == "5 of 5 rows shown"
    header = opened.page.get_by_role("columnheader", name="Robust").locator(".dt-column-order")
    header.click()
    opened.sorted("Robust", "ascending")
    assert opened.ids()[-3:] == ["Gamma", "Alpha", "Beta"]
    header.click()
    opened.sorted("Robust", "descending")
    assert opened.ids()[:3] == ["Beta", "Alpha", "Gamma"]


def test_filters_and_search_narrow_the_table(opened: Opened) -> None:
    opened.page.select_option("[data-filter=threat]", "Linf:1/16")
    assert opened.ids() == ["Gamma"]
    opened.page.click("#reset")
    opened.page.select_option("[data-filter=family]", "deq")
    opened.page.select_option("[data-filter=status]", "ok")
    assert sorted(opened.ids()) == ["Alpha", "Gamma"]
    opened.page.fill("#search", "alp")
    assert opened.ids() == ["Alpha"]
    assert opened.page.locator("#shown").inner_text() == "1 of 5 rows shown"


def test_a_row_opens_to_its_evidence_and_closes(opened: Opened) -> None:
    button = opened.page.get_by_role("button", name="Alpha")
    evidence = opened.page.locator("#rows .evidence")
    assert evidence.count() == 0
    button.click()
    assert button.get_attribute("aria-expanded") == "true"
    assert "apgd-ce 3" in evidence.inner_text()
    assert HOSTILE in evidence.inner_text()
    assert evidence.locator("img.examples").evaluate("image => image.naturalWidth") > 0
    button.click()
    assert button.get_attribute("aria-expanded") == "false"
    assert evidence.count() == 0
    button.click()  # the evidence has not been lost
    assert "apgd-ce 3" in evidence.inner_text()


def test_the_keyboard_reaches_everything(opened: Opened) -> None:
    button = opened.page.get_by_role("button", name="Beta")
    button.focus()
    opened.page.keyboard.press("Enter")
    assert button.get_attribute("aria-expanded") == "true"
    opened.page.keyboard.press("Space")
    assert button.get_attribute("aria-expanded") == "false"
    header = opened.page.get_by_role("columnheader", name="Clean")
    header.locator(".dt-column-order").focus()
    opened.page.keyboard.press("Enter")
    opened.sorted("Clean", "ascending")


def test_an_address_with_a_row_opens_that_row(browser: Any, page_file: Path) -> None:
    page = browser.new_page()
    page.goto(page_file.as_uri() + "#row-0")
    assert page.locator("#rows .evidence").count() == 1
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_an_accessibility_checker_finds_nothing(
    browser: Any, page_file: Path, width: int, scheme: str
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    held = Opened(browser, page_file, width, color_scheme=scheme)
    for name in ("Alpha", "Delta"):
        held.page.get_by_role("button", name=name).click()
    found = Axe().run(held.page)
    assert found.violations_count == 0, found.generate_report()
    held.page.close()


def test_a_phone_scrolls_in_one_direction_only(browser: Any, page_file: Path) -> None:
    held = Opened(browser, page_file, 390)
    held.page.get_by_role("button", name="Alpha").click()
    wide = held.page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 390
    assert held.page.locator("#rows").evaluate("table => table.scrollWidth") <= 390
    held.page.close()


def test_without_scripts_everything_can_be_read(browser: Any, page_file: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(page_file.as_uri())
    assert not page.locator(".filters").is_visible()
    page.locator("#row-0 summary").click()
    assert page.locator("#row-0 .evidence").is_visible()
    context.close()


def test_print_shows_the_table_and_open_rows_alone(browser: Any, page_file: Path) -> None:
    held = Opened(browser, page_file)
    held.page.get_by_role("button", name="Alpha").click()
    held.page.emulate_media(media="print")
    assert not held.page.locator(".filters").is_visible()
    assert held.page.locator("#rows .evidence").is_visible()
    held.page.close()


def test_two_hundred_rows_are_usable_within_a_second(browser: Any, tmp_path: Path) -> None:
    file = write_page(repeated(made_run(tmp_path, ROWS[:3]), 200))
    assert file.stat().st_size < 5_000_000
    page = browser.new_page()
    # Processor time of the page's thread, for other work on the machine must not fail a test.
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.goto(file.as_uri())
    page.get_by_text("200 of 200 rows shown").wait_for()
    page.fill("#search", "Row7_")
    assert page.locator("#shown").inner_text() == "1 of 200 rows shown"
    metrics = session.send("Performance.getMetrics")["metrics"]
    (seconds,) = (m["value"] for m in metrics if m["name"] == "TaskDuration")
    assert 0 < seconds < 1.0
    page.close()
