"""Claims of a bundle that are scored again: those that hold, and all ways in which they do not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import (
    PLAIN,
    SAMPLES,
    TRUST,
    clean_images,
    held_examples,
    plain,
    replace_examples,
    rewrite,
    row_of,
    whys,
)
from numpy.typing import NDArray
from safetensors.numpy import save_file

from robustdeq.datasets import Slice, load_slice
from robustdeq.errors import UsageError
from robustdeq.evidence.bundle import read_bundle
from robustdeq.evidence.rescoring import Setting, odd_batch, rebuild
from robustdeq.evidence.verify import verify_bundle
from robustdeq.keys import file_sha256
from robustdeq.records import Store
from robustdeq.reporting.run import read_run


def test_an_honest_bundle_holds_on_another_batch_size(finished: Path) -> None:
    report = verify_bundle(finished / "bundle", setting=TRUST)
    assert report.ok, whys(report)
    verdicts = read_run(finished).verdicts
    for verdict, row in zip(verdicts, report.rows, strict=True):
        assert (row.clean_found, row.robust_found) == (verdict.clean_acc, verdict.robust_acc)
        assert row.batch_size == 3  # no divisor of the chunk of 4
        assert not row.borderline
        assert not row.notes
    assert plain(finished / "bundle", batch_size=1).ok


def test_the_default_batch_never_divides_the_chunk() -> None:
    assert odd_batch(100) == 37
    assert all(chunk % odd_batch(chunk) for chunk in range(1, 300))


def test_clean_images_passed_off_are_named(bundle: Path) -> None:
    _, index = held_examples(bundle)
    replace_examples(bundle, clean_images()[index])
    report = plain(bundle)
    assert not report.ok
    assert report.rows[0].robust_found == 1.0
    named = [f.index for f in report.failures if "passed off" in f.why]
    assert named == index.tolist()


def test_a_sample_that_is_wrong_without_an_attack_counts_as_no_break(bundle: Path) -> None:
    """The row's second model: some clean images are misclassified, and are claimed broken."""
    name = "Noisy/../row"
    row = row_of(bundle, name)
    wrong = row.clean_correct.index(False)

    def claim(data: dict[str, Any]) -> None:
        data["clean_correct"][wrong], data["broken_by"][wrong] = True, "pgd"
        data["clean_acc"] += 1 / SAMPLES

    x, index = held_examples(bundle, name)
    index = np.sort(np.append(index, row.indices[wrong]))
    mixed = clean_images()[index]
    mixed[index != row.indices[wrong]] = x
    path = bundle / "examples" / row.examples.name
    save_file({"x": mixed, "index": index}, path)
    rewrite(bundle, claim, name)
    rewrite(bundle, lambda data: data["examples"].update(sha256=file_sha256(path)), name)
    report = verify_bundle(bundle, rows="Noisy", setting=TRUST)
    assert f"sample {row.indices[wrong]}: the clean image is misclassified already" in whys(report)
    assert "clean accuracy is" in whys(report)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda x: x + np.float32(0.02) * np.sign(x - clean_images()[: len(x)]), "outside of"),
        (lambda x: x - np.float32(2), "outside of [0, 1]"),
        (lambda x: x * np.float32(np.nan), "not finite"),
    ],
)
def test_inadmissible_examples_are_named(
    change: Callable[[NDArray[np.float32]], NDArray[np.float32]], word: str, bundle: Path
) -> None:
    x, index = held_examples(bundle)
    replace_examples(bundle, change(x).astype(np.float32))
    report = plain(bundle)
    assert [f.index for f in report.failures[:-1] if word in f.why] == index.tolist()
    assert report.rows[0].robust_found == 1.0


def test_an_example_just_outside_of_the_ball_counts_for_nothing(bundle: Path) -> None:
    x, index = held_examples(bundle)
    clean = clean_images()[index]
    far = np.clip(clean + (x - clean) * np.float32(1.01), 0, 1)
    replace_examples(bundle, far.astype(np.float32))
    assert "outside of the ball: at 0.126" in whys(plain(bundle))


def test_a_right_answer_claimed_wrong_is_named(bundle: Path) -> None:
    survivor = row_of(bundle).robust.index(True)

    def claim(data: dict[str, Any]) -> None:
        data["clean_correct"][survivor] = data["robust"][survivor] = False
        data["clean_acc"] -= 1 / SAMPLES
        data["robust_acc"] -= 1 / SAMPLES

    rewrite(bundle, claim)
    report = plain(bundle)
    assert report.failures[0].index == survivor
    assert "claimed misclassified without an attack, and is right" in report.failures[0].why
    assert "robust accuracy is" in whys(report)


def test_a_survivor_claimed_broken_needs_an_example_that_breaks_it(bundle: Path) -> None:
    survivor = row_of(bundle).robust.index(True)

    def claim(data: dict[str, Any]) -> None:
        data["robust"][survivor], data["broken_by"][survivor] = False, "pgd"
        data["robust_acc"] -= 1 / SAMPLES

    rewrite(bundle, claim)
    assert f"sample {survivor}: is claimed broken, but has no example" in whys(plain(bundle))
    x, index = held_examples(bundle)
    order = np.argsort(np.append(index, survivor))
    near = np.clip(clean_images()[survivor : survivor + 1] + np.float32(0.01), 0, 1)
    replace_examples(bundle, np.append(x, near, axis=0)[order], np.append(index, survivor)[order])
    report = plain(bundle)
    assert [(f.index, f.why) for f in report.failures[:1]] == [
        (survivor, "the example is classified right")
    ]
    assert plain(bundle).rows[0].robust_found == pytest.approx(
        sum(row_of(bundle).robust) / SAMPLES + 1 / SAMPLES
    )


