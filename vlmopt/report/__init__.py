"""Shows what a run found. Reads JSON only, so a report can be shown without the model, its data or torch.

The page is in `vlmopt.report.html`: only who writes one pays for importing its template engine.
"""

from __future__ import annotations

from vlmopt.report.markdown import compare_markdown, render_markdown
from vlmopt.report.schema import Report, read_report
from vlmopt.report.table import Table
from vlmopt.report.tables import report_tables
from vlmopt.report.terminal import compare_terminal, render_terminal, table_renderables

__all__ = [
    "Report",
    "Table",
    "compare_markdown",
    "compare_terminal",
    "read_report",
    "render_markdown",
    "render_terminal",
    "report_tables",
    "table_renderables",
]
