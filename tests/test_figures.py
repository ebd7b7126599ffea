from __future__ import annotations

import io
import itertools
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from PIL import Image

from robustdeq.records import (
    Record,
    RecordMeta,
    Status,
    curve_frame,
    sample_frame,
    trace_frame,
)
from robustdeq.reporting.figures import Figure, figures, trace_figure, write_figures
from robustdeq.reporting.figures.ablation import bars
from robustdeq.reporting.figures.accuracy_curves import curve, worst_cases
from robustdeq.reporting.figures.attack_success import (
    GRADIENTS,
    NO_GRADIENT,
    SUBMITTED,
    attack_success,
    success,
)
from robustdeq.reporting.figures.clean_and_robust import clean_and_robust, intervals
from robustdeq.reporting.figures.cost import cost, costs
from robustdeq.reporting.figures.decades import decades, floor_of, power
from robustdeq.reporting.figures.residuals import residual_distributions, residuals
from robustdeq.reporting.figures.robust_by_attack import (
    STAGES,
    accuracy_left,
    robust_by_attack,
)
from robustdeq.reporting.figures.section import Section, ladders, radius, sections
from robustdeq.reporting.figures.style import COLORS, mark
from robustdeq.reporting.figures.words import plain, short, slug, told
from robustdeq.reporting.run import RunReport
from robustdeq.statistics import wilson
from robustdeq.verdict import Evidence, Failure, judge_evidence

CLEAN = (True, True, True, True, False)
HOSTILE = "$\\frac{1}{0}$ <script>alert(1)</script> & % _x ]]> \x00\x1b\u202e \n 數 \U0001f600"
"""Markup, mathtext, control characters, a direction override, characters without a glyph."""


def case(name: str = "Row", **more: object) -> dict[str, Any]:
    held = {"id": name, "defense": "deq", "dataset": "digits", "threat": "Linf:0.1", "classes": 10}
    return held | {"n": len(CLEAN), "parameters": {"tolerance": 1e-6}} | more


def record(of: dict[str, Any], kind: str, rows: pd.DataFrame, **more: Any) -> Record:
    meta = {"label": kind, "stage": {}, "track": "deterministic", "chunk": 0} | more
    return Record(RecordMeta(key=kind, kind=kind, case=of, case_key="c", **meta), rows)  # type: ignore[arg-type]


def clean(of: dict[str, Any], right: Sequence[bool] = CLEAN, **columns: Any) -> Record:
    held = {"index": range(len(right)), "label": [0] * len(right), "clean_correct": right}
    rows = sample_frame(held | {"status": [Status.CLEAN] * len(right)} | columns, len(right))
    return record(of, "clean", rows, forward_nfe=100, backward_nfe=50, seconds=5.0)


def attack(
    of: dict[str, Any], label: str, right: Sequence[bool | None], *, stage: Any = None, **more: Any
) -> Record:
    """What an attack found; None: an earlier one had broken the sample."""
    words = [Status.OK if r is not None else Status.BROKEN_BEFORE for r in right]
    words = [w if c else Status.MISCLASSIFIED for w, c in zip(words, CLEAN, strict=False)]
    columns = {
        "index": range(len(right)), "label": [0] * len(right), "clean_correct": CLEAN[: len(right)],
        "status": words, "adversarial_correct": right,
    } | more  # fmt: skip
    rows = sample_frame(columns, len(right))
    spec = {"attack": label, "gradient": "honest", "needs": "gradients"} | (stage or {})
    return record(of, "attack", rows, label=label, stage=spec)


def traced(of: dict[str, Any]) -> Record:
    lines = [
        {"point": point, "solve": solve, "step": step, "low": 10.0**-step / 2,
         "median": 10.0**-step if step < 5 else 0.0, "high": 10.0**-step * 2, "n": 3}
        for point in ("clean", "adversarial") for solve in (0, 1) for step in range(1, 6)
    ]  # fmt: skip
    return record(of, "traces", trace_frame(lines))


