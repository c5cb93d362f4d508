"""The Pareto front of a plan: as a table, and as a page or a picture that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from vlmopt.report import plots
from vlmopt.report.quantities import count
from vlmopt.report.table import Table

_WORDS = {"macs": ("saved MACs", "MACs"), "latency": ("saved latency", "latency")}
# What page.css and colours.css say of a plot, for a picture that stands alone.
_STYLE = """
svg.plot{background:#fff;font:12px system-ui,sans-serif}
svg.plot .grid{stroke:#dde}svg.plot .front{stroke:#667;stroke-width:1.5}
svg.plot text{fill:#445}svg.plot .dot{fill:#246bb2}svg.plot .whisker{stroke:#246bb2;stroke-width:2}
"""


def front_table(front: Mapping[str, Any]) -> Table:
    """A row a cut of the front."""
    has_drop = any(point["drop_points"] is not None for point in front["points"])
    rows = []
    for point in front["points"]:
        loss = f"{point['loss']:.4f}" + ("" if point["loss_error"] is None else f" ± {point['loss_error']:.4f}")
        saved = [_saved(point, resource) for resource in _resources(front)]
        drop = [] if not has_drop else ["" if point["drop_points"] is None else f"{point['drop_points']:.2f}"]
        rows.append((str(point["n_cut"]), *saved, loss, *drop))
    columns = ("sites cut", *(_heading(name) for name in _resources(front)), f"predicted {front['unit']}")
    note = "Each cut is the one of least predicted loss that saves so much; nothing is measured on the task here."
    return Table(
        f"Front for {', '.join(front['tasks'])}",
        (*columns, *(("predicted drop (points)",) if has_drop else ())),
        tuple(rows),
        n_text_columns=0,
        note=note,
    )


def front_plot(front: Mapping[str, Any]) -> Markup:
    """What is saved against the predicted loss."""
    resource = front["resource"]
    has_share = all(point["saves"][resource]["share"] is not None for point in front["points"])
    dots, line = [], []
    for point in front["points"]:
        saves = point["saves"][resource]
        x = 100 * saves["share"] if has_share else saves["saved"] / 1e6
        error = point["loss_error"]
        spread = "" if error is None else f" ± {error:.2g}"
        title = f"{point['n_cut']} cut, saves {_saved(point, resource)}, predicted {front['unit']} {point['loss']:.3g}"
        low, high = (None, None) if error is None else (point["loss"] - error, point["loss"] + error)
        dots.append(plots.Dot(x, point["loss"], title + spread, "after", low, high))
        line.append((x, point["loss"]))
    words = _WORDS[resource][0]
    return plots.scatter_plot(
        dots,
        title=f"front of {words} and predicted {front['unit']}",
        x_label=words if has_share else f"{words} (millions)",
        y_label=f"predicted {front['unit']}",
        x_unit=" %" if has_share else "",
        front=line,
    )


def front_svg(front: Mapping[str, Any]) -> str:
    """The picture as a file of its own."""
    opening = '<svg class="plot" role="img"'
    alone = '<svg xmlns="http://www.w3.org/2000/svg" class="plot" viewBox="0 0 720 300" role="img"'
    picture = str(front_plot(front)).replace(opening, alone, 1).replace('width="100%"', 'width="720"', 1)
    start = picture.index(">") + 1
    return f"{picture[:start]}<style>{_STYLE}</style>{picture[start:]}\n"


def _resources(front: Mapping[str, Any]) -> list[str]:
    return list(front["points"][0]["saves"]) if front["points"] else []


def _heading(resource: str) -> str:
    return {"macs": "MACs saved", "latency": "latency saved (us)", "size": "bytes saved"}[resource]


def _saved(point: Mapping[str, Any], resource: str) -> str:
    found = point["saves"][resource]
    share = "" if found["share"] is None else f" ({100 * found['share']:.0f} %)"
    return f"{count(found['saved'])}{share}"
