"""`robustdeq run`, with its progress bar and its estimate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from robustdeq.cli.console import APP, ERR, OUT
from robustdeq.cli.interrupts import interruptible
from robustdeq.errors import UsageError, unknown


@APP.command()
def run(
    suite: Annotated[
        str, typer.Argument(help="A suite's name, or the path of a TOML file.")
    ] = "digits",
    out: Annotated[Path, typer.Option(help="Folder for results; SUITE/ is made in it.")] = Path(
        "out"
    ),
    battery: Annotated[
        str | None, typer.Option(help="Attacks in place of the suite's own.")
    ] = None,
    autoattack: Annotated[
        str | None,
        typer.Option(help="What runs AutoAttack: reference, or joint (much faster on DEQs)."),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Test samples per row.")] = None,
    only: Annotated[
        str | None,
        typer.Option(
            help="Rows in whose ID this regular expression is found; and those of --plugin."
        ),
    ] = None,
    threat: Annotated[
        str | None, typer.Option(help="In place of the suite's, as in Linf:0.1.")
    ] = None,
    curves: Annotated[
        bool, typer.Option("--curves", help="Also accuracy against epsilon and steps: curves.csv.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    batch_size: Annotated[int | None, typer.Option(help="Most rows in one forward pass.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes at a time; one per core.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Folder that is looked in first.")] = None,
    plugin: Annotated[
        list[str] | None,
        typer.Option(
            help="FILE.py[:NAME] or a name, beside the suite's own: its defenses as rows, its "
            "attacks on all rows. FILE.py=WEIGHTS.safetensors for a trained defense; one without "
            "weights is evaluated as it is built. May be given several times."
        ),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(help="Seconds for one attack on one chunk; one that takes longer has failed."),
    ] = None,
    engine: Annotated[str, typer.Option(help="local, or ray for a cluster.")] = "local",
    address: Annotated[
        str | None, typer.Option(help="Ray cluster, auto or HOST:PORT; by default one is started.")
    ] = None,
    task_gpus: Annotated[
        float, typer.Option(help="With ray: of a GPU, for each task; 0.25 puts four on one.")
    ] = 1.0,
    task_memory: Annotated[float, typer.Option(help="With ray: GiB set aside for a task.")] = 1.0,
    recheck: Annotated[
        int | None,
        typer.Option(
            help="Afterwards run all again under this seed, and say whether any figure leaves its "
            "interval: recheck.md."
        ),
    ] = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Only say what it will cost.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Run a suite and write its leaderboard; what was computed before is not computed again."""
    from robustdeq.cli.recheck import recheck_run
    from robustdeq.plugin_rows import additions
    from robustdeq.reporting.publish import publish
    from robustdeq.running.recheck import under_seed
    from robustdeq.running.run import Options, run_suite
    from robustdeq.suite import adjusted, check_suite, find_suite, unpinned

    del debug
    if workers is not None and workers < 1:
        raise UsageError(f"--workers is {workers}; give at least 1.")
    more = additions(plugin or [])
    wide = more.rows_in(find_suite(suite))
    added = {entry.id for entry in more.defenses}
    narrow = adjusted(wide, samples, battery, only, threat, curves, autoattack, added)
    chosen = more.attacks_in(narrow)
    check_suite(chosen, f"suite {chosen.name} with --plugin" if plugin else f"suite {chosen.name}")
    if loose := unpinned(chosen):
        names = ", ".join(loose[:5]) + (" and others" if len(loose) > 5 else "")
        ERR.print(
            escape(f"warning: the suite has no sha256 for the weights of {names}; any will do."),
            style="yellow",
        )
    if estimate:
        _print_estimate(chosen, device, weights, workers)
        return
    options = Options(
        out=out,
        device=device,
        batch_size=batch_size,
        workers=workers,
        weights=weights,
        timeout=timeout,
        cluster=_cluster(engine, address, task_gpus, task_memory),
    )
    if recheck is not None:
        under_seed(chosen, recheck)  # says what is wrong with it before hours are spent
    with interruptible(), RunDisplay() as display:
        verdicts = run_suite(chosen, options, display.tick)
    folder = out / chosen.name
    publish(folder)
    OUT.print(
        f"\nwrote {escape(str(folder))}/index.html, table.md, table.csv, figures/, run.json "
        "and records/"
    )
    kept = recheck is None or recheck_run(chosen, options, recheck)
    failed = [verdict for verdict in verdicts if verdict.status != "ok"]
    for verdict in failed:
        ERR.print(escape(f"{verdict.id} ({verdict.threat}): {verdict.note}"), style="red")
    if failed or not kept:
        raise typer.Exit(1)


def _cluster(engine: str, address: str | None, gpus: float, memory: float) -> Any:
    from robustdeq.running.cluster import Cluster

    if engine == "ray":
        return Cluster(address, gpus, memory)
    if engine != "local":
        raise unknown("engine", engine, ["local", "ray"])
    if address is not None:
        raise UsageError("--address is for --engine ray; give both, or neither.")
    return None


class RunDisplay:
    """A progress bar with finished rows above it; plain lines where there is no terminal."""

    def __init__(self) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=OUT,
            disable=not OUT.is_terminal,
        )
        self.task = self.progress.add_task("starting", total=None)

    def __enter__(self) -> RunDisplay:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def tick(self, tick: Any) -> None:
        self.progress.update(
            self.task, completed=tick.done, total=tick.total, description=escape(tick.label[:48])
        )
        if tick.note:
            self.progress.console.print(escape(tick.note), highlight=False)
        if tick.verdict is not None:
            self.progress.console.print(escape(str(tick.verdict)), highlight=False)


def _print_estimate(suite: Any, device: str, weights: Path | None, workers: int | None) -> None:
    from rich.table import Table

    from robustdeq.evaluation.estimate import estimate_suite
    from robustdeq.evaluation.subject import pick_device
    from robustdeq.running.local import default_workers

    rows = estimate_suite(suite, device, weights)
    table = Table("ID", "threat", "chunks", "forward, ms", "gradient, ms", "seconds", "note")
    for row in rows:
        table.add_row(
            escape(row.id), row.threat, str(row.chunks), f"{row.forward_ms:.2f}",
            f"{row.gradient_ms:.2f}", f"{row.seconds:.0f}", escape(row.note),
        )  # fmt: skip
    OUT.print(table)
    count = workers or default_workers(pick_device(device))
    total = sum(row.seconds for row in rows)
    OUT.print(
        f"about {total:.0f} s of computation if no sample falls; "
        f"{total / count:.0f} s on {count} workers"
    )