def curved(of: dict[str, Any], counts: Sequence[int] = (4, 2, 0)) -> Record:
    points = zip((0.0, 0.05, 0.1), counts, strict=True)
    lines = [{"curve": "epsilon", "at": at, "correct": c, "n": 5} for at, c in points]
    lines += [{"curve": "steps", "at": at, "correct": 1, "n": 5} for at in (1.0, 10.0)]
    lines += [{"curve": "unbounded", "at": 1.0, "correct": 0, "n": 5}]
    return record(of, "curves", curve_frame(lines))


def evidence(of: dict[str, Any], *records: Record, **more: Any) -> Evidence:
    expected = {0: tuple(r.meta.label for r in records if r.meta.kind == "attack")}
    held = {"case": of, "chunks": 1, "expected": expected, "records": records} | more
    return Evidence(**held)


def full(name: str = "Row", **more: Any) -> Evidence:
    """A row with every kind of record: two of five samples stand."""
    of = case(name, **more)
    found = [True, False, True, True, None]
    return evidence(
        of,
        clean(of, clean_residual=[1e-7, 2e-7, 3e-7, 0.0, 5e-7]),
        attack(of, "autoattack", found, adversarial_residual=[1e-7, 1e-3, 1e-7, 1e-7, None]),
        attack(of, "pgd[unrolled(5)]", [False, None, True, True, None],
               stage={"gradient": "unrolled(5)"}, adversarial_residual=[1e-2, *[None] * 4]),
        attack(of, "square", [None, None, True, True, None], stage={"needs": "logits"}),
        traced(of),
        curved(of),
    )  # fmt: skip


def explicit(name: str = "Plain", **more: Any) -> Evidence:
    """A row without solves: one attack through its own gradient, which breaks all."""
    of = case(name, defense="feedforward", **more)
    return evidence(of, clean(of), attack(of, "autoattack", [False] * 4 + [None]))


def lost(name: str = "Lost") -> Evidence:
    """A row one of whose attacks failed."""
    of = case(name)
    failed = (Failure("pgd[unrolled(5)]", 0, "out of memory"),)
    return evidence(of, clean(of), attack(of, "autoattack", [True] * 4 + [None]), failures=failed)


def report(*evidences: Evidence, name: str = "small", folder: Path = Path()) -> RunReport:
    verdicts = tuple(judge_evidence(held) for held in evidences)
    return RunReport(folder, {"suite": {"name": name}, "rows": []}, evidences, verdicts)


def only(*evidences: Evidence) -> Section:
    (section,) = sections(report(*evidences))
    return section


def stems(found: Sequence[Figure]) -> list[str]:
    return [figure.name for figure in found]


def texts(figure: Figure) -> list[str]:
    """What is written in the drawing, without title and description."""
    root = ElementTree.fromstring(figure.svg)
    return ["".join(e.itertext()) for e in root.iter("{http://www.w3.org/2000/svg}text")]


def test_a_run_has_one_figure_of_each_kind() -> None:
    found = figures(report(full(), explicit(), lost()))
    where = "digits-linf-0-1"
    assert stems(found) == [
        f"clean-and-robust-{where}",
        f"robust-by-attack-{where}",
        f"attack-success-{where}",
        f"ablation-{where}",
        f"cost-{where}",
        f"accuracy-by-steps-{where}",
        f"residuals-{where}",
        f"residual-traces-{where}",
        "accuracy-by-epsilon-digits-linf",
    ]
    for figure in found:
        assert "n = 5" in figure.caption
        assert "`robustdeq run small`" in figure.caption
        assert "digits, Linf" in figure.caption
        assert len(figure.alt) > 40
        assert re.search(r"\d", figure.alt)


