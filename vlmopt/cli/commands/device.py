"""`vlmopt device`: what operations cost on a device, measured here or there, and what a model then takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from vlmopt.cli import options
from vlmopt.cli.display import make_progress, show, show_json

F = TypeVar("F", bound=Callable[..., Any])
_SHOWN = 25  # operations in a table: the dearest


class SizeType(click.ParamType[tuple[int, int]]):
    """Height and width of images: `224`, or `224x336`."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        parts = str(value).lower().split("x")
        if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
            self.fail(f"{value!r} is no size; expected pixels as in 224 or 224x336.", param, ctx)
        return int(parts[0]), int(parts[-1])


def _graphs(function: F) -> F:
    """Which graphs are looked at."""
    for option in (
        click.option("--component", "components", multiple=True, metavar="NAME", help="Only this graph; repeatable."),
        click.option(
            "--image-size", type=SizeType(), metavar="H[xW]", help="Size of images.  [default: the processor's]"
        ),
        options.allow_pickle(),
        click.option("-m", "--model", "source", required=True, metavar="PATH", help="Model, or artifact of a run."),
    ):
        function = option(function)
    return function


def _together(function: F) -> F:
    text = "Also the operations of what `vlmopt optimize --together` may leave: int8, narrower layers, fewer tokens."
    return click.option("--together", is_flag=True, help=text)(function)


def _other_runtime(function: F) -> F:
    text = "Take times of another version of ONNX Runtime than the installed one."
    return click.option("--other-runtime", "allow_other_runtime", is_flag=True, help=text)(function)


@click.group("device", short_help="Measure what operations cost on a device, and predict what a model takes there.")
def command() -> None:
    """Measure what operations cost on a device, and predict what a model takes there.

    \b
    Example: vlmopt device profile -m MODEL -o here.json --threads 1
    """


@command.command("profile", short_help="Measure every operation of a model's graphs on this machine.")
@_graphs
@_together
@options.output("JSON file to create.", is_required=True)
@options.threads()
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Turns of every operation.")
@click.option("--update", is_flag=True, help="Add to an existing file what it lacks.")
@options.force("Replace the file.")
@options.as_json()
@options.common
@click.pass_context
def profile(ctx: click.Context, /, source: str, output: Path, *, is_json: bool, **settings: Any) -> None:
    """Measure every operation of a model's graphs on this machine, each by itself in ONNX Runtime.

    \b
    Example: vlmopt device profile -m openai/clip-vit-base-patch32 -o here.json --threads 1

    Whole graphs are timed too, and shown beside the sums of their operations.
    """
    from vlmopt import workflow

    found = workflow.profile_device(source, output, **settings, progress=make_progress(options.settings_of(ctx)))
    if is_json:
        show_json(found)
    elif options.settings_of(ctx).verbosity >= 0:
        _show_checks(found)
        show(f"written to {output}")


@command.command("export", short_help="Write a folder that measures a model's operations on another device.")
@_graphs
@_together
@options.output("Folder to create.", is_required=True)
@options.as_json()
@options.common
@click.pass_context
def export(ctx: click.Context, /, source: str, output: Path, *, is_json: bool, **settings: Any) -> None:
    """Write a folder that measures a model's operations on another device.

    \b
    Example: vlmopt device export -m openai/clip-vit-base-patch32 -o folder
             scp -r folder board: && ssh board python3 folder/measure.py --threads 1
             scp board:folder/results.json . && vlmopt device import results.json -o board.json

    The device needs Python with numpy and onnxruntime, of the version that is installed here.
    """
    from vlmopt import workflow

    found = workflow.export_operations(source, output, **settings, progress=make_progress(options.settings_of(ctx)))
    if is_json:
        show_json(found)
    elif options.settings_of(ctx).verbosity >= 0:
        show(f"{found['operations']} operations in {output}; run there: python3 measure.py")
        for name in found["left_out"]:
            show(f"left out, since it cannot stand alone: {name}")


@command.command("import", short_help="Make a profile of what was measured on another device.")
@click.argument("results", type=click.Path(path_type=Path), metavar="RESULTS.json")
@options.output("JSON file to create.", is_required=True)
@_other_runtime
@options.force("Replace the file.")
@options.as_json()
@options.common
def import_(results: Path, output: Path, *, is_json: bool, **settings: Any) -> None:
    """Make a profile of what measure.py left on another device.

    \b
    Example: vlmopt device import folder/results.json -o board.json
    """
    from vlmopt import workflow

    found = workflow.import_results(results, output, **settings)
    if is_json:
        show_json(found)
    else:
        show(f"{len(found['operations'])} operations of {found['machine']['cpu']} written to {output}")
        for name, reason in found["failed"].items():
            show(f"could not be measured there: {name}: {reason}")


