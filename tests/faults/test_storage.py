"""Full disks, folders that may not be written to, mounts that vanish; two runs in one folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faulty import assert_same_records, keys, run, start

from robustdeq.errors import StorageError, UsageError
from robustdeq.files import sweep, write_atomically
from robustdeq.locks import alone_in

# A disk of its own: a mount that is seen by the command alone and ends with it.
DISK = """
set -e
mount -t tmpfs -o size={size} none {place}
{before}
set +e
{python} -P -c 'from robustdeq.cli import main; main()' run {suite} --workers 2 --out {place}/out \\
    2> {place}.err > {place}.out &
{during}
wait $!; echo $? > {place}.rc
ls -A {place}/out/*/records > {place}.ls 2> /dev/null
cp -r {place}/out {place}.kept 2> /dev/null
exit 0
"""
SUITE = Path(__file__).parent / "small.toml"


def on_a_disk(place: Path, size: str = "64m", before: str = "true", during: str = "true") -> str:
    """The error text of a run whose folder is on a disk of its own."""
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare, to mount a disk that nobody else sees")
    place.mkdir()
    text = DISK.format(
        size=size,
        place=place,
        before=before.format(place=place),
        during=during.format(place=place),
        python=sys.executable,
        suite=SUITE,
    )
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", text]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()[:100]}")
    assert Path(f"{place}.rc").read_text().strip() in ("1", "2")
    error = Path(f"{place}.err").read_text()
    assert "Traceback" not in error
    assert error.strip().count("\n") == 0, error
    return error


def test_a_full_disk_stops_the_run_with_one_sentence_and_no_torn_file(tmp_path: Path) -> None:
    place = tmp_path / "disk"
    error = on_a_disk(place, size="120k")
    assert "No space left on device" in error
    assert "what is finished is kept" in error
    names = Path(f"{place}.ls").read_text().split()
    assert names
    assert all(name.endswith(".parquet") and not name.startswith(".") for name in names)


def test_a_folder_that_may_not_be_written_to(tmp_path: Path) -> None:
    error = on_a_disk(tmp_path / "disk", before="mkdir {place}/out; mount -o remount,ro {place}")
    assert "disk/out" in error
    assert "name another" in error


def test_a_mount_that_vanishes_stops_the_run_and_is_not_made_anew(tmp_path: Path) -> None:
    place = tmp_path / "disk"
    wait = (
        "while [ $(ls {place}/out/small/records 2> /dev/null | wc -l) -lt 2 ]; do sleep 0.05; done"
    )
    error = on_a_disk(place, during=f"{wait}; umount -l {{place}}")
    assert "cannot be written (No such file or directory)" in error
    assert not list(place.iterdir())


def test_two_runs_lock_each_other_out(tmp_path: Path) -> None:
    process = start(tmp_path / "out", tmp_path)
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "faulty" / "records").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.2)
    with pytest.raises(UsageError, match=rf"in use by process {process.pid} on .*--out"):
        run(tmp_path / "out")
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    run(tmp_path / "out")  # and it is free again


def test_a_lock_ends_with_its_process_however_it_ends(tmp_path: Path) -> None:
    process = start(tmp_path / "out", tmp_path)
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "faulty" / "records").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.communicate()
    run(tmp_path / "out")
    assert keys(tmp_path / "out")


def test_the_lock_does_not_outlive_its_block(tmp_path: Path) -> None:
    with alone_in(tmp_path), pytest.raises(UsageError, match="in use"), alone_in(tmp_path):
        pass
    with alone_in(tmp_path):
        pass


def test_what_a_killed_writer_has_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    run(tmp_path / "a")
    run(tmp_path / "b")
    folder = tmp_path / "b" / "faulty" / "records"
    first = next(folder.iterdir())
    (folder / f".{first.name}.abcd1234").write_bytes(first.read_bytes()[:100])
    run(tmp_path / "b")
    assert all(path.suffix == ".parquet" for path in folder.iterdir())
    assert_same_records(tmp_path / "a", tmp_path / "b")


def test_sweeping_takes_temporary_files_alone(tmp_path: Path) -> None:
    write_atomically(tmp_path / "table.csv", b"1")
    for name in (".table.csv.x1y2z3w4", ".lock", ".lock-holder.json", "notes.txt"):
        (tmp_path / name).write_text("")
    sweep(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"table.csv", ".lock", ".lock-holder.json", "notes.txt"}


def test_a_write_into_nothing_names_the_file_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"gone/x cannot be written .*same command again"):
        write_atomically(tmp_path / "gone" / "x", b"1")