def test_accuracy_left_falls_along_the_chain_to_the_worst_case() -> None:
    table = accuracy_left(only(full(), explicit(), lost()))
    assert [stage for _, stage in table.columns] == [
        "clean", "autoattack", "pgd[unrolled(5)]", "square", "worst case",
    ]  # fmt: skip
    np.testing.assert_allclose(table.iloc[0], [0.8, 0.6, 0.4, 0.4, 0.4])
    np.testing.assert_allclose(table.iloc[1], [0.8, 0.0, np.nan, np.nan, 0.0])
    np.testing.assert_allclose(table.iloc[2], [0.8, 0.8, np.nan, np.nan, np.nan])
    (figure,) = robust_by_attack(only(full(), explicit(), lost()))
    held = texts(figure)
    assert held.count("n/a") == 5
    assert held.count("0.0") == 2
    assert held.count("80.0") == 4
    assert "40.0 %" in figure.alt


def test_an_attack_may_be_called_clean() -> None:
    of = case()
    table = accuracy_left(only(evidence(of, clean(of), attack(of, "clean", [False] * 4 + [None]))))
    assert table.to_numpy().tolist() == [[0.8, 0.0, 0.0]]


def test_attacks_that_broke_least_are_left_out_where_there_are_too_many() -> None:
    of = case()
    many = [attack(of, f"a{k}", [True] * 4 + [None]) for k in range(30)]
    strong = attack(of, "strong", [True, True, True, False, None])
    (figure,) = robust_by_attack(only(evidence(of, clean(of), *many, strong)))
    assert f"{31 - STAGES} attacks that broke the least left out" in figure.caption
    assert "strong" in texts(figure)
    assert texts(figure).count("60.0") == 2


def test_success_is_a_share_of_those_attacked_and_absent_where_nothing_ran() -> None:
    table = success(only(full(), explicit()))
    held = {(r, e): (a, b) for r, e, a, b in table.itertuples(index=False)}
    assert held == {
        (0, "honest"): (4, 1),
        (0, "unrolled(5)"): (3, 1),
        (0, NO_GRADIENT): (2, 0),
        (1, "honest"): (4, 4),
    }
    (figure,) = attack_success(only(full(), explicit()))
    held_texts = " ".join(texts(figure))
    for cell in ("25 %", "33 %", "0 %", "100 %", "1/4", "1/3", "0/2", "4/4"):
        assert cell in held_texts
    assert texts(figure).count("n/a") == 2
    assert "100.0 % of 4" in figure.alt


def test_a_cell_where_nothing_was_left_to_attack_is_hatched_and_not_zero() -> None:
    of = case()
    second = attack(of, "pgd[implicit]", [None] * 5, stage={"gradient": "implicit"})
    held = evidence(of, clean(of), attack(of, "a", [False] * 4 + [None]), second)
    (figure,) = attack_success(only(held))
    assert "0/0" in texts(figure)
    assert "0 %" not in texts(figure)


def test_stages_of_one_estimator_are_counted_once_a_sample() -> None:
    of = case()
    first = attack(of, "a", [False, True, True, True, None])
    second = attack(of, "b", [None, False, True, True, None])
    third = attack(of, "s", [False, None, None, None, None], stage={"by": "Ada"})
    table = success(only(evidence(of, clean(of), first, second, third))).set_index("estimator")
    assert table.loc["honest", ["attacked", "broken"]].tolist() == [4, 2]
    assert table.loc[SUBMITTED, ["attacked", "broken"]].tolist() == [1, 1]


def test_gradients_that_few_rows_have_are_left_out_where_there_are_too_many() -> None:
    of = case()
    many = [
        attack(of, f"a{k}", [True] * 4 + [None], stage={"gradient": f"g{k}"})
        for k in range(GRADIENTS + 3)
    ]
    (figure,) = attack_success(only(evidence(of, clean(of), *many)))
    assert "3 gradients that fewer rows have left out" in figure.caption