@command.command("show", short_help="Show a device profile.")
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE")
@options.as_json()
@options.common
def show_profile(file: Path, *, is_json: bool) -> None:
    """Show a device profile, whichever runtime it was measured with.

    \b
    Example: vlmopt device show here.json
    """
    from vlmopt.devices.document import described, read_device_profile

    found = described(read_device_profile(file, allow_other_runtime=True))
    if is_json:
        show_json(found)
        return
    machine, runtime = found["machine"], found["runtime"]
    show(
        f"{machine['cpu']}, {machine['cores']} cores, {machine['os']}; ONNX Runtime {runtime['version']} "
        f"({runtime['provider']}), {runtime['threads']} threads; {found['created']}"
    )
    _show_checks(found)
    _show_operations(found["operations"])


@command.command("predict", short_help="Predict what a model, or a plan of cuts, takes on a device.")
@click.option("-m", "--model", required=True, metavar="MODEL", help="Model folder or hub id.")
@click.option("--profile", required=True, type=click.Path(path_type=Path), metavar="FILE", help="The device's profile.")
@click.option("--skip", "skipped", multiple=True, metavar="COMPONENT/BRANCH", help="Without this branch; repeatable.")
@click.option("--image-size", type=SizeType(), metavar="H[xW]", help="Size of images.  [default: the processor's]")
@_other_runtime
@options.allow_pickle()
@options.as_json()
@options.common
@click.pass_context
def predict(ctx: click.Context, /, model: str, profile: Path, *, is_json: bool, **settings: Any) -> None:
    """Predict what a model takes on a device, without some of its branches; nothing is timed.

    \b
    Example: vlmopt device predict -m MODEL --profile board.json --skip image_encoder/layers.11.ffn
    """
    from vlmopt import workflow

    found = workflow.predict_model(model, profile, **settings, progress=make_progress(options.settings_of(ctx)))
    if is_json:
        show_json(found)
        return
    for name, row in found["components"].items():
        show(f"{name}: {row['predicted_us'] / 1e3:.3f} ms on {found['device']}, {found['threads']} threads")


@command.command("tune", short_help="Find the fastest session options for an artifact on this machine.")
@click.argument("path", type=click.Path(path_type=Path), metavar="OUT")
@click.option("--runs", type=click.IntRange(min=1), default=40, show_default=True, help="Timed runs of each variant.")
@options.as_json()
@options.common
@click.pass_context
def tune(ctx: click.Context, /, path: Path, *, runs: int, is_json: bool) -> None:
    """Find the fastest session options for an artifact on this machine, for `vlmopt.load` and `vlmopt run` to use.

    \b
    Example: vlmopt device tune out

    Variants differ in how far ONNX Runtime optimizes the graphs and in threads; one that is slower, or computes
    something else than was recorded, is not taken. The choice lies in OUT/session.json and counts on this machine only.
    """
    from vlmopt import workflow

    found = workflow.tune_session(path, runs=runs, progress=make_progress(options.settings_of(ctx)))
    if is_json:
        show_json(found)
        return
    for name, time_us in found["times_us"].items():
        show(f"{time_us / 1e3:10.3f} ms  {name}{'  <- chosen' if name == found['chosen'] else ''}")


def _show_checks(found: Mapping[str, Any]) -> None:
    from vlmopt.report.quantities import energy

    for check in found["checks"]:
        joules = "" if check["joules"] is None else f", {energy(check['joules'])}"
        measured = f"{check['component']}: {check['measured_us']:.0f} us measured{joules}"
        alone = f"{check['n_operations']} operations alone take {check['predicted_us']:.0f} us"
        show(f"{measured}, {alone} ({100 * check['error']:+.1f} %)")
    if found["energy"]:
        show(f"{found['energy'][0].upper()}{found['energy'][1:]}.")


def _show_operations(rows: Mapping[str, Any]) -> None:
    from vlmopt.report import Table, table_renderables

    dearest = sorted(rows, key=lambda name: -rows[name]["quietest_us"])[:_SHOWN]
    cells = tuple((name, f"{rows[name]['quietest_us']:.1f}", f"{rows[name]['spread_us']:.1f}") for name in dearest)
    note = f"The dearest {len(dearest)} of {len(rows)}; spread is the median absolute deviation."
    show(*table_renderables(Table("Operations", ("operation", "us", "spread"), cells, n_text_columns=1, note=note)))
