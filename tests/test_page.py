"""The page as text: what it says, what it must not do, how large it gets."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from reports import LABELS, Row, made_run, repeated

from robustdeq.errors import DamagedError
from robustdeq.reporting.images import read_images
from robustdeq.reporting.page.build import CHARTS, render_page, write_page
from robustdeq.reporting.page.environment import asset, breakable, cut, link, percent, policy
from robustdeq.reporting.page.evidence import stage_views
from robustdeq.reporting.page.examples import examples_of
from robustdeq.reporting.page.sparkline import sparkline
from robustdeq.reporting.publish import publish, publish_report
from robustdeq.reporting.run import read_run
from robustdeq.verdict import Failure

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>\n\x1b[31m" + "A" * 10_000


@dataclass
class Chart:
    title: str = HOSTILE
    alt: str = HOSTILE
    caption: str = HOSTILE
    svg: str = "<svg xmlns='http://www.w3.org/2000/svg'><script>alert(3)</script></svg>"


class Parsed(HTMLParser):
    """Elements with their attributes, and the text outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside not in ("script", "style"):
            self.words.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_it_says_what_the_records_say(tmp_path: Path) -> None:
    about = {"title": "A Paper", "claimed": "77.00 % on digits", "link": "https://example.org/p"}
    run = made_run(tmp_path, [Row("Ours", about=about), Row("Other", broken=(0, 0, 0, 0))])
    page = Parsed(render_page(run))
    assert "RobustDEQ: made" in page.text
    # Of ten samples AutoAttack breaks three, and two more attacks one each.
    assert "70.00" in page.text
    assert "50.00" in page.text
    assert "23.66 to 76.34" in page.text  # Wilson, 5 of 10
    assert "A Paper" in page.text
    assert "77.00 % on digits" in page.text
    assert "not known to us" in page.text  # of the other row
    assert {"href": "https://example.org/p", "rel": "noopener noreferrer"} in page.of("a")


def test_stages_count_what_was_attacked_broken_and_first(tmp_path: Path) -> None:
    run = made_run(tmp_path, [Row("Ours")])
    stages = stage_views(run.evidences[0], run.verdicts[0])
    told = [(s.label, s.gradient, s.attacked, s.broke, s.first) for s in stages]
    assert told == [
        ("autoattack", "honest", 10, 3, 3),
        ("pgd", "honest", 7, 1, 1),
        ("pgd[phantom(5,0.5)]", "phantom(5,0.5)", 6, 1, 1),
        ("square", "honest", 5, 0, 0),
    ]
    assert stages[0].parts == (("apgd-ce", 3),)


def test_what_stages_note_is_counted_over_chunks(tmp_path: Path) -> None:
    note = "out of memory at 10 rows a pass, went on with 5"
    run = made_run(tmp_path, [Row("Ours", notes=(note,))])
    text = Parsed(render_page(run)).text
    for label in LABELS:
        assert f"{label}: {note} (1 chunk)" in text
    assert "left_out" not in text


def test_missing_and_failed_cells_are_no_zeros(tmp_path: Path) -> None:
    rows = [
        Row("Zero", broken=(10, 0, 0, 0)),
        Row("Failed", attacked=2, failures=(Failure("pgd", 0, "it broke down"),)),
        Row("Unrun", attacked=None),
    ]
    page = render_page(made_run(tmp_path, rows))
    assert '<span class="failed"' in page
    assert '<span class="unrun"' in page
    found = dict(re.findall(r'id="row-(\d)-button".*?<strong>(.*?)</strong>', page, re.DOTALL))
    assert "0.00" in found["0"]
    assert "0.00" not in found["1"]
    assert "failed" in found["1"]
    assert "it broke down" in page
    assert "not run" in found["2"]


def test_hostile_text_is_inert(tmp_path: Path) -> None:
    about = dict.fromkeys(
        ("title", "authors", "venue", "link", "claimed", "reproduced"), HOSTILE
    ) | {"link": "javascript:alert(1)"}
    checks = [
        {"name": HOSTILE, "value": 2.0, "threshold": 1.0, "n": 1, "status": "failed",
         "detail": HOSTILE}
    ]  # fmt: skip
    rows = [Row(HOSTILE, HOSTILE, about=about, checks=checks), Row("Plain")]
    run = made_run(tmp_path, rows, name=HOSTILE)
    text = render_page(run, [Chart()])
    page = Parsed(text)
    assert len(page.of("script")) == 2
    assert all(not attributes for attributes in page.of("script"))
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
    assert all((a["href"] or "").startswith(("#", "http")) for a in page.of("a"))
    assert "\x1b" not in text
    assert max(len(word) for word in page.words) < 2000