def test_intervals_are_wilsons() -> None:
    table = intervals(only(full(), lost())).set_index(["row", "measure"])
    for key, share in {
        (0, "clean"): 0.8,
        (0, "robust (worst case)"): 0.4,
        (1, "clean"): 0.8,
    }.items():
        found = table.loc[key]
        assert found["share"] == share
        assert (found["low"], found["high"]) == wilson(round(5 * share), 5)
    assert (1, "robust (worst case)") not in table.index
    assert (0, "AutoAttack") not in table.index  # its stage is not AutoAttack standard
    (figure,) = clean_and_robust(only(full(), lost()))
    assert "robust: n/a (failed)" in texts(figure)
    assert "shaded" in figure.caption


def test_costs_are_per_sample_and_a_missing_cost_is_no_zero() -> None:
    table = costs(only(full(), explicit(), lost()))
    assert table["row"].tolist() == [0, 1]
    assert table["nfe"].tolist() == [30.0, 30.0]
    assert table["seconds"].tolist() == [1.0, 1.0]
    (figure,) = cost(only(full(), explicit(), lost()))
    assert "1 row without robust accuracy left out" in figure.caption
    free = explicit()
    for held in free.records:
        object.__setattr__(held.meta, "seconds", 0.0)
    assert costs(only(free))["seconds"].isna().all()
    assert len(cost(only(free))) == 1


def test_the_legend_names_defenses_where_rows_are_many() -> None:
    rows = [full(f"R{k}") for k in range(15)] + [explicit(f"P{k}") for k in range(15)]
    (figure,) = cost(only(*rows))
    assert {"deq", "feedforward"} <= set(texts(figure))
    assert "R1" not in texts(figure)


def test_curves_are_summed_over_chunks_and_have_wilsons_interval() -> None:
    table = curve(only(full()), "epsilon")
    assert table["at"].tolist() == [0.0, 0.05, 0.1]
    assert table["share"].tolist() == [0.8, 0.4, 0.0]
    assert tuple(table.loc[1, ["low", "high"]]) == wilson(2, 5)
    assert curve(only(full()), "steps")["share"].tolist() == [0.2, 0.2]
    assert curve(only(explicit()), "epsilon").empty


def test_one_norm_at_several_radii_is_one_panel_with_a_worst_case_at_each() -> None:
    rows = [explicit("A"), explicit("A", threat="Linf:3/16"), explicit("B"),
            explicit("A", threat="L2:0.5")]  # fmt: skip
    of = case("A", threat="Linf:8/255")
    rows.append(evidence(of, clean(of), attack(of, "a", [True] * 4 + [None])))
    run = report(*rows)
    linf = next(ladder for ladder in ladders(run) if ladder.threat == "Linf")
    worst = worst_cases(linf)
    held = {(linf.rows[r.row].verdict.id, round(r.at, 4)): r.share for r in worst.itertuples()}
    assert held == {("A", 0.1): 0.0, ("A", 0.1875): 0.0, ("B", 0.1): 0.0, ("A", 0.0314): 0.8}
    (figure,) = [f for f in figures(run) if f.name.startswith("accuracy-by-epsilon")]
    assert figure.name.endswith("-linf")
    assert "A" in texts(figure)
    assert "B" not in texts(figure)  # one radius and no curve: nothing to see against epsilon


@pytest.mark.parametrize(
    ("threat", "value"),
    [("Linf:8/255", 8 / 255), ("L2:0.5", 0.5), ("Linf:3/16", 0.1875), ("L2:1/0", math.nan),
     ("Linf", math.nan), ("x:y", math.nan), ("Linf:1e999", math.inf)],
)  # fmt: skip
def test_a_radius_is_read_from_a_threat(threat: str, value: float) -> None:
    assert radius(threat) == pytest.approx(value, nan_ok=True)


def test_residuals_are_quantiles_at_clean_points_and_at_the_first_example() -> None:
    table = residuals(only(full(), explicit())).set_index("point")
    assert table.index.tolist() == ["clean", "adversarial"]
    assert table.loc["clean", ["least", "median", "most", "n"]].tolist() == [0.0, 2e-7, 5e-7, 5]
    found = table.loc["adversarial", ["least", "most", "n"]].tolist()
    assert found == pytest.approx([1e-3, 1e-2, 2])
    (figure,) = residual_distributions(only(full(), explicit()))
    assert "0" in texts(figure)  # a tick for what converged exactly
    assert "Plain" not in texts(figure)
    assert "exactly 0" in figure.caption