def test_an_example_for_a_sample_that_is_not_claimed_broken_is_named(bundle: Path) -> None:
    x, index = held_examples(bundle)
    stray = index.copy()
    stray[0] = row_of(bundle).robust.index(True)
    replace_examples(bundle, x, stray)
    assert "has an example, but is not claimed broken" in whys(plain(bundle))


@pytest.mark.parametrize("figure", ["clean_acc", "robust_acc"])
def test_figures_must_be_those_of_the_samples(figure: str, bundle: Path) -> None:
    rewrite(bundle, lambda row: row.update({figure: 0.25}))
    assert "claimed as 25.0000%, its samples say" in whys(plain(bundle))


def test_a_decision_by_a_hair_is_borderline_and_no_failure(bundle: Path) -> None:
    """Between the clean image and the example, just on the right side of the boundary."""
    whole = read_bundle(bundle)
    rebuilt = rebuild(whole, whole.find("Plain"), Setting())
    x, index = held_examples(bundle)
    place = rebuilt.places[int(index[0])]
    clean, broken = rebuilt.clean([place]), torch.from_numpy(x[:1])
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        right = rebuilt.correct(torch.lerp(clean, broken, middle), [place])[0]
        low, high = (middle, high) if right else (low, middle)
    x[0] = torch.lerp(clean, broken, low).numpy()[0]
    replace_examples(bundle, x)
    report = plain(bundle, batch_size=1)
    assert report.ok, whys(report)
    assert [f.index for f in report.rows[0].borderline] == [index[0]]
    assert report.rows[0].robust_found == pytest.approx(report.rows[0].robust_claimed + 1 / SAMPLES)
    x[0] = torch.lerp(clean, broken, 0.9 * low).numpy()[0]
    replace_examples(bundle, x)
    assert not plain(bundle, batch_size=1).ok


def test_other_data_under_the_same_name_are_refused(bundle: Path) -> None:
    def mislabeled(name: str, split: Any, samples: int) -> Slice:
        data = load_slice(name, split, samples)
        return replace(data, labels=(data.labels + 1) % 10)

    assert "is not the one of the row" in whys(plain(bundle, data=mislabeled))
    rewrite(bundle, lambda row: row.update(data="/etc/data.parquet"))
    assert "is a path of the bundle's maker" in whys(plain(bundle))


def test_weights_can_come_from_another_folder(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    name = row_of(bundle).weights.name
    (bundle / "weights" / name).rename(tmp_path / "elsewhere" / "mine.safetensors")
    assert name in whys(plain(bundle))
    assert plain(bundle, weights=tmp_path / "elsewhere").ok


def test_a_model_of_other_parameters_is_not_the_rows(bundle: Path) -> None:
    rewrite(bundle, lambda row: row["case"]["parameters"].update(width=48))
    assert "parameters" in whys(plain(bundle))
    assert plain(bundle).rows[0].robust_found is None


def test_a_strangers_code_is_not_run_unasked(finished: Path, bundle: Path) -> None:
    with pytest.raises(UsageError, match="is code of noisy; allow it with --trust-plugins"):
        verify_bundle(finished / "bundle")
    rewrite(bundle, lambda row: row["case"].update(defense="nobody's"))
    with pytest.raises(UsageError, match="is not installed"):
        plain(bundle)


def test_weights_that_a_built_in_defense_gets_by_itself_are_not_got_unasked(bundle: Path) -> None:
    rewrite(bundle, lambda row: row.update(weights=None))
    with pytest.raises(UsageError, match="gets weights by itself"):
        plain(bundle)


def test_rows_are_chosen_by_pattern(finished: Path) -> None:
    assert [r.title for r in plain(finished / "bundle").rows] == [PLAIN]
    for rows, word in (("nobody", "no row"), ("(", "no regular expression")):
        with pytest.raises(UsageError, match=word):
            verify_bundle(finished / "bundle", rows=rows)
    with pytest.raises(UsageError, match="batch-size is 0"):
        plain(finished / "bundle", batch_size=0)


def test_a_randomized_row_is_scored_by_the_draws_of_its_records(finished: Path) -> None:
    whole = read_bundle(finished / "bundle")
    row = whole.find("Noisy/../row")
    assert row.randomized
    rebuilt, every = rebuild(whole, row, TRUST), range(SAMPLES)
    data = json.loads((finished / "run.json").read_text())
    keys = [k for keys in data["rows"][2]["records"].values() for k in keys]
    records = [Store(finished / "records").read(key) for key in keys]
    votes = [v for r in records if r.meta.kind == "clean" for v in r.rows["clean_votes"]]
    assert rebuilt.judged(rebuilt.x, every).votes.tolist() == votes
    rebuilt.judge.scope = "another case"
    assert rebuilt.judged(rebuilt.x, every).votes.tolist() != votes


def test_a_randomized_model_cannot_pass_for_a_deterministic_one(bundle: Path) -> None:
    rewrite(bundle, lambda row: row.update(randomized=False), "Noisy/../row")
    report = verify_bundle(bundle, rows="Noisy", setting=TRUST)
    assert "its model is randomized, the bundle says that it is not" in whys(report)
