"""`robustdeq train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.markup import escape

from robustdeq.cli.console import APP, OUT
from robustdeq.errors import UsageError, unknown


@APP.command()
def train(
    defense: Annotated[
        str | None, typer.Argument(help="A registered defense, FILE.py or FILE.py:NAME.")
    ] = None,
    out: Annotated[Path, typer.Option(help="FILE.safetensors; a folder with --suite.")] = Path(
        "weights"
    ),
    dataset: Annotated[str, typer.Option(help="A data set's name or path.")] = "digits",
    threat: Annotated[str, typer.Option(help="As in Linf:8/255.")] = "Linf:8/255",
    recipe: Annotated[
        str | None, typer.Option(help="A registered recipe, or a file's; the defense's own.")
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
    """Train a defense, or all of a suite's, and write safetensors with their metadata.

    Weights of a file's defense are then evaluated with 'robustdeq run --plugin FILE.py=WEIGHTS'.
    """
    from robustdeq.evaluation.subject import pick_device
    from robustdeq.plugin_files import located
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
        parameters = assignments(set_ or [])
        defense = located("defense", defense)
        plugin = load("defense", defense, parameters)
        named = located("recipe", recipe or plugin.recipe)
        jobs = [
            Job(
                defense=defense,
                parameters=parameters,
                dataset=dataset,
                recipe=named,
                recipe_parameters={**suited(plugin, named), **assignments(recipe_set or [])},
                threat=threat,
                seed=seed,
                out=out,
                validation=validation,
                augmentation=_one_of("augmentation", augmentation, get_args(Augmentation)),
            )
        ]
    picked = pick_device(device)
    _train_all(jobs, expected, picked, _precision(precision, picked.type), minutes)


def assignments(items: list[str]) -> dict[str, Any]:
    """KEY=VALUE pairs; values as TOML would read them, bare words as text."""
    from robustdeq.bounded import BoundError, parse_toml

    values: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals:
            raise UsageError(f"{item!r} is no assignment; write KEY=VALUE.")
        try:
            values[key.strip()] = parse_toml(f"v = {text}")["v"]
        except BoundError:
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
            OUT.print(f"{escape(str(job.out))} was not started; the same command goes on")
            unfinished += 1
            continue
        with Progress(console=OUT, disable=not OUT.is_terminal) as progress:
            task = progress.add_task(escape(job.title), total=None)

            def show(p: Any, progress: Any = progress, task: Any = task, job: Any = job) -> None:
                text = f"{escape(job.title)}, loss {p.loss:.3f}"
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
        OUT.print(f"{escape(str(trained.path))} sha256 {trained.sha256} ({note})", highlight=False)
        unfinished += not trained.complete
    if unfinished:
        raise typer.Exit(1)