def test_residuals_that_are_not_finite_are_counted() -> None:
    of = case()
    held = evidence(of, clean(of, clean_residual=[1e-7, np.inf, 1e-7, 1e-7, 1e-7]))
    assert residuals(only(held)).loc[0, ["most", "n", "lost"]].tolist() == [1e-7, 4, 1]
    (figure,) = residual_distributions(only(held))
    assert "1 residual not finite" in figure.caption


def seeded(name: str, standing: int, seed: int | None, **more: Any) -> Evidence:
    of = case(name, family="F", training_seed=seed, **more)
    right = [k < standing for k in range(4)] + [None]
    return evidence(of, clean(of), attack(of, "autoattack", right))


def test_seeds_of_a_family_are_one_bar_with_their_mean_and_spread() -> None:
    rows = [seeded(f"F{k}", standing, k) for k, standing in enumerate((1, 2, 3))]
    found = bars(only(*rows, lost(), explicit(), seeded("Alone", 4, None)))
    assert [bar.label for bar in found] == ["Alone", "F0 (3 seeds)", "Lost", "Plain"]
    alone, family, failed, _ = found
    assert family.share == pytest.approx(0.4)
    assert (family.low, family.high) == pytest.approx((0.2, 0.6))  # 0.2, 0.4, 0.6: deviation 0.2
    assert family.seeds == (0.2, 0.4, 0.6)
    assert (alone.low, alone.high) == wilson(4, 5)
    assert failed.share is None
    assert [bar.defense for bar in found] == ["deq"] * 3 + ["feedforward"]


def test_a_seed_without_a_figure_is_a_bar_of_its_own() -> None:
    of = case("F1", family="F", training_seed=1)
    failed = evidence(of, clean(of), failures=(Failure("pgd", 0, "no"),))
    found = bars(only(seeded("F0", 2, 0), failed))
    assert [(bar.label, bar.share) for bar in found] == [("F0", 0.4), ("F1", None)]


def test_one_row_alone_is_no_ablation_and_a_run_without_records_has_no_figure() -> None:
    assert not [name for name in stems(figures(report(explicit()))) if "ablation" in name]
    nothing = evidence(case(), expected={}, failures=(Failure("", -1, "no weights"),))
    assert figures(report(nothing)) == []
    assert figures(report()) == []


def test_sections_are_told_apart_by_data_set_threat_and_track() -> None:
    randomized = explicit("R")
    for held in randomized.records:
        object.__setattr__(held.meta, "track", "randomized")
    rows = [explicit(), explicit(threat="L2:0.5"), explicit(dataset="a_b"), explicit(dataset="a-b")]
    found = stems(figures(report(*rows, randomized)))
    assert len(set(found)) == len(found)
    kinds = [name for name in found if name.startswith("clean-and-robust-")]
    assert sorted(kinds) == [
        "clean-and-robust-a-b-linf-0-1",
        "clean-and-robust-a-b-linf-0-1-2",
        "clean-and-robust-digits-l2-0-5",
        "clean-and-robust-digits-linf-0-1",
        "clean-and-robust-digits-linf-0-1-randomized",
    ]


def test_rows_in_doubt_are_marked() -> None:
    of = case("Masked")
    bad = attack(of, "a", [True] * 4 + [None])
    words = ["outside_ball", *bad.rows["status"].tolist()[1:]]
    held = evidence(of, clean(of), Record(bad.meta, bad.rows.assign(status=words)))
    (figure,) = clean_and_robust(only(held, full()))
    assert "Masked †" in texts(figure)
    assert "Row" in texts(figure)
    assert "†: in doubt" in figure.caption


