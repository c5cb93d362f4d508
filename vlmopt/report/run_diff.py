"""What differs between two runs: recipes, sites, branches, cost, latency, quality, gates, files and machines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmopt.core.errors import ArtifactError
from vlmopt.core.manifest import read_manifest
from vlmopt.recipe.yaml_file import read_yaml
from vlmopt.report.graph_diff import graph_diffs
from vlmopt.report.quantities import percents
from vlmopt.report.schema import PassSection, Report, read_report
from vlmopt.rundir import MANIFEST, RECIPE, REPORT_JSON, partial_path

Row = dict[str, Any]  # `what` differs: its value in each run, None where a run has none


def diff_runs(first: Path, second: Path, *, graphs: bool = False) -> dict[str, Any]:
    """The differences between two run folders, section by section; a folder that failed a gate will do.

    Args:
        graphs: compare the text of the final graphs as well.

    Raises:
        ArtifactError: one of them is no folder with a report.
    """
    folders = (first, second)
    a, b = reports = tuple(read_run(folder) for folder in folders)
    sections: dict[str, list[Row]] = {
        "model and task": differing(_subject(a), _subject(b)),
        "recipe": differing(*(_recipe(folder) for folder in folders)),
        "sites": _sites(reports),
        "branches": differing(*({f"{x.component}/{x.name}": _kept(x.kept) for x in r.branches} for r in reports)),
        "mixtures": differing(
            *({f"{x.component}/{x.layer}": f"{percents(x.shares)} %" for x in r.mixtures} for r in reports)
        ),
        "gates": differing(*({gate.name: _verdict(gate.passed) for gate in r.gates} for r in reports)),
        "cost": differing(*(_cost(report) for report in reports)),
        "files": differing(*(_files(folder) for folder in folders)),
        "environment": differing(*(_environment(report) for report in reports)),
    }
    result: dict[str, Any] = {"runs": [str(folder) for folder in folders], "differences": sections}
    result["quality"] = _quality(reports)
    result["latency_ms"] = _latency(reports)
    if graphs:
        result["graphs"] = graph_diffs(first, second)
    return result


def read_run(folder: Path) -> Report:
    """The report of a run folder.

    Raises:
        ArtifactError: there is none; it says where the report of a failed run lies.
    """
    file = folder / REPORT_JSON
    if not file.is_file():
        failed = partial_path(folder.absolute()) / REPORT_JSON
        remedy = f"the run failed a gate: its report is in {failed.parent}" if failed.is_file() else ""
        found = f"has no {REPORT_JSON}" if folder.is_dir() else "is no folder"
        raise ArtifactError(str(folder), found, expected="a folder that `vlmopt optimize` wrote", remedy=remedy)
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(str(file), f"is not JSON: {error}") from error
    return read_report(data, place=str(file))


def differing(first: Mapping[str, object], second: Mapping[str, object]) -> list[Row]:
    """One row for every key whose values differ, in the order of the first mapping and then of the second."""
    keys = dict.fromkeys([*first, *second])
    return [
        {"what": key, "first": first.get(key), "second": second.get(key)}
        for key in keys
        if first.get(key) != second.get(key)
    ]


def _subject(report: Report) -> dict[str, object]:
    task = report.task
    found: dict[str, object] = {"model": report.model.path, "weights": report.model.fingerprint[:12]}
    if task is not None:
        found |= {
            "task": task.name,
            "kind": task.kind,
            "samples": task.fingerprint[:12],
            "metric": task.metric,
            "test items": task.n_test,
        }
    return found


def _recipe(folder: Path) -> dict[str, object]:
    file = folder / RECIPE
    return dict(_flat(read_yaml(file))) if file.is_file() else {}


def _flat(value: Any, above: str = "") -> Iterator[tuple[str, object]]:
    """Values by dotted key; a pass of the recipe is named by its place and name, its options by theirs."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{above}.{key}" if above else str(key))
    elif above == "passes" and isinstance(value, Sequence):
        for number, step in enumerate(value, 1):
            name, options = next(iter(step.items())) if isinstance(step, Mapping) else (step, {})
            yield f"passes.{number}", name
            for key, inner in (options or {}).items():
                yield f"passes.{number}.{key}", inner
    else:
        yield above, value


