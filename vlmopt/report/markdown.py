"""A report as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlmopt.report.comparing import compare, comparison_tables
from vlmopt.report.naming import heading
from vlmopt.report.schema import Report, read_report
from vlmopt.report.table import Table
from vlmopt.report.tables import report_tables


def render_markdown(report: Mapping[str, object]) -> str:
    """`report.md` of a parsed `report.json`.

    Raises: ArtifactError when the report does not follow the schema.
    """
    typed = read_report(report)
    parts = [f"# {heading(typed)}", *_facts(typed)]
    parts += [f"> **Warning:** {_escaped(text)}" for text in typed.warnings]
    parts += [table_markdown(table) for table in report_tables(typed)]
    if typed.reproduce:
        parts.append(f"## Reproduce\n\n```sh\n{typed.reproduce}\n```")
    return "\n\n".join(parts) + "\n"


def compare_markdown(reports: Sequence[Mapping[str, object]], *, labels: Sequence[str] = ()) -> str:
    """What forbids to compare the runs, and a Markdown table with one row a run."""
    comparison = compare([read_report(report) for report in reports], labels)
    parts = [f"> **Warning:** {_escaped(text)}" for text in comparison.warnings]
    parts += [table_markdown(table) for table in comparison_tables(comparison)]
    return "\n\n".join(parts) + "\n"


def table_markdown(table: Table) -> str:
    """A titled Markdown table, numbers aligned to the right."""
    rules = ["---" if n < table.n_text_columns else "---:" for n in range(len(table.columns))]
    lines = [_row(table.columns), _row(rules), *(_row(row) for row in table.rows)]
    text = f"## {table.title}\n\n" + "\n".join(lines)
    return f"{text}\n\n{_escaped(table.note)}" if table.note else text


def _facts(report: Report) -> list[str]:
    model = f"- model: `{report.model.path}` ({report.model.architecture}, fingerprint {report.model.fingerprint[:12]})"
    lines = [model]
    if report.task is not None:
        task = report.task
        sizes = f"{task.n_profile} profile, {task.n_validation} validation, {task.n_test} test samples"
        facts = f"{task.kind}, {task.metric}; {sizes}; fingerprint {task.fingerprint[:12]}"
        lines.append(f"- task: {_escaped(task.name)} ({facts})")
    lines.append(f"- made by vlmopt {report.vlmopt} at {report.created}")
    return ["\n".join(lines)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_escaped(cell) for cell in cells) + " |"


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
