"""A report, or several beside each other, as one HTML file that needs nothing else: no network, no fonts, no scripts.

Everything that a report says is text for the templates, which escape it; only pictures drawn by this room are markup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import jinja2
from markupsafe import Markup

from vlmopt.report import charts, naming, quantities, sections
from vlmopt.report.branch_picture import branch_pictures
from vlmopt.report.comparing import compare, comparison_plot, comparison_tables
from vlmopt.report.front import front_plot, front_table
from vlmopt.report.savings import following, savings
from vlmopt.report.schema import Report, read_report
from vlmopt.report.summary import summarize


def render_html(report: Mapping[str, object]) -> str:
    """`report.html` of a parsed `report.json`.

    Raises: ArtifactError when the report does not follow the schema.
    """
    typed = read_report(report)
    return _environment().get_template("report.html").render(
        report=typed,
        title=naming.heading(typed),
        summary=summarize(typed),
        pictures=_pictures(typed),
        metric_plots=charts.metric_plots(typed),
        metric_rows=sections.metric_rows(typed),
        cost_rows=sections.cost_rows(typed),
        latency_plots=charts.latency_plots(typed),
        traversal_plot=charts.traversal_plot(typed),
        mixture_plots=charts.mixture_plots(typed),
        through_plots=charts.through_plots(typed),
        trial_plot=charts.trial_plot(typed),
        planned=[table for table in (savings(typed), following(typed)) if table.rows],
        trial_front=charts.trial_front(typed),
        chosen_trial=charts.chosen_trial(typed),
        ledger=sections.ledger(typed),
        groups=sections.group_rows(typed),
        cards=sections.item_cards(typed),
        facts=sections.facts(typed),
    )  # fmt: skip


def compare_html(reports: Sequence[Mapping[str, object]], *, labels: Sequence[str] = ()) -> str:
    """A page with one row a run, a picture of all of them, and the branches that each keeps.

    Raises: ArtifactError when a report does not follow the schema.
    """
    comparison = compare([read_report(report) for report in reports], labels)
    return _environment().get_template("comparison.html").render(
        title=f"Comparison of {quantities.plural(len(reports), 'run')}",
        comparison=comparison,
        table=comparison_tables(comparison)[0],
        plot=comparison_plot(comparison),
        headings=[naming.heading(run.report) for run in comparison.runs],
    )  # fmt: skip


def front_html(front: Mapping[str, Any]) -> str:
    """The page of a front, as `vlmopt plan --front` computes it."""
    return _environment().get_template("front.html").render(
        title=f"What {', '.join(front['tasks'])} needs of {front['model']}",
        front=front,
        plot=front_plot(front),
        table=front_table(front),
    )  # fmt: skip


def _pictures(report: Report) -> list[tuple[str, Markup]]:
    return [(picture.component, Markup(picture.svg)) for picture in branch_pictures(report)]


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vlmopt.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bytes": quantities.byte_size,
        "count": quantities.count,
        "duration": quantities.duration,
        "value": quantities.value_text,
        "points": quantities.drop_text,
        "component": naming.component_words,
    }
    environment.globals["plural"] = quantities.plural
    return environment
