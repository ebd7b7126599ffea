"""The command line. Imports lazily: `--help` and `report` start without torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console
from rich.markup import escape

from robustdeq.errors import CaseError, RobustDEQError, UsageError, sentence, unknown

app = typer.Typer(
    name="robustdeq",
    help="An adversarial-robustness benchmark for models that iterate to an answer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
KINDS = ("defenses", "attacks", "recipes", "suites", "datasets")
_out = Console(soft_wrap=True)
_err = Console(stderr=True, soft_wrap=True)


@app.command()
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
    samples: Annotated[int | None, typer.Option(help="Test samples per row.")] = None,
    only: Annotated[
        str | None, typer.Option(help="Rows in whose ID this regular expression is found.")
    ] = None,
    threat: Annotated[
        str | None, typer.Option(help="In place of the suite's, as in Linf:0.1.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    batch_size: Annotated[int | None, typer.Option(help="Most rows in one forward pass.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes at a time; one per core.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Folder that is looked in first.")] = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Only say what it will cost.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Run a suite and write its leaderboard; what was computed before is not computed again."""
    from robustdeq.evaluation.run import Options, run_suite
    from robustdeq.suite import adjusted, find_suite

    del debug
    if workers is not None and workers < 1:
        raise UsageError(f"--workers is {workers}; give at least 1.")
    chosen = adjusted(find_suite(suite), samples, battery, only, threat)
    if estimate:
        _print_estimate(chosen, device, weights, workers)
        return
    options = Options(
        out=out, device=device, batch_size=batch_size, workers=workers, weights=weights
    )
    try:
        with _RunDisplay() as display:
            verdicts = run_suite(chosen, options, display.tick)
    except KeyboardInterrupt:
        _err.print("interrupted; finished stages are kept, the same command goes on from there.")
        raise typer.Exit(130) from None
    folder = out / chosen.name
    _out.print(f"\nwrote {escape(str(folder))}/table.md, table.csv, run.json and records/")
    failed = [verdict for verdict in verdicts if verdict.status != "ok"]
    if failed:
        for verdict in failed:
            _err.print(escape(f"{verdict.id} ({verdict.threat}): {verdict.note}"), style="red")
        raise typer.Exit(1)


