"""The documents as a site: it builds without a warning, and loads nothing from elsewhere."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from documents import ROOT

NEEDED = ("mkdocs", "material", "mkdocstrings_handlers")
pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, NEEDED)) or not (ROOT / "mkdocs.yml").is_file(),
    reason="needs the extra [docs] and the checkout",
)
LOADS = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}
"""Elements that make a browser fetch something, and the attribute that says what."""


class Fetched(HTMLParser):
    """What a page makes a browser fetch; not where its links lead."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in LOADS and given.get("rel") not in ("canonical", "prev", "next"):
            self.places.append(given.get(LOADS[tag]) or "")


def fetched(html: str) -> list[str]:
    parser = Fetched()
    parser.feed(html)
    return parser.places


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return folder


def test_it_holds_every_page_and_the_api(site: Path) -> None:
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")}
    assert pages <= {page.stem for page in site.glob("*.html")}
    text = (site / "api.html").read_text()
    for name in ("evaluate", "load_model", "interfaces.Attack.run", "targets.Target.dynamics"):
        assert f'id="robustdeq.{name}"' in text


def test_it_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    places = {place for page in pages for place in fetched(page.read_text())}
    assert {place for place in places if place.endswith(".css")}
    assert [place for place in places if place.startswith(("http:", "https:", "//"))] == []
    for sheet in site.rglob("*.css"):
        assert "@import" not in sheet.read_text()
        assert "url(http" not in sheet.read_text()


def test_what_is_loaded_from_elsewhere_would_be_seen() -> None:
    page = '<link rel="stylesheet" href="https://a/b.css"><script src="//c/d.js"></script>'
    assert fetched(page) == ["https://a/b.css", "//c/d.js"]
