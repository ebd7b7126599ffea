"""What others add to a run: fresh attacks, stronger examples, the rows of a bundle."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from bundles import (
    PLAIN,
    SAMPLES,
    TRUST,
    bundle_again,
    clean_images,
    held_examples,
    plain,
    replace_examples,
    row_of,
    whys,
)
from safetensors.numpy import load_file, save_file
from terminal import command

from robustdeq.errors import CaseError, UsageError
from robustdeq.evaluation.direct import evaluate
from robustdeq.evidence.adopt import submit_bundle
from robustdeq.evidence.bundle import read_bundle
from robustdeq.evidence.reattack import choose, reattack
from robustdeq.evidence.rescoring import Setting, rebuild
from robustdeq.evidence.submissions import added
from robustdeq.evidence.submit import rescore_stale, submit_examples
from robustdeq.evidence.verify import verify_bundle
from robustdeq.keys import canonical
from robustdeq.locks import alone_in
from robustdeq.reporting.run import read_index, read_run, write_index
from robustdeq.suite import AttackEntry

STRONG = AttackEntry(attack="pgd", parameters={"steps": 30, "loss": "margin"})


def test_survivors_fall_to_a_stronger_attack(finished: Path) -> None:
    found = reattack(finished / "bundle", 99, 1, attacks=[STRONG], rows="^Plain")
    row = row_of(finished / "bundle")
    assert found.attacked == {PLAIN: sum(row.robust)}
    assert found.fallen
    assert not found.ok
    assert all(row.robust[f.index] and f.why == "fell to pgd" for f in found.fallen)


def test_survivors_are_chosen_by_the_seed(finished: Path) -> None:
    rows = list(read_bundle(finished / "bundle").rows)
    chosen = choose(rows, 6, 3)
    assert choose(rows, 6, 3) == chosen
    assert choose(rows, 6, 4) != chosen
    assert sum(map(len, chosen.values())) == 6
    by_title = {row.title: row for row in rows}
    assert all(by_title[t].robust[p] for t, places in chosen.items() for p in places)
    assert choose(rows, 1000, 0) == {
        row.title: [p for p, robust in enumerate(row.robust) if robust] for row in rows
    }
    with pytest.raises(UsageError, match="at least 1"):
        reattack(finished / "bundle", 0)


def stronger(folder: Path, path: Path) -> list[int]:
    """A file of examples that break survivors of Plain, found by a longer attack; their indices."""
    whole = read_bundle(folder / "bundle")
    rebuilt = rebuild(whole, whole.find("Plain"), Setting())
    verdict = evaluate(
        rebuilt.subject.model, rebuilt.x, rebuilt.y, threat="Linf:1/8", attacks=[STRONG], seed=7
    )
    fallen = ~verdict.samples["robust"].to_numpy() & np.array(rebuilt.row.robust)
    index = np.flatnonzero(fallen)
    save_file({"x": verdict.adversarials.numpy()[index], "index": index}, path)
    return [int(i) for i in index]


@pytest.fixture
def file(run: Path, tmp_path: Path) -> Path:
    stronger(run, tmp_path / "stronger.safetensors")
    return tmp_path / "stronger.safetensors"


def test_nothing_is_submitted_while_a_run_is_at_work(run: Path, file: Path, bundle: Path) -> None:
    before = contents(run)
    with alone_in(run), pytest.raises(UsageError, match="in use by process"):
        submit_examples(run, "Plain", file, "ada")
    with alone_in(run), pytest.raises(UsageError, match="in use by process"):
        submit_bundle(run, bundle, "ada")
    assert contents(run) == before


def contents(folder: Path) -> dict[Path, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file() and p.name[0] != ".")
    return {p: p.read_bytes() for p in files}


def test_stronger_examples_lower_their_row_alone(run: Path, file: Path) -> None:
    before, index = read_run(run).verdicts, load_file(file)["index"].tolist()
    assert index
    told = submit_examples(run, "Plain", file, "Ada L.")
    assert told.fallen == tuple(index)
    after = read_run(run).verdicts
    assert after[0].robust_acc == pytest.approx(before[0].robust_acc - len(index) / SAMPLES)
    assert (told.before, told.after) == pytest.approx((before[0].robust_acc, after[0].robust_acc))
    assert after[0].broken_by["submitted:Ada L."] == len(index)
    assert after[0].credit == "Ada L."
    assert after[0].status == "ok"
    assert [v.as_row() for v in after[1:]] == [v.as_row() for v in before[1:]]
    table = pd.read_csv(run / "table.csv").set_index("id")
    assert table.loc["Plain", "robust_acc"] == pytest.approx(after[0].robust_acc)
    assert "submitted:Ada L." in table.loc["Plain", "broken_by"]
    report = plain(run / "bundle")
    assert report.ok, whys(report)
    assert report.rows[0].robust_found == after[0].robust_acc


def test_the_same_submission_twice_is_one(run: Path, file: Path) -> None:
    first = submit_examples(run, "Plain", file, "Ada")
    held = contents(run)
    again = submit_examples(run, "Plain", file, "Ada")
    assert again.repeated
    assert (again.fallen, again.after) == (first.fallen, pytest.approx(first.after))
    assert contents(run) == held
    with pytest.raises(CaseError, match=r"\d: its sample had fallen before"):
        submit_examples(run, "Plain", file, "Bob")
    assert contents(run) == held


def test_examples_that_break_nothing_are_refused_with_the_numbers(run: Path, file: Path) -> None:
    x, index = load_file(file)["x"], load_file(file)["index"]
    survivors = np.flatnonzero(row_of(run / "bundle").robust)
    mixed = clean_images()[survivors]
    mixed[0] += np.float32(0.5)
    save_file({"x": mixed, "index": survivors}, file)
    held = contents(run)
    with pytest.raises(
        CaseError, match=r"none of the 3 examples .* \(2: .* 1: .*nothing was changed"
    ):
        submit_examples(run, "Plain", file, "Ada")
    for parts, word in (
        ({"x": x, "index": index + 1000}, "an example for sample 10"),
        ({"x": x[:0], "index": index[:0]}, "no examples"),
        ({"x": x[:, :, :4], "index": index}, "holds no 'x'"),
        ({"x": x.repeat(2, 0), "index": index.repeat(2)}, "give each one"),
    ):
        save_file({k: np.ascontiguousarray(v) for k, v in parts.items()}, file)
        with pytest.raises(CaseError, match=word):
            submit_examples(run, "Plain", file, "Ada")
    file.write_bytes(b"no safetensors")
    with pytest.raises(CaseError, match="is not safetensors"):
        submit_examples(run, "Plain", file, "Ada")
    for row, by, word in (
        ("Plane", "Ada", "is no row"),
        ("Plain", "a/b", "give a name"),
        ("Plain", "", "give a name"),
    ):
        with pytest.raises(UsageError, match=word):
            submit_examples(run, row, file, by)
    assert contents(run) == held


def test_a_second_run_does_not_lose_what_was_submitted(run: Path, file: Path) -> None:
    fresh = read_index(run)
    submit_examples(run, "Plain", file, "Ada")
    with_it = read_index(run)
    restored = added(run, fresh)
    assert canonical(restored) == with_it
    assert added(run, restored) == restored


def test_examples_outlive_an_edit_of_the_defense(run: Path, file: Path) -> None:
    """The row becomes another case; what was submitted is scored again, not dropped."""
    fresh = read_index(run)
    index = submit_examples(run, "Plain", file, "Ada").fallen
    fresh["rows"][0]["case"]["source"] = "edited"
    write_index(run, added(run, fresh))
    bundle_again(run)
    higher = read_run(run).verdicts[0].robust_acc
    told = rescore_stale(run)
    assert told == [f"{PLAIN}: {len(index)} of {len(index)} examples by Ada still break it"]
    assert read_run(run).verdicts[0].robust_acc == pytest.approx(higher - len(index) / SAMPLES)
    assert rescore_stale(run) == []


@pytest.fixture
def other(run: Path, tmp_path: Path) -> Path:
    """A run that holds the row Equilibrium alone."""
    shutil.copytree(run, tmp_path / "other")
    data = read_index(tmp_path / "other")
    data["rows"] = data["rows"][1:2]
    write_index(tmp_path / "other", data)
    bundle_again(tmp_path / "other")
    return tmp_path / "other"


def test_a_bundles_rows_join_another_table_as_scored_here(other: Path, bundle: Path) -> None:
    equal = ("robust_acc", "clean_acc", "n", "weights_sha256", "track", "status")
    theirs = {v.id: v for v in read_run(bundle.parent).verdicts}
    wanted = "^(Plain|Noisy)"
    assert submit_bundle(other, bundle, "Ada", rows=wanted, setting=TRUST) == [
        PLAIN,
        row_of(bundle, "Noisy/../row").title,
    ]
    mine = {v.id: v for v in read_run(other).verdicts}
    assert set(mine) == set(theirs)
    for name in ("Plain", "Noisy/../row"):
        assert [getattr(mine[name], a) for a in equal] == [getattr(theirs[name], a) for a in equal]
        assert any(flag.startswith("unattacked=1") for flag in mine[name].flags)
        assert set(mine[name].broken_by) == {"submitted:Ada"}
    assert mine["Equilibrium"].flags == theirs["Equilibrium"].flags
    assert verify_bundle(other / "bundle", rows=wanted, setting=TRUST).ok
    held = contents(other)
    assert submit_bundle(other, bundle, "Ada", rows=wanted, setting=TRUST) == []
    assert contents(other) == held
    bundle_again(other)
    assert contents(other) == held


def test_examples_for_a_row_that_was_added_are_kept_with_it(
    other: Path, bundle: Path, file: Path
) -> None:
    fresh = read_index(other)
    submit_bundle(other, bundle, "Ada", rows="^Plain")
    told = submit_examples(other, "Plain", file, "Bob")
    assert told.fallen
    assert canonical(added(other, fresh)) == read_index(other)
    broken_by = read_run(other).verdicts[1].broken_by
    assert broken_by["submitted:Bob"] == len(told.fallen)
    assert broken_by["submitted:Ada"] == len(row_of(bundle).broken)


def test_a_bundle_that_does_not_hold_or_conflicts_adds_nothing(other: Path, bundle: Path) -> None:
    held = contents(other)
    with pytest.raises(UsageError) as caught:
        submit_bundle(other, bundle, "Ada", rows="Equilibrium")
    here, there = row_of(other / "bundle", "Equilibrium"), row_of(bundle, "Equilibrium")
    assert str(caught.value).count(here.case["weights_sha256"][:12]) == 2
    assert here.case == there.case
    _, index = held_examples(bundle)
    replace_examples(bundle, clean_images()[index])
    with pytest.raises(
        CaseError, match=r"does not hold, in \d+ claims, the first: Plain .*passed off"
    ):
        submit_bundle(other, bundle, "Ada", rows="^Plain")
    assert contents(other) == held


def test_errors_name_what_is_missing(tmp_path: Path, run: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no manifest.json; name the folder 'bundle'"):
        read_bundle(tmp_path)
    with pytest.raises(UsageError, match=r"holds no run.json"):
        submit_examples(tmp_path, "Plain", tmp_path / "x", "Ada")
    with pytest.raises(UsageError, match="does not exist; name a safetensors file"):
        submit_examples(run, "Plain", tmp_path / "x", "Ada")


def test_verify_as_a_command(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["verify", str(bundle), "--rows", "^Plain", "--batch-size", "3"]
    code, out, _ = command(arguments, monkeypatch, capsys)
    assert code == 0
    assert f"holds: {PLAIN}: clean 100.00%, robust 37.50% (claimed 100.00%, 37.50%)" in out
    assert "No lower bound" in out
    code, _, err = command(["verify", str(bundle)], monkeypatch, capsys)
    assert code == 2
    assert "--trust-plugins" in err
    replace_examples(bundle, clean_images()[held_examples(bundle)[1]])
    code, out, err = command(arguments, monkeypatch, capsys)
    assert code == 1
    assert f"fails: {PLAIN}" in out
    assert "sample 0: the clean image is passed off as an adversarial one" in err


def test_submit_as_a_command(
    run: Path, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["submit", str(file), "--run", str(run), "--by", "Ada"]
    code, _, err = command(arguments, monkeypatch, capsys)
    assert code == 2
    assert "--row" in err
    code, out, _ = command([*arguments, "--row", "Plain"], monkeypatch, capsys)
    assert code == 0
    assert "robust 37.50% -> 25.00%, credited to Ada" in out
    code, out, _ = command([*arguments, "--row", "Plain"], monkeypatch, capsys)
    assert code == 0
    assert "submitted before; nothing was changed" in out
