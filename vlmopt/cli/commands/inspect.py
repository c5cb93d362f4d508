"""`vlmopt inspect`: what a model is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from vlmopt.cli import options
from vlmopt.cli.display import make_progress, show, show_json


@click.command("inspect", short_help="Show a model's components and residual branches with their costs.")
@click.argument("model", metavar="MODEL")
@options.task(is_required=False)
@click.option("--weights", "with_weights", is_flag=True, help="Load the weights too; otherwise config.json is enough.")
@click.option("--device", default="cpu", show_default=True, help="Where torch computes: cpu, cuda, cuda:1.")
@click.option("--dtype", type=click.Choice(options.DTYPES), default="float32", show_default=True, help="Number format.")
@options.allow_pickle()
@options.as_json()
@options.common
@click.pass_context
def command(
    ctx: click.Context,
    /,
    model: str,
    task: str | None,
    *,
    with_weights: bool,
    device: str,
    dtype: str,
    allow_pickle: bool,
    is_json: bool,
) -> None:
    """Show a model's components and residual branches with their costs.

    \b
    Example: vlmopt inspect openai/clip-vit-base-patch32

    The names of the branches are those that recipes and passes take.
    """
    from vlmopt import workflow

    found = workflow.inspect_model(
        model,
        task=task,
        device=device,
        dtype=dtype,
        allow_pickle=allow_pickle,
        with_weights=with_weights,
        progress=make_progress(options.settings_of(ctx)),
    )
    if is_json:
        show_json(_brief(found))
        return
    _show(model, found)


def _brief(found: Mapping[str, Any]) -> dict[str, Any]:
    """What programs read: the assembly, and the branches of every component with their costs."""
    keys = ("name", "kind", "layer", "params", "macs")
    components = {
        name: {"branches": [{key: branch[key] for key in keys} for branch in component["branches"]]}
        for name, component in found["components"].items()
    }
    return {"assembly": found["assembly"], "components": components}


def _show(model: str, found: Mapping[str, Any]) -> None:
    from vlmopt.report import Table, table_renderables
    from vlmopt.report.tables import count

    show(f"{model}: assembly {found['assembly']}")
    for name, component in found["components"].items():
        rows = tuple(
            (b["name"], b["kind"], "" if b["layer"] is None else str(b["layer"]), count(b["params"]), count(b["macs"]))
            for b in component["branches"]
        )
        table = Table(
            name, ("branch", "kind", "layer", "parameters", "MACs"), rows, n_text_columns=2, note=_note(component)
        )
        show(*table_renderables(table))


def _note(component: Mapping[str, Any]) -> str:
    from vlmopt.report.tables import count

    branches = component["branches"]
    facts = [f"{len(branches)} branches in {len({b['layer'] for b in branches})} layers"]
    labels = {"params": "parameters", "macs": "MACs for one sample", "activation_bytes": "bytes of activations"}
    facts += [f"{count(component[key])} {label}" for key, label in labels.items() if component.get(key) is not None]
    return ", ".join(facts) + "."
