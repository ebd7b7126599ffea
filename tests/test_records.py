from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from robustdeq.errors import DamagedError, UsageError
from robustdeq.keys import canonical_json, digest
from robustdeq.records import (
    FORMAT,
    SAMPLE_SCHEMA,
    Record,
    RecordMeta,
    Status,
    Store,
    check_frame,
    sample_frame,
)
from robustdeq.tables import COLUMNS, tabulate, to_csv, to_markdown
from robustdeq.verdict import Evidence, Failure, Verdict, judge_evidence

CASE = {"id": "Row", "defense": "deq", "dataset": "digits", "threat": "Linf:0.1", "n": 4}
STAGE = {
    "attack": "autoattack",
    "parameters": {"version": "standard"},
    "gradient": "honest",
    "needs": "gradients",
}


def record(kind: str = "clean", label: str = "clean", key: str = "k", **columns: object) -> Record:
    full = {
        "index": [0, 1, 2, 3],
        "label": [3, 1, 2, 0],
        "clean_prediction": [3, 1, 2, 1],
        "clean_correct": [True, True, True, False],
        "status": [Status.CLEAN] * 4,
    } | columns
    meta = RecordMeta(
        key=key,
        kind=kind,  # type: ignore[arg-type]
        case=CASE,
        case_key="c",
        stage=STAGE if label == "autoattack" else {"needs": "logits"} if label == "square" else {},
        label=label,
        chunk=0,
        track="deterministic",
        forward_nfe=10,
        backward_nfe=5,
        seconds=1.5,
    )
    return Record(meta, sample_frame(full, 4))


def attack(label: str, correct: list[bool | None], **columns: object) -> Record:
    words = [Status.OK if c is not None else Status.BROKEN_BEFORE for c in correct]
    words[3] = Status.MISCLASSIFIED
    values = {"status": words, "adversarial_correct": correct} | columns
    return record("attack", label, label, **values)


def verdict(*records: Record, labels: tuple[str, ...] | None = None, **more: object) -> Verdict:
    expected = labels or tuple(r.meta.label for r in records if r.meta.kind == "attack")
    evidence = Evidence(case=CASE, chunks=1, expected={0: expected}, records=records)
    return judge_evidence(replace(evidence, **more))  # type: ignore[arg-type]


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    store, written = Store(tmp_path), record(adversarial=[b"ab", None, None, None])
    store.write(written)
    held = store.read("k")
    assert held is not None
    assert held.meta == written.meta
    pd.testing.assert_frame_equal(held.rows, written.rows)
    assert held.content_digest == written.content_digest
    assert store.read("other") is None
    assert [p.name for p in tmp_path.iterdir()] == ["k.parquet"]


def test_content_digests_ignore_costs_and_nothing_else() -> None:
    same = record(seconds=[1.0] * 4, forward_nfe=[9.0] * 4)
    assert same.content_digest == record().content_digest
    assert record(clean_prediction=[3, 1, 2, 2]).content_digest != record().content_digest
    assert record(adversarial=[b"a", None, None, None]).content_digest != record().content_digest


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(record(adversarial=[b"pixels", None, None, None]))
    path = store.path("k")
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        for bit in (0x01, 0x80):
            changed = bytes([whole[position] ^ bit])
            path.write_bytes(whole[:position] + changed + whole[position + 1 :])
            for read in (store.read, store.summary):
                with pytest.raises(DamagedError, match=r"k\.parquet is damaged"):
                    read("k")
    path.write_bytes(whole)
    assert store.read("k") is not None


@pytest.mark.parametrize("length", [0, 3, 100, -1])
def test_torn_files_are_damaged(tmp_path: Path, length: int) -> None:
    store = Store(tmp_path)
    store.write(record())
    path = store.path("k")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DamagedError, match="give the same 'robustdeq run' command again"):
        store.read("k")


def test_what_is_listed_and_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"k\.parquet, which the run lists, is gone"):
        Store(tmp_path).listed("k")


def test_a_record_from_before_there_were_seals_is_read(tmp_path: Path) -> None:
    """As version 0.1 wrote it: a digest per column."""
    store, written = Store(tmp_path), record(adversarial=[b"ab", None, None, None])
    table = pa.Table.from_pandas(written.rows, schema=SAMPLE_SCHEMA, preserve_index=False)
    text = canonical_json(asdict(written.meta))
    seal = {"meta": digest(text)} | {
        name: hashlib.sha256(repr(table[name].to_pylist()).encode()).hexdigest()
        for name in table.schema.names
    }

    def write(seal: dict[str, str]) -> None:
        held = {"robustdeq": text, "robustdeq_seal": canonical_json(seal)}
        pq.write_table(table.replace_schema_metadata(held), store.path("k"))

    write(seal)
    held = store.read("k")
    assert held is not None
    assert held.content_digest == written.content_digest
    for lost in ("meta", "index", "adversarial"):
        write({**seal, lost: "0"})
        with pytest.raises(DamagedError, match="checksum differs"):
            store.read("k")