@pytest.fixture(scope="module")
def hostile() -> list[Figure]:
    long = "L" * 5_000 + HOSTILE + "M" * 5_000
    rows = [full(HOSTILE, defense=HOSTILE), full("_x"), full(long, defense=long)]
    return figures(report(*rows, name=long))


def test_hostile_names_are_inert(hostile: list[Figure]) -> None:
    assert len(hostile) == 9
    for figure in hostile:
        root = ElementTree.fromstring(figure.svg)
        assert not [e for e in root.iter() if e.tag.endswith(("script", "metadata", "style"))]
        assert "<script" not in figure.svg
        assert re.fullmatch(r"[a-z0-9-]{1,100}", figure.name)
        assert max(map(len, texts(figure))) < 130
        for text in (figure.title, figure.alt, figure.caption):
            assert "\n" not in text
            assert text.isprintable()
            assert len(text) < 1500
    drawn = " ".join(text for figure in hostile for text in texts(figure))
    assert "$\\frac" in drawn  # as it stands, and not as a fraction


def test_figures_refer_to_nothing_outside_and_to_no_other_figure(hostile: list[Figure]) -> None:
    seen: set[str] = set()
    for figure in hostile:
        assert figure.svg.startswith("<svg")
        root = ElementTree.fromstring(figure.svg)
        ids = {value for e in root.iter() if (value := e.get("id"))}
        links = {v for e in root.iter() for k, v in e.attrib.items() if k.endswith("href")}
        used = {link.removeprefix("#") for link in links if link.startswith("#")}
        assert len(used) == len(links)
        used |= set(re.findall(r"url\(#([^)]+)\)", figure.svg))
        assert used == ids
        assert not ids & seen
        seen |= ids
        bare = re.sub(r'xmlns(:\w+)?="[^"]*"', "", figure.svg)
        assert "http" not in bare
        children = [child.tag.rpartition("}")[2] for child in root]
        assert children[:2] == ["title", "desc"]
        assert root[1].text == figure.alt


def test_pictures_are_of_150_dots_per_inch_and_not_blank(hostile: list[Figure]) -> None:
    for figure in hostile:
        with Image.open(io.BytesIO(figure.png)) as image:
            assert image.format == "PNG"
            assert image.info["dpi"] == pytest.approx((150, 150), abs=0.1)
            assert np.asarray(image.convert("L")).std() > 5
            assert max(image.size) < 3000


def test_the_same_records_give_the_same_bytes_whatever_the_callers_style(tmp_path: Path) -> None:
    run = report(full(), explicit(), lost())
    first = write_figures(figures(run), tmp_path / "a")
    before = dict(mpl.rcParams)
    with mpl.rc_context({"font.size": 30, "svg.fonttype": "path", "lines.linewidth": 9}):
        second = write_figures(figures(report(full(), explicit(), lost())), tmp_path / "b")
    assert dict(mpl.rcParams) == before
    assert [p.name for p in first] == [p.name for p in second]
    assert sorted(p.name for p in (tmp_path / "a" / "figures").iterdir()) == sorted(
        p.name for p in first
    )
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes()
    moved = write_figures(figures(report(explicit(), lost(), full())), tmp_path / "c")
    assert [p.read_bytes() for p in moved] == [p.read_bytes() for p in first]


