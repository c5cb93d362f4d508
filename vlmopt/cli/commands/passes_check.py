"""`vlmopt passes check`: holds a pass to everything it claims."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vlmopt.cli import options
from vlmopt.cli.display import make_progress, show_json
from vlmopt.core.errors import EXIT_DIFFERENT, EXIT_OK

if TYPE_CHECKING:
    from vlmopt.core.progress import Progress
    from vlmopt.testing import CheckResult, PassReport, Settings

_TIME_LIMIT_S = 60.0


@click.command("check", short_help="Check that a pass keeps its word.")
@click.argument("name", metavar="NAME|FILE", required=False)
@options.pass_dir()
@click.option(
    "--golden",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Compare the graphs of every case with the texts in this folder.",
)
@click.option("--update-golden", "is_updating", is_flag=True, help="Write the texts of --golden anew before comparing.")
@click.option("--check", "checks", multiple=True, metavar="CHECK", help="Make this check only; may be repeated.")
@click.option("--list-checks", "is_listing", is_flag=True, help="List all checks with what they hold a pass to.")
@options.seed()
@click.option(
    "--time-limit",
    "--pass-timeout",
    "time_limit_s",
    type=click.FloatRange(0, min_open=True),
    default=_TIME_LIMIT_S,
    show_default=True,
    metavar="SECONDS",
    help="For one call of the pass: its import, its plan, one site, one case.",
)
@options.as_json()
@options.common
@click.pass_context
def check(
    ctx: click.Context,
    name: str | None,
    pass_dirs: tuple[Path, ...],
    *,
    golden: Path | None,
    is_updating: bool,
    checks: tuple[str, ...],
    is_listing: bool,
    seed: int | None,
    time_limit_s: float,
    is_json: bool,
) -> int:
    """Check that a pass keeps its word: every claim of it, on its own cases and on small random programs.

    \b
    Example: vlmopt passes check skip-branches
             vlmopt passes check my_passes/drop_scaling.py --check keeps-its-promise

    Exit code 0: every check passed; 3: one failed; 1: the pass cannot be loaded.
    """
    if is_listing:
        return _list_checks(is_json=is_json)
    if name is None:
        raise click.UsageError("Missing argument 'NAME|FILE'.")
    if is_updating and golden is None:
        raise click.UsageError("--update-golden needs --golden DIR.")
    from vlmopt.testing import Settings

    settings = Settings(seed=seed or 0, time_limit_s=time_limit_s, golden=golden)
    progress = make_progress(options.settings_of(ctx))
    report = _report(name, pass_dirs, checks, settings, progress, is_updating=is_updating, is_quiet=is_json)
    if is_json:
        show_json(_as_json(report))
    else:
        _show_end(report)
    return EXIT_OK if report.passed else EXIT_DIFFERENT


def _report(
    name: str,
    pass_dirs: Sequence[Path],
    checks: Sequence[str],
    settings: Settings,
    progress: Progress,
    *,
    is_updating: bool,
    is_quiet: bool,
) -> PassReport:
    """Makes the checks; shows each as it is done, unless it is to be quiet."""
    from vlmopt.testing.golden import update_golden
    from vlmopt.testing.harness import results_of, select, subject_of
    from vlmopt.testing.results import PassReport

    start = time.perf_counter()
    chosen = select(checks)
    subject = subject_of(name, pass_dirs=pass_dirs, settings=settings)
    if is_updating and settings.golden is not None:
        for path in update_golden(subject, settings.golden):
            progress.message(f"golden text {'written' if path.exists() else 'removed'}: {path}")
    results: list[CheckResult] = []
    for made in progress.track(chosen, f"checking {subject.name}"):
        found = list(results_of(made, subject))
        results += found
        if not is_quiet:
            _show_check(made.name, found)
    return PassReport(subject.name, tuple(results), time.perf_counter() - start)


def _list_checks(*, is_json: bool) -> int:
    from vlmopt.testing import CHECKS

    if is_json:
        show_json({"checks": [{"name": made.name, "description": made.description} for made in CHECKS]})
        return EXIT_OK
    width = max(len(made.name) for made in CHECKS)
    for made in CHECKS:
        click.echo(f"{made.name:{width}}  {made.description}")
    return EXIT_OK


def _show_check(name: str, results: Sequence[CheckResult]) -> None:
    """One line for a check; below it one for every case on which it failed."""
    from vlmopt.testing import Verdict

    verdicts = [result.verdict for result in results]
    if Verdict.FAILED in verdicts:
        click.secho(f"{'failed':8}{name}", fg="red")
    elif Verdict.NOT_RUN in verdicts:
        click.secho(f"{'not run':8}{name}", fg="yellow")
    elif Verdict.PASSED in verdicts:
        n_passed, n_cases = verdicts.count(Verdict.PASSED), len(verdicts)
        n = f"  ({n_cases if n_passed == n_cases else f'{n_passed} of {n_cases}'} cases)" if n_cases > 1 else ""
        click.echo(f"{'passed':8}{name}{n}")
    else:
        reason = results[0].found if results else "there are no cases"
        click.secho(f"{'-':8}{name}  ({reason})", dim=True)
    for result in results:
        if not result.is_fine:
            _show_failure(result)


def _show_failure(result: CheckResult) -> None:
    case = f"case {result.case!r}: " if result.case else ""
    click.echo(f"{'':8}{case}{result.found}")
    for label, text in (("expected", result.expected), ("remedy", result.remedy)):
        if text:
            click.echo(f"{'':10}{label}: {text}")


def _show_end(report: PassReport) -> None:
    from vlmopt.testing import Verdict

    made = {result.check for result in report.results}
    bad = {result.check for result in report.results if not result.is_fine}
    passed = {result.check for result in report.results if result.verdict is Verdict.PASSED} - bad
    took = f"({report.seconds:.1f} s)"
    if bad:
        click.secho(f"{report.name}: {len(bad)} of {len(made)} checks failed or could not be made {took}", fg="red")
        return
    n_others = len(made) - len(passed)
    others = f", {n_others} {'does' if n_others == 1 else 'do'} not apply" if n_others else ""
    click.secho(f"{report.name} keeps its word: {len(passed)} checks passed{others} {took}", fg="green")


def _as_json(report: PassReport) -> dict[str, object]:
    return {
        "name": report.name,
        "passed": report.passed,
        "seconds": round(report.seconds, 3),
        "results": [
            {
                "check": result.check,
                "case": result.case,
                "verdict": result.verdict.value,
                "found": result.found,
                "expected": result.expected,
                "remedy": result.remedy,
            }
            for result in report.results
        ],
    }