def test_a_record_under_another_name_is_damaged(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(record())
    store.path("k").rename(store.path("other"))
    with pytest.raises(DamagedError, match="another record than its name says"):
        store.read("other")


def test_a_newer_format_is_refused_with_the_remedy(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(replace_meta(record(), format=FORMAT + 1))
    with pytest.raises(UsageError, match="newer RobustDEQ"):
        store.read("k")
    data = json.loads(pq.read_schema(store.path("k")).metadata[b"robustdeq"])
    assert data["format"] == FORMAT + 1


def replace_meta(held: Record, **changes: object) -> Record:
    return Record(replace(held.meta, **changes), held.rows)  # type: ignore[arg-type]


def test_the_verdict_is_the_and_over_attacks() -> None:
    found = verdict(
        record(),
        attack("autoattack", [True, False, True, None], made_by=["", "apgd-ce", "", ""]),
        attack("pgd", [True, None, False, None]),
    )
    assert found.clean_acc == 0.75
    assert found.autoattack_acc == 0.5
    assert found.robust_acc == 0.25
    assert found.broken_by == {"autoattack/apgd-ce": 1, "pgd": 1}
    assert found.samples["robust"].tolist() == [True, False, False, False]
    assert found.samples["broken_by"].tolist() == [None, "autoattack/apgd-ce", "pgd", None]
    assert (found.forward_nfe, found.backward_nfe, found.seconds) == (30, 15, 4.5)
    # Wilson's interval for 1 of 4, from its closed form.
    z, n, p = 1.959963984540054, 4, 0.25
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert found.robust_low == pytest.approx(center - half)
    assert found.robust_high == pytest.approx(center + half)


def test_missing_and_failed_stages_leave_no_robust_accuracy() -> None:
    missing = verdict(record(), attack("pgd", [True] * 3 + [None]), labels=("pgd", "autoattack"))
    assert missing.robust_acc is None
    assert (missing.status, missing.note) == ("missing", "autoattack is missing for 1 chunks")
    failed = verdict(record(), labels=("pgd",), failures=(Failure("pgd", 0, "out of ideas"),))
    assert (failed.status, failed.note) == ("failed", "pgd: out of ideas")
    nothing = verdict(labels=(), expected={})
    assert nothing.status == "missing"
    assert nothing.clean_acc is None
    chunk_missing = verdict(record(), attack("pgd", [True] * 3 + [None]), chunks=2)
    assert (chunk_missing.robust_acc, chunk_missing.status) == (None, "missing")
    unattacked = verdict(record(), labels=(), expected={0: ()})
    assert (unattacked.robust_acc, unattacked.status) == (None, "failed")
    without_clean = verdict(attack("pgd", [True] * 4))
    assert (without_clean.robust_acc, without_clean.status) == (None, "missing")
    assert "clean predictions are missing for 4 samples" in without_clean.note


def test_non_finite_examples_on_survivors_leave_no_robust_accuracy() -> None:
    words = ["nonfinite", Status.OK, Status.OK, Status.MISCLASSIFIED]
    lost = attack("pgd", [None, True, True, None], status=words)
    assert verdict(record(), lost).robust_acc is None
    broken = attack("square", [False, True, True, None])
    resolved = verdict(record(), lost, broken)  # another attack settled that sample
    assert resolved.robust_acc == 0.5


def test_flags_name_their_numbers() -> None:
    checks = check_frame(
        [
            {
                "name": "zero_gradient",
                "value": 0.5,
                "threshold": 0.05,
                "n": 4,
                "status": "failed",
                "detail": "detach at model.py:3; round at model.py:5",
            },
            {"name": "fine", "value": 0.0, "threshold": 0.05, "n": 4, "status": "passed"},
        ]
    )
    held = Record(replace(record().meta, kind="checks", key="x"), checks)
    nan = attack("pgd", [True, True, False, None], adversarial_prediction=[3, 1, -1, None])
    flags = verdict(record(), held, nan).flags
    assert flags == ("zero_gradient=0.5 (detach at model.py:3, round at model.py:5)",
                     "nonfinite_logits:pgd=1")  # fmt: skip


@pytest.mark.parametrize(
    ("needs", "gradient", "part", "flag"),
    [
        ("logits", "honest", "", "black_box_beats_gradients"),
        ("gradients", "honest", "square", "black_box_beats_gradients"),
        ("gradients", "straight_through", "", "other_gradients_beat_honest"),
        ("gradients", "honest", "apgd-t", None),
    ],
)
@pytest.mark.parametrize(
    ("count", "n", "doubted"), [(7, 100, True), (6, 100, False), (7, 400, False)]
)
def test_honest_gradients_are_doubted_beyond_chance_alone(
    needs: str, gradient: str, part: str, flag: str | None, count: int, n: int, doubted: bool
) -> None:
    """At 2 points and p < 0.01 of the exact one-sided test: 0.5 ** 7 is, 0.5 ** 6 is not."""
    rows = [False] * count + [True] * (n - count)
    columns = {
        "index": list(range(n)), "label": [0] * n, "clean_prediction": [0] * n,
        "clean_correct": [True] * n, "status": [Status.OK] * n,
        "adversarial_prediction": [0 if right else 1 for right in rows],
        "adversarial_correct": rows, "made_by": [part] * n,
    }  # fmt: skip
    clean = {**columns, "status": [Status.CLEAN] * n}
    meta = replace(record().meta, case={**record().meta.case, "n": n})
    stage = {"attack": "a", "needs": needs, "gradient": gradient, "parameters": {}}
    found = verdict(
        Record(meta, sample_frame(clean, n)),
        Record(replace(meta, kind="attack", label="a", stage=stage), sample_frame(columns, n)),
        labels=("a",), case=meta.case,
    )  # fmt: skip
    expected = (f"{flag}={count / n:.3g}",) if flag and doubted else ()
    assert found.flags == expected


def row(name: str, robust: float | None, **more: object) -> Verdict:
    """A row on 50 samples, of which the first are robust, so that rows are nested."""
    out = Verdict(name, "deq", "digits", "Linf:0.1", 50, clean_acc=0.98, robust_acc=robust)
    if robust is None:
        out.status, out.note = "failed", "because"
    else:
        held = {"index": range(50), "label": [0] * 50, "robust": np.arange(50) < 50 * robust}
        out.samples = pd.DataFrame(held)
    for key, value in more.items():
        setattr(out, key, value)
    return out


def elsewhere(name: str, robust: float, first: int = 50) -> Verdict:
    out = row(name, robust)
    out.samples["index"] += first
    return out


def ranked(*verdicts: Verdict) -> dict[str, object]:
    table = tabulate(verdicts)
    return dict(zip(table["id"], table["rank"].astype(object), strict=True))


def test_ranks_are_shared_by_ties_and_withheld_from_failures() -> None:
    table = tabulate(
        [
            row("C", 0.4),
            row("A", 0.8),
            row("F", None),
            row("B", 0.82),
            row("V", 0.9, flags=("outside_ball:pgd=3",)),
            row("I", 0.9, flags=("incomplete_training",)),
            row("E", 0.9, samples=pd.DataFrame()),
            row("R", 0.1, track="randomized"),
            row("N", 0.94, track="no_gradient"),
        ]
    )
    assert list(table.columns) == list(COLUMNS)
    assert dict(zip(table["id"], table["rank"].astype(object), strict=True)) | {} == {
        "B": 1, "A": 1, "C": 3, "E": pd.NA, "I": pd.NA, "V": pd.NA, "F": pd.NA, "R": 1, "N": 1,
    }  # fmt: skip
    assert table["id"].tolist() == ["B", "A", "C", "E", "I", "V", "F", "R", "N"]
    assert not table["note"].tolist()[0]


def test_rows_are_paired_on_the_index_and_not_on_their_order() -> None:
    held = row("A", 0.4)
    held.samples = held.samples.sample(frac=1, random_state=0)
    # Nested, and so told apart; read in the shuffled order the two would differ by chance.
    assert ranked(held, row("B", 0.56)) == {"B": 1, "A": 2}


def test_rows_on_other_samples_are_ranked_among_their_like() -> None:
    table = tabulate([row("A", 0.8), row("B", 0.4), elsewhere("C", 0.6), elsewhere("D", 0.2)])
    assert dict(zip(table["id"], table["rank"], strict=True)) == {"A": 1, "C": 1, "B": 2, "D": 2}
    three = [row("A", 0.8), row("B", 0.4), elsewhere("C", 0.6)]
    for verdicts in (three, three[::-1]):
        notes = tabulate(verdicts).set_index("id")["note"]
        assert notes[["A", "B"]].tolist() == ["", ""]
        assert "other samples" in notes["C"]
        assert "other samples" in to_markdown(tabulate(verdicts), "t").split("\n- ")[0]
    relabeled = row("C", 0.2)
    relabeled.samples["label"] = 7
    assert ranked(row("A", 0.8), relabeled) == {"A": 1, "C": 1}


def seeded(name: str, robust: float | None, seed: int | None, **more: object) -> Verdict:
    return row(name, robust, family="F", training_seed=seed, **more)


def test_seeds_of_a_family_are_spread_in_each_of_its_rows() -> None:
    rows = [seeded(f"F{k}", value, k) for k, value in enumerate((0.48, 0.5, 0.52))]
    others = [
        seeded("P", 0.9, None),
        seeded("Q", 0.9, 9, threat="L2:1"),
        row("S", 0.9, training_seed=3),
    ]
    table = tabulate([*rows, *others]).set_index("id")["seeds"]
    assert table[["F0", "F1", "F2"]].tolist() == ["3: 50.00 +- 2.00, 48.00 to 52.00"] * 3
    assert table[["P", "Q", "S"]].tolist() == [""] * 3


def test_seeds_without_a_figure_are_counted_and_not_averaged() -> None:
    two = [seeded("F0", 0.48, 0), seeded("F1", 0.52, 1)]
    lost = [
        seeded("F2", None, 2),
        seeded("F2", 0.9, 2, track="no_gradient"),
        seeded("F2", 0.9, 2, flags=("outside_ball:pgd=3",)),
    ]
    for third in lost:
        table = tabulate([*two, third]).set_index("id")["seeds"]
        assert table["F0"] == table["F1"] == "2 of 3: 50.00 +- 2.83, 48.00 to 52.00"
    assert tabulate([two[0], lost[0]])["seeds"].tolist() == ["1 of 2", ""]


def test_missing_figures_are_empty_in_csv_and_not_zero() -> None:
    text = to_csv(tabulate([row("F", None), row("Z", 0.0)]))
    frame = pd.read_csv(pd.io.common.StringIO(text)).set_index("id")
    assert pd.isna(frame.loc["F", "robust_acc"])
    assert frame.loc["Z", "robust_acc"] == 0.0
    markdown = to_markdown(tabulate([row("F", None), row("Z", 0.0)]), "t")
    assert "n/a" in markdown
    assert "failed: because" in markdown


def test_markdown_has_a_section_per_track_and_says_what_its_columns_are() -> None:
    rows = [row("N", 0.9, track="no_gradient"), row("R", 0.5, track="randomized")]
    rows += [row("D", 0.5, credit="Ada"), row("X", 0.5, track="new")]
    text = to_markdown(tabulate(rows), "t", ["Mine."])
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## digits, Linf:0.1, deterministic models",
        "## digits, Linf:0.1, randomized models",
        "## digits, Linf:0.1, models without a gradient to attack",
        "## digits, Linf:0.1, new models",
    ]
    assert "| Ada |" in text
    notes = [line for line in text.splitlines() if line.startswith("- ")]
    assert notes[0] == "- Mine."
    assert [note.split(":")[0] for note in notes[1:]] == ["- Rank", "- Seeds", "- Credit"]
    assert "tied" in notes[1]
    assert text.endswith(notes[-1] + "\n")


def test_the_order_of_the_verdicts_changes_no_byte() -> None:
    rows = [seeded(f"F{k}", value, k) for k, value in enumerate((0.9, 0.5, 0.5, 0.1))]
    rows += [row("R", 0.1, track="randomized"), row("F", None), elsewhere("E", 0.3)]
    tables = [tabulate(rows), tabulate(rows[::-1]), tabulate(rows[3:] + rows[:3])]
    assert len({to_csv(table) for table in tables}) == 1
    assert len({to_markdown(table, "t") for table in tables}) == 1


def test_markdown_escapes_what_a_stranger_named() -> None:
    text = to_markdown(tabulate([row("<script>|x|\n[a](b)", 0.5, credit="|<b>|")]), "t")
    assert "<script>" not in text
    assert "<b>" not in text
    (line,) = [line for line in text.splitlines() if "script" in line]
    assert line.replace("\\|", "").count("|") == 15