def test_nothing_is_fetched(tmp_path: Path) -> None:
    page = Parsed(render_page(made_run(tmp_path, [Row("Ours")]), [Chart()]))
    for tag, attributes in page.elements:
        for name in ("src", "srcset", "data", "poster", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith("data:"), (tag, name)
        assert tag not in ("link", "iframe", "object", "embed", "base")
    (found,) = (m["content"] for m in page.of("meta") if m.get("http-equiv"))
    assert found == policy()
    assert "default-src 'none'" in policy()
    assert "url(" not in asset("style.css")


def test_the_same_records_give_the_same_page(tmp_path: Path) -> None:
    run = made_run(tmp_path, [Row("Ours"), Row("Other")])
    assert write_page(run).read_text() == render_page(run)
    assert render_page(run) == render_page(run)


def test_two_hundred_rows_weigh_less_than_five_megabytes(tmp_path: Path) -> None:
    run = made_run(tmp_path, [Row(f"Row{k}_{'x' * 20}", f"family{k}") for k in range(5)])
    text = render_page(repeated(run, 200))
    assert text.count('class="open"') == 200
    assert len(text.encode()) < 5_000_000


def test_figures_beyond_what_a_page_may_hold_are_left_to_their_folder(tmp_path: Path) -> None:
    run = made_run(tmp_path, [Row("Ours")])
    large = Chart("t", "a", "c", f"<svg>{'x' * (CHARTS // 3)}</svg>")
    text = render_page(run, [large] * 4)
    assert text.count("<figure>") == 2
    assert "2 more figures stand in the folder figures/" in text
    assert "more figures" not in render_page(run, [Chart()])


def test_examples_show_what_the_records_hold(tmp_path: Path) -> None:
    run = made_run(tmp_path, [Row("Ours")])
    images = read_images(tmp_path)
    made = examples_of(run, 0, images, 10**6)
    assert made is not None
    assert [(e.index, e.broken_by) for e in made.held] == [
        (0, "autoattack/apgd-ce"), (1, "autoattack/apgd-ce"), (2, "autoattack/apgd-ce"), (3, "pgd"),
    ]  # fmt: skip
    assert "Sample" not in made.alt
    assert "sample 3, class" in made.alt
    payload = base64.b64decode(made.source.partition(",")[2])
    picture = np.asarray(Image.open(io.BytesIO(payload))).astype(float) / 255
    assert picture.shape == (3 * 8 + 2, 4 * 8 + 3, 3)
    clean, adversarial, shown = (picture[k : k + 8, :8, 0] for k in (0, 9, 18))
    expected = 0.5 + made.magnified * (adversarial - clean)
    assert np.abs(np.clip(expected, 0, 1) - shown).max() < 0.03
    assert examples_of(run, 0, images, 10) is None


def test_without_images_there_are_no_examples(tmp_path: Path) -> None:
    run = made_run(tmp_path, [Row("Ours")])
    (tmp_path / "images.parquet").write_bytes(b"damaged")
    with pytest.raises(DamagedError, match=r"images.parquet is damaged .* run' command again"):
        render_page(run)
    (tmp_path / "images.parquet").unlink()
    assert read_images(tmp_path) == {}
    assert examples_of(run, 0, {}, 10**6) is None
    assert "Examples</h3>" not in render_page(run)


def test_the_drawing_of_residuals_is_to_scale() -> None:
    rows = pd.DataFrame(
        [
            {"point": "clean", "solve": 0, "step": 1, "low": 1e-1, "median": 1.0, "high": 1.0,
             "n": 4},
            {"point": "clean", "solve": 0, "step": 2, "low": 1e-4, "median": 1e-2, "high": 1.0,
             "n": 4},
            {"point": "clean", "solve": 1, "step": 1, "low": 1e-4, "median": 1e-4, "high": 1e-4,
             "n": 4},
        ]
    )  # fmt: skip
    made = sparkline(rows, 1e-2)
    assert made is not None
    points = [tuple(map(float, p.split(","))) for p in made.curves[0].line.split()]
    assert [x for x, _ in points] == [made.left, (made.left + 312) / 2, 312]  # solves in line
    top, middle, low = (y for _, y in points)
    assert (top, low) == (made.top, made.bottom)
    assert middle == pytest.approx((top + low) / 2)
    assert made.limit == pytest.approx(middle)
    assert sparkline(rows.iloc[:0], None) is None


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_any_residual_can_be_drawn(value: float) -> None:
    row = {"point": "clean", "solve": 0, "step": 1, "low": value, "median": value, "high": value}
    made = sparkline(pd.DataFrame([{**row, "n": 1}]), None)
    assert made is not None
    assert "nan" not in made.curves[0].line + made.curves[0].band


@given(st.text())
def test_texts_of_others_are_one_printable_line(text: str) -> None:
    assert cut(text, 40).isprintable()
    assert len(cut(text, 40)) <= 40
    assert not set("<>\"'") & set(str(breakable(text)).replace("<wbr>", ""))


@pytest.mark.parametrize(
    "bad",
    ["javascript:alert(1)", "data:text/html,x", "//host", "x", "http://a b", "https://[", ""],
)
def test_only_web_addresses_are_links(bad: str) -> None:
    assert link(bad) == ""
    assert link("https://arxiv.org/abs/1909.01377") == "https://arxiv.org/abs/1909.01377"


def test_no_figure_is_not_zero() -> None:
    assert percent(None) == percent(float("nan")) == "n/a"
    assert percent(0.0) == "0.00"


def test_figures_of_an_earlier_run_in_the_same_folder_go(tmp_path: Path) -> None:
    made_run(tmp_path, [Row("Ours")])
    publish(tmp_path)
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    for name in ("earlier.svg", "earlier.png", "notes.txt"):
        (tmp_path / "figures" / name).write_text("of other rows")
    publish(tmp_path)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == drawn | {"notes.txt"}
    assert "earlier" not in (tmp_path / "SHA256SUMS").read_text()
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "figures").mkdir(parents=True)
    (elsewhere / "figures" / "own.svg").write_text("somebody's own")
    publish_report(read_run(tmp_path), elsewhere / "page.html")
    assert (elsewhere / "figures" / "own.svg").exists()


def test_pages_need_no_torch(tmp_path: Path) -> None:
    made_run(tmp_path, [Row("Ours")])
    script = (
        "import sys, pathlib\n"
        "class NoTorch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'torch':\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, NoTorch())\n"
        "from robustdeq.reporting.publish import publish\n"
        f"publish(pathlib.Path({str(tmp_path)!r}))"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert (tmp_path / "index.html").stat().st_size > 10_000
    assert len(list((tmp_path / "figures").glob("*.svg"))) > 3
