"""What every pass of a plan over several brought, and what would go next."""

from __future__ import annotations

from vlmopt.report.quantities import count
from vlmopt.report.schema import NextSection, Report, SavingSection
from vlmopt.report.table import Table


def savings(report: Report) -> Table:
    columns = ("pass", "sites", "time saved (us)", "size saved", "MACs saved", "lost (points)")
    found = report.together
    if found is None:
        return Table("What each kind of saving brought", columns, ())
    rows = tuple(_saving_row(one) for one in found.kinds)
    note = (
        f"One plan for all of them, {found.whole_us:.0f} us to {found.predicted_us:.0f} us as predicted. What a pass"
        " saves and loses is what the plan without it saves and loses less; they overlap, and need not add up."
    )
    note += "".join(f" Left out: {text}." for text in found.left_out)
    return Table("What each kind of saving brought", columns, rows, n_text_columns=1, note=note)


def _saving_row(one: SavingSection) -> tuple[str, ...]:
    """Pass, sites, time, size and MACs saved, points lost."""
    if not one.n_sites:
        return (one.name, "none", "", "", "", "")
    return (
        one.name,
        str(one.n_sites),
        f"{one.saved_latency or 0.0:.0f}",
        f"{count(round(one.saved_size or 0.0))}B",
        count(round(one.saved_macs or 0.0)),
        f"{one.lost_points or 0.0:.1f}",
    )


def following(report: Report) -> Table:
    columns = ("pass", "sites", "time saved (us)", "growth of the loss")
    rows = () if report.together is None else tuple(_next_row(one) for one in report.together.next)
    note = "Not taken: what would cost least for the time that it saves, as predicted."
    return Table("What would go next", columns, rows, n_text_columns=2, note=note)


def _next_row(one: NextSection) -> tuple[str, ...]:
    """Passes, the first of the sites and how many more, time saved, growth of the loss."""
    more = f" and {len(one.edits) - 1} more" if len(one.edits) > 1 else ""
    return " + ".join(one.passes), f"{one.edits[0]}{more}", f"{one.saves_us:.0f}", f"{one.loss:.4f}"
