"""A report for the terminal, as a Rich renderable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from vlmopt.report.comparing import compare, comparison_tables
from vlmopt.report.naming import heading
from vlmopt.report.schema import read_report
from vlmopt.report.table import Table
from vlmopt.report.tables import report_tables

_STYLES = {"FAILED": "bold red", "passed": "green", "cut": "red"}


def render_terminal(report: Mapping[str, object]) -> Group:
    """What a person reads at the end of a run.

    Raises: ArtifactError when the report does not follow the schema.
    """
    typed = read_report(report)
    parts: list[RenderableType] = [Text(heading(typed), style="bold")]
    for table in report_tables(typed):
        parts += [Text(""), *table_renderables(table)]
    parts += [Text(f"warning: {text}", style="yellow") for text in typed.warnings]
    if typed.reproduce:
        parts.append(Text(f"\nreproduce: {typed.reproduce}"))
    return Group(*parts)


def compare_terminal(reports: Sequence[Mapping[str, object]], *, labels: Sequence[str] = ()) -> Group:
    """What forbids to compare the runs, and one row a run."""
    comparison = compare([read_report(report) for report in reports], labels)
    parts: list[RenderableType] = [Text(f"warning: {text}", style="yellow") for text in comparison.warnings]
    for table in comparison_tables(comparison):
        parts += table_renderables(table)
    return Group(*parts)


def table_renderables(table: Table) -> list[RenderableType]:
    """A Rich table with its note below."""
    shown = RichTable(title=table.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(table.columns):
        is_text = index < table.n_text_columns
        shown.add_column(column, justify="left" if is_text else "right", overflow="fold")
    for row in table.rows:
        shown.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    return [shown, Text(table.note, style="dim")] if table.note else [shown]