@app.command("list")
def list_(
    kind: Annotated[str, typer.Argument(help="defenses, attacks, recipes, suites or datasets.")],
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """List what is registered."""
    from robustdeq.listing import listed

    if kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    rows = listed(kind)
    if as_json:
        typer.echo(json.dumps(rows, indent=1, default=str))
    else:
        _print_listing(rows)
    if any("error" in row for row in rows):
        raise typer.Exit(1)


@app.command()
def train(
    defense: Annotated[str | None, typer.Argument(help="A registered defense.")] = None,
    out: Annotated[Path, typer.Option(help="FILE.safetensors; a folder with --suite.")] = Path(
        "weights"
    ),
    dataset: Annotated[str, typer.Option(help="A data set's name or path.")] = "digits",
    threat: Annotated[str, typer.Option(help="As in Linf:8/255.")] = "Linf:8/255",
    recipe: Annotated[
        str | None, typer.Option(help="A registered recipe; the defense's own.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A defense's parameter, KEY=VALUE.")
    ] = None,
    recipe_set: Annotated[
        list[str] | None, typer.Option(help="A recipe's parameter, KEY=VALUE.")
    ] = None,
    suite: Annotated[str | None, typer.Option(help="Train all weights of a suite instead.")] = None,
    only: Annotated[
        str | None, typer.Option(help="With --suite: files in whose name this pattern is found.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides every weight.")] = 0,
    validation: Annotated[
        int, typer.Option(help="Training images held out to choose the weights by; 0: the last.")
    ] = 0,
    augmentation: Annotated[
        str, typer.Option(help="none, or shift_flip as is usual on CIFAR.")
    ] = "none",
    precision: Annotated[
        str, typer.Option(help="auto, float32 or bfloat16 (autocast); auto: bfloat16 on a GPU.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    minutes: Annotated[
        float | None, typer.Option(help="Stop by then; the same command goes on.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Train a defense, or all of a suite's, and write safetensors with their metadata."""
    from robustdeq.evaluation.subject import pick_device
    from robustdeq.registry import load
    from robustdeq.suite import Augmentation, find_suite, pattern
    from robustdeq.training.run import Job, jobs_of, suited

    del debug
    if minutes is not None and minutes <= 0:
        raise UsageError(f"--minutes is {minutes:g}; give more than 0.")
    if (suite is None) == (defense is None):
        raise UsageError("name either a defense or --suite; 'robustdeq list defenses' shows them.")
    expected: dict[str, str] = {}
    if suite is not None:
        chosen = find_suite(suite)
        wanted = pattern(only or "")
        jobs = [job for job in jobs_of(chosen, out) if wanted.search(job.out.name)]
        expected = {Path(e.weights).name: e.sha256 for e in chosen.defenses}
    else:
        assert defense is not None
        parameters = _assignments(set_ or [])
        plugin = load("defense", defense, parameters)
        named = recipe or plugin.recipe
        jobs = [
            Job(
                defense=defense,
                parameters=parameters,
                dataset=dataset,
                recipe=named,
                recipe_parameters={**suited(plugin, named), **_assignments(recipe_set or [])},
                threat=threat,
                seed=seed,
                out=out,
                validation=validation,
                augmentation=_one_of("augmentation", augmentation, get_args(Augmentation)),
            )
        ]
    picked = pick_device(device)
    _train_all(jobs, expected, picked, _precision(precision, picked.type), minutes)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="The folder that a run has left.")],
    form: Annotated[str, typer.Option("--format", help="md or csv.")] = "md",
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Print a run's table, computed afresh from its records."""
    from robustdeq.report import read_run, render

    del debug
    name, verdicts = read_run(folder)
    typer.echo(render(name, verdicts, form), nl=False)


def main() -> None:
    """Entry point: errors become one sentence and an exit code."""
    debug = "--debug" in sys.argv
    try:
        app(standalone_mode=True)
    except RobustDEQError as error:
        if debug:
            raise
        _err.print(escape(f"error: {sentence(error)}"), style="red")
        sys.exit(1 if isinstance(error, CaseError) else 2)
    except Exception as error:
        if debug:
            raise
        _err.print(escape(f"error: {sentence(error)} (--debug shows where)"), style="red")
        sys.exit(1)


class _RunDisplay:
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
            console=_out,
            disable=not _out.is_terminal,
        )
        self.task = self.progress.add_task("starting", total=None)

    def __enter__(self) -> _RunDisplay:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def tick(self, tick: Any) -> None:
        self.progress.update(
            self.task, completed=tick.done, total=tick.total, description=escape(tick.label[:48])
        )
        if tick.verdict is not None:
            self.progress.console.print(escape(str(tick.verdict)), highlight=False)


def _print_estimate(suite: Any, device: str, weights: Path | None, workers: int | None) -> None:
    from rich.table import Table

    from robustdeq.evaluation.estimate import estimate_suite
    from robustdeq.evaluation.local import default_workers
    from robustdeq.evaluation.subject import pick_device

    rows = estimate_suite(suite, device, weights)
    table = Table("ID", "threat", "chunks", "forward, ms", "gradient, ms", "seconds", "note")
    for row in rows:
        table.add_row(
            escape(row.id), row.threat, str(row.chunks), f"{row.forward_ms:.2f}",
            f"{row.gradient_ms:.2f}", f"{row.seconds:.0f}", escape(row.note),
        )  # fmt: skip
    _out.print(table)
    count = workers or default_workers(pick_device(device))
    total = sum(row.seconds for row in rows)
    _out.print(
        f"about {total:.0f} s of computation if no sample falls; "
        f"{total / count:.0f} s on {count} workers"
    )


def _print_listing(rows: list[dict[str, Any]]) -> None:
    """A table; or, where rows have much to say, a paragraph each."""
    from rich.table import Table

    if any("link" in row for row in rows):
        for row in rows:
            _print_entry(row)
        return

    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(*columns)
    for row in rows:
        table.add_row(*[escape(_cell(row.get(column, ""))) for column in columns])
    _out.print(table)


def _print_entry(row: dict[str, Any]) -> None:
    about = row.get("about") or row.get("error", "")
    _out.print(f"[bold]{escape(row['name'])}[/bold]  {escape(about)}", highlight=False)
    origin = [row[key] for key in ("authors", "venue", "link", "from") if row.get(key)]
    _out.print(f"  {escape('; '.join(origin))}", highlight=False)
    for key in ("claimed", "reproduced", "parameters"):
        if row.get(key):
            _out.print(f"  [dim]{key}:[/dim] {escape(_cell(row[key]))}", highlight=False)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}={v}" for k, v in value.items())
    return str(value)


def _assignments(items: list[str]) -> dict[str, Any]:
    """KEY=VALUE pairs; values as TOML would read them, bare words as text."""
    import tomllib

    values: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals:
            raise UsageError(f"{item!r} is no assignment; write KEY=VALUE.")
        try:
            values[key.strip()] = tomllib.loads(f"v = {text}")["v"]
        except tomllib.TOMLDecodeError:
            values[key.strip()] = text
    return values


def _one_of(what: str, value: str, known: tuple[str, ...]) -> Any:
    if value not in known:
        raise unknown(what, value, known)
    return value


def _precision(name: str, device: str) -> str:
    if _one_of("precision", name, ("auto", "float32", "bfloat16")) != "auto":
        return name
    return "bfloat16" if device == "cuda" else "float32"


def _train_all(
    jobs: list[Any],
    expected: dict[str, str],
    device: Any,
    precision: Any,
    minutes: float | None,
) -> None:
    import time

    import torch
    from rich.progress import Progress

    from robustdeq.training.run import run_job

    # Sums depend on the number of threads; one makes the weights the same on any number of cores.
    torch.set_num_threads(1)
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    unfinished = 0
    for job in jobs:
        left = None if deadline is None else (deadline - time.monotonic()) / 60
        if left is not None and left <= 0:
            _out.print(f"{escape(str(job.out))} was not started; the same command goes on")
            unfinished += 1
            continue
        with Progress(console=_out, disable=not _out.is_terminal) as progress:
            task = progress.add_task(f"{job.recipe} {job.defense}", total=None)

            def show(p: Any, progress: Any = progress, task: Any = task, job: Any = job) -> None:
                text = f"{job.recipe} {job.defense}, loss {p.loss:.3f}"
                progress.update(task, completed=p.step, total=p.steps, description=text)

            trained = run_job(job, device=device, precision=precision, minutes=left, report=show)
        note = "complete" if trained.complete else "incomplete; the same command goes on"
        wanted = expected.get(trained.path.name)
        if wanted and trained.complete:
            note += (
                ", as the suite names it"
                if wanted == trained.sha256
                else ", NOT the suite's sha256"
            )
        _out.print(f"{escape(str(trained.path))} sha256 {trained.sha256} ({note})", highlight=False)
        unfinished += not trained.complete
    if unfinished:
        raise typer.Exit(1)
