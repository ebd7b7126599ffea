"""`robustdeq verify` and `submit`: what others say of a run's claims."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from robustdeq.cli.console import APP, ERR, OUT
from robustdeq.errors import UsageError

_ROWS = typer.Option(help="Rows in whose title this regular expression is found.")
_DEVICE = typer.Option(help="auto, cpu or cuda.")
_DATA = typer.Option(help="Your copy of a data set that the bundle names by a path.")
_PLUGIN = typer.Option(help="Your copy of a defense that the bundle's maker had in a file.")
_TRUST = typer.Option(
    "--trust-plugins", help="Run defenses that are not built in: code, with your rights."
)
_MINUTES = typer.Option(help="With --trust-plugins: the most that a plugin may take for a row.")
_MEMORY = typer.Option(help="With --trust-plugins: GiB of memory that a plugin may take.")


@APP.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="The folder 'bundle' of a run.")],
    reattack: Annotated[
        int, typer.Option(help="Survivors, over all rows, to attack afresh under new seeds.")
    ] = 0,
    battery: Annotated[str, typer.Option(help="The attacks of --reattack.")] = "adaptive",
    seed: Annotated[int, typer.Option(help="Chooses the survivors of --reattack.")] = 0,
    batch_size: Annotated[
        int | None, typer.Option(help="Another than the default, which divides no chunk.")
    ] = None,
    rows: Annotated[str | None, _ROWS] = None,
    device: Annotated[str, _DEVICE] = "auto",
    weights: Annotated[
        Path | None, typer.Option(help="Folder with weights that the bundle lacks.")
    ] = None,
    data: Annotated[Path | None, _DATA] = None,
    plugin: Annotated[list[str] | None, _PLUGIN] = None,
    trust_plugins: Annotated[bool, _TRUST] = False,
    minutes: Annotated[float, _MINUTES] = 30.0,
    memory: Annotated[float, _MEMORY] = 16.0,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Score a bundle's claims again from its weights and examples alone; exit 1 if one fails."""
    from robustdeq.evidence.confined import Limits
    from robustdeq.evidence.reattack import reattack as attack_again
    from robustdeq.evidence.verify import verify_bundle

    del debug
    setting = _setting(batch_size, device, weights, data, trust_plugins, plugin or [])
    limits = Limits(minutes=minutes, memory=memory)
    _warn(setting, limits)
    report = verify_bundle(bundle, rows=rows, setting=setting, limits=limits)
    _print_report(report)
    held = report.ok
    if reattack:
        again = attack_again(
            bundle, reattack, seed, battery=battery, rows=rows, setting=setting, limits=limits
        )
        _print_reattack(again)
        held = held and again.ok
    if not held:
        raise typer.Exit(1)


@APP.command()
def submit(
    path: Annotated[
        Path, typer.Argument(help="A safetensors file with x and index, or a bundle's folder.")
    ],
    run: Annotated[Path, typer.Option(help="The folder of a suite's run, as in out/digits.")],
    by: Annotated[str, typer.Option(help="Who is credited.")],
    row: Annotated[str | None, typer.Option(help="The ID of the row that a file is for.")] = None,
    rows: Annotated[str | None, _ROWS] = None,
    device: Annotated[str, _DEVICE] = "auto",
    data: Annotated[Path | None, _DATA] = None,
    plugin: Annotated[list[str] | None, _PLUGIN] = None,
    trust_plugins: Annotated[bool, _TRUST] = False,
    minutes: Annotated[float, _MINUTES] = 30.0,
    memory: Annotated[float, _MEMORY] = 16.0,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Add to a run stronger examples for one row, or the rows of a bundle, once they are scored."""
    from robustdeq.evidence.adopt import adopted
    from robustdeq.evidence.bundle import LARGEST_WEIGHTS
    from robustdeq.evidence.confined import Limits
    from robustdeq.evidence.submit import submitted
    from robustdeq.reporting.publish import publish

    del debug
    setting = _setting(None, device, None, data, trust_plugins, plugin or [])
    limits = Limits(minutes=minutes, memory=memory, file=LARGEST_WEIGHTS / 2**30)
    _warn(setting, limits)
    if path.is_dir():
        if row is not None:
            raise UsageError("--row is for a file of examples; choose a bundle's rows with --rows.")
        titles = adopted(run, path, by, rows=rows, setting=setting, limits=limits)
        for title in titles or ["nothing new"]:
            OUT.print(f"added: {escape(title)}", highlight=False)
        publish(run)
        return
    if row is None:
        raise UsageError(f"{path} is a file of examples; name the row that it is for with --row.")
    told = submitted(run, row, path, by, setting=setting, limits=limits)
    publish(run)
    _print_submission(told)


def _setting(
    batch_size: int | None,
    device: str,
    weights: Path | None,
    data: Path | None,
    trust: bool,
    plugins: list[str],
) -> Any:
    from robustdeq.evidence.rescoring import DataAt, Setting, installed
    from robustdeq.plugin_files import declared

    return Setting(
        batch_size=batch_size,
        device=device,
        weights=weights,
        data=installed if data is None else DataAt(data),
        allow_plugins=trust,
        files={name: place for text in plugins for name, place in declared(text).items()},
    )


def _warn(setting: Any, limits: Any) -> None:
    """Say what --trust-plugins means before it is done."""
    if setting.allow_plugins:
        ERR.print(
            "warning: a defense that is not built in is code, and runs with your rights; its "
            f"process has {limits.minutes:g} minutes and {limits.memory:g} GiB, which guards "
            "against accidents, not against malice.",
            style="yellow",
        )


def _print_report(report: Any) -> None:
    from robustdeq.evidence.verify import CERTIFIES

    OUT.print(f"manifest sha256 {report.sha256}", highlight=False)
    for text in report.skipped:
        OUT.print(escape(f"claims nothing: {text}"), highlight=False)
    for row in report.rows:
        OUT.print(escape(_row_line(row)), highlight=False)
        for finding in row.borderline:
            OUT.print(escape(f"  borderline: {finding}"), highlight=False)
        for note in row.notes:
            OUT.print(escape(f"  note: {note}"), highlight=False)
    for finding in report.failures:
        ERR.print(escape(str(finding)), style="red")
    if not report.rows:
        ERR.print("no row claims a robust accuracy, so that nothing was confirmed.", style="red")
    OUT.print(CERTIFIES)


def _row_line(row: Any) -> str:
    word = "fails" if row.failures else "holds"
    if row.robust_found is None:
        return f"{word}: {row.title}"
    return (
        f"{word}: {row.title}: clean {row.clean_found:.2%}, robust {row.robust_found:.2%} "
        f"(claimed {row.clean_claimed:.2%}, {row.robust_claimed:.2%}), batches of {row.batch_size}"
    )


def _print_reattack(again: Any) -> None:
    for title, count in again.attacked.items():
        fell = sum(finding.row == title for finding in again.fallen)
        OUT.print(escape(f"attacked afresh: {title}: {fell} of {count} fell"), highlight=False)
    for finding in (*again.fallen, *again.failures):
        ERR.print(escape(str(finding)), style="red")
    if again.fallen:
        ERR.print("robust accuracies are lower than claimed.", style="red")


def _print_submission(told: Any) -> None:
    OUT.print(
        escape(
            f"{told.title}: {len(told.fallen)} samples fell, robust {told.before:.2%} -> "
            f"{told.after:.2%}, credited to {told.by}"
            + (" (submitted before; nothing was changed)" if told.repeated else "")
        ),
        highlight=False,
    )
    for finding in told.refused:
        OUT.print(escape(f"  not counted: {finding}"), highlight=False)
