"""`vlmopt inspect`: what a model is made of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
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
@options.adapters()
@click.option(
    "--graph",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Draw the model into this file; its ending says how: .html, .svg or .dot (Graphviz).",
)
@click.option(
    "--level",
    type=click.Choice(("branch", "node")),
    help="What to draw: residual branches, or every operation.  [default: branch]",
)
@click.option("--component", metavar="NAME", help="Draw this component only.  [default: all]")
@click.option(
    "--profile",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Colour branches by the importance that `vlmopt profile` measured.  [default: by their share of MACs]",
)
@options.force("Replace the file of --graph.")
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
    adapters: tuple[str, ...],
    graph: Path | None,
    level: str | None,
    component: str | None,
    profile: Path | None,
    force: bool,
    is_json: bool,
) -> None:
    """Show a model's components and residual branches with their costs.

    \b
    Examples: vlmopt inspect openai/clip-vit-base-patch32
              vlmopt inspect openai/clip-vit-base-patch32 --graph branches.html
              vlmopt inspect models/clip --graph operations.svg --level node --component image_encoder

    The names of the branches are those that recipes and passes take.
    """
    _refuse_without_graph(graph, level=level, component=component, profile=profile, force=force or None)
    from vlmopt import workflow
    from vlmopt.workflow.picturing import Picture

    picture = None if graph is None else Picture(graph, level or "branch", component, profile, force)
    found = workflow.inspect_model(
        model,
        task=task,
        device=device,
        dtype=dtype,
        allow_pickle=allow_pickle,
        adapters=options.adapter_sources(adapters),
        with_weights=with_weights,
        picture=picture,
        progress=make_progress(options.settings_of(ctx)),
    )
    if is_json:
        show_json(_brief(found))
    else:
        _show(model, found)
    if graph is not None and options.settings_of(ctx).verbosity >= 0:
        click.echo(f"drawn in {graph}", err=True)


def _refuse_without_graph(graph: Path | None, **given: object) -> None:
    """Options of the picture say nothing without one."""
    names = [f"--{name}" for name, value in given.items() if value is not None]
    if graph is None and names:
        raise click.UsageError(f"{names[0]} needs --graph FILE, the picture that it is about")


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