def test_drawing_leaves_no_state_and_needs_no_display(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib import pyplot as plt

    monkeypatch.delenv("DISPLAY", raising=False)
    held, colors = plt.get_fignums(), dict(mpl.colors.get_named_colors_mapping())
    backend = mpl.rcParams._get("backend")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert figures(report(explicit()))
    assert plt.get_fignums() == held
    assert dict(mpl.colors.get_named_colors_mapping()) == colors
    assert mpl.rcParams._get("backend") == backend


def test_200_rows_are_split_into_figures_of_one_height() -> None:
    section = only(*[explicit(f"Row{k:03}") for k in range(200)])
    found = clean_and_robust(section)
    assert stems(found) == [f"clean-and-robust-digits-linf-0-1-part-{k}" for k in range(1, 6)]
    drawn = [text for figure in found for text in texts(figure) if text.startswith("Row")]
    assert sorted(drawn) == [f"Row{k:03}" for k in range(200)]
    for figure in found:
        with Image.open(io.BytesIO(figure.png)) as image:
            assert image.height < 13 * 150
    pages = section.pages(30)
    assert [row for page in pages for row in page.rows] == list(section.rows)
    assert {len(page.rows) for page in pages} == {28, 29}


def test_one_rows_trace_is_small_and_empty_ones_are_none() -> None:
    rows = traced(case()).rows
    figure = trace_figure(rows, HOSTILE)
    assert figure is not None
    assert {"clean", "adversarial", "clean, solve 2", "adversarial, solve 2"} <= set(texts(figure))
    assert "n = 3" in figure.caption
    assert "after 5 to 5 steps" in figure.alt
    with Image.open(io.BytesIO(figure.png)) as image:
        assert max(image.size) < 5 * 150
    assert trace_figure(rows.iloc[:0], "t") is None
    assert trace_figure(pd.DataFrame(), "t") is None
    assert trace_figure(rows.assign(median=np.nan), "t") is None


def linear(color: str) -> NDArray[np.float64]:
    channels = np.array(mpl.colors.to_rgb(color))
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def lab(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """CIE L*a*b* under D65 of linear sRGB."""
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175],
              [0.0193339, 0.119192, 0.9503041]]  # fmt: skip
    xyz = np.array(to_xyz) @ rgb / np.array([0.95047, 1, 1.08883])
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


# Machado, Oliveira and Fernandes 2009, "A Physiologically-based Model for Simulation of Color
# Vision Deficiency", severity 1.
BLINDNESS = {
    "none": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                   [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                     [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                   [0.004733, 0.691367, 0.3039]],
}  # fmt: skip


@pytest.mark.parametrize("kind", BLINDNESS)
def test_colors_are_told_apart_by_the_color_blind(kind: str) -> None:
    seen = [lab(np.clip(np.array(BLINDNESS[kind]) @ linear(c), 0, 1)) for c in COLORS]
    distances = [float(np.linalg.norm(a - b)) for a, b in itertools.combinations(seen, 2)]
    assert min(distances) > 20  # a difference of 2.3 is just noticeable
    white = lab(np.ones(3))
    assert min(float(np.linalg.norm(white - color)) for color in seen) > 25


def test_the_first_forty_series_look_different() -> None:
    assert len({(mark(k)["color"], mark(k)["marker"]) for k in range(40)}) == 40


def test_words_are_cut_in_the_middle_and_cleaned() -> None:
    assert plain("x" * 10_000, 20) == "x" * 13 + "…" + "x" * 6
    assert plain("a\n\tb\x00c") == "a b?c"
    assert plain("數$\udc80") == "?$?"
    assert told("數\x00") == "數?"
    assert slug("Robust", "Linf:8/255") == "robust-linf-8-255"
    assert slug("a" * 200) != slug("a" * 201)
    assert len(slug("a" * 200)) <= 80
    assert slug("數") == "figure"
    assert [short(v) for v in (0.5, 30, 2000, 1.5e6)] == ["0.5", "30", "2k", "1.5M"]


def test_logarithmic_axes_have_a_place_for_zero() -> None:
    assert floor_of([0.0, 2e-7, np.nan]) == pytest.approx(1e-8)
    assert floor_of([]) == pytest.approx(0.1)
    assert power(-12) == "10⁻¹²"
    axes = mpl.figure.Figure().subplots()
    axes.set_xscale("log")
    decades(axes.xaxis, [0.0, 2e-7, 1e-3])
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["10⁻³", "10⁻⁴", "10⁻⁵", "10⁻⁶", "10⁻⁷", "0"]
    decades(axes.xaxis, [2e-7, 1e-3])
    assert "0" not in [label.get_text() for label in axes.get_xticklabels()]