def _sites(reports: Sequence[Report]) -> list[Row]:
    """Sites that only one of the runs applied, by the pass that did."""
    names = [{name: _names(step) for name, step in _steps(report).items()} for report in reports]
    rows: list[Row] = []
    for step in dict.fromkeys([*names[0], *names[1]]):
        a, b = names[0].get(step), names[1].get(step)
        if a is None or b is None:
            rows.append({"what": step, "first": _count(a), "second": _count(b)})
            continue
        rows += [{"what": f"{step}: {site}", "first": "applied", "second": None} for site in a if site not in b]
        rows += [{"what": f"{step}: {site}", "first": None, "second": "applied"} for site in b if site not in a]
    return rows


def _steps(report: Report) -> dict[str, PassSection]:
    """Steps by the name of their pass, and by its count where a pass comes again."""
    steps: dict[str, PassSection] = {}
    for step in report.passes:
        count = sum(other.name == step.name for other in steps.values())
        steps[step.name if not count else f"{step.name} ({count + 1})"] = step
    return steps


def _names(step: PassSection) -> list[str]:
    return [site.name for site in step.sites]


def _count(sites: Sequence[str] | None) -> str | None:
    return None if sites is None else f"{len(sites)} site{'s' * (len(sites) != 1)}"


def _kept(is_kept: object) -> str:
    return "kept" if is_kept else "cut"


def _verdict(has_passed: object) -> str:
    return "passed" if has_passed else "FAILED"


def _cost(report: Report) -> dict[str, object]:
    found = {f"original {key}": n for key, n in report.result.cost.original.model_dump().items()}
    found |= report.result.cost.optimized.model_dump()
    if report.result.size_bytes is not None:
        found["file_bytes"] = report.result.size_bytes.optimized
    return found


def _files(folder: Path) -> dict[str, object]:
    """Hashes of what a runtime reads: graphs and processor files, but not the evidence about them."""
    if not (folder / MANIFEST).is_file():
        return {}
    files = read_manifest(folder).files
    evidence = (".work/", "report.", RECIPE, "profile.json")
    return {name: entry.sha256[:12] for name, entry in files.items() if not name.startswith(evidence)}


def _environment(report: Report) -> dict[str, object]:
    found: dict[str, object] = {"vlmopt": report.vlmopt}
    if report.machine is not None:
        found |= report.machine.model_dump(exclude={"versions"}) | report.machine.versions
    return found


def _quality(reports: Sequence[Report]) -> list[Row]:
    """The metric of every run with its interval, for the original and the artifact."""
    rows: list[Row] = []
    for side in ("original", "optimized"):
        values = []
        for report in reports:
            metric = report.result.metric
            interval = f"{side}_interval95"
            values.append(
                None if metric is None else {"value": getattr(metric, side), "interval95": getattr(metric, interval)}
            )
        name = next((r.result.metric.name for r in reports if r.result.metric is not None), "metric")
        if any(value is not None for value in values):
            rows.append({"what": f"{name}, {side}", "first": values[0], "second": values[1]})
    drops = [
        None if (m := report.result.metric) is None else {"value": m.drop_points, "interval95": m.drop_interval95}
        for report in reports
    ]
    if any(drop is not None for drop in drops):
        rows.append({"what": "drop in points", "first": drops[0], "second": drops[1]})
    return rows


def _latency(reports: Sequence[Report]) -> list[Row]:
    rows: list[Row] = []
    for name in dict.fromkeys(name for report in reports for name in report.result.latency_ms):
        values = []
        for report in reports:
            pair = report.result.latency_ms.get(name)
            found = None if pair is None else pair.optimized
            values.append(None if found is None else found.model_dump(include={"median_ms", "p10_ms", "p90_ms"}))
        rows.append({"what": name, "first": values[0], "second": values[1]})
    return rows
