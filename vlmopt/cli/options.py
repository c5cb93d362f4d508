"""Options that several commands share, spelled the same everywhere."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from vlmopt.cli.settings import Settings
from vlmopt.core.budgets import Quantity, parse_limit
from vlmopt.core.errors import BudgetError
from vlmopt.core.formats import FORMATS
from vlmopt.core.guarding import DEFAULT_TIME_LIMIT_S
from vlmopt.core.program import AdapterSource

F = TypeVar("F", bound=Callable[..., Any])
DTYPES = ("float32", "float16", "bfloat16")
QUANTIZATIONS = ("int8", "int8-static", "8bit", "4bit", "float16")


def settings_of(ctx: click.Context) -> Settings:
    """The settings of this run, which `main` made (a command called on its own gets new ones)."""
    return ctx.ensure_object(Settings)


def _set_verbose(ctx: click.Context, _param: click.Parameter, value: int) -> None:
    if value:
        settings_of(ctx).verbosity = value
    _configure_logging(settings_of(ctx))


def _set_quiet(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value:
        settings_of(ctx).verbosity = -1
    _configure_logging(settings_of(ctx))


def _set_debug(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    settings_of(ctx).is_debugging = settings_of(ctx).is_debugging or value


def _set_output(ctx: click.Context, _param: click.Parameter, value: Path | None) -> Path | None:
    settings_of(ctx).output = value
    return value


def _configure_logging(settings: Settings) -> None:
    levels = {-1: logging.ERROR, 0: logging.WARNING, 1: logging.INFO}
    level = levels.get(settings.verbosity, logging.DEBUG)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("vlmopt").setLevel(level)
    logging.captureWarnings(True)  # warnings of libraries are for developers: shown with -v only
    logging.getLogger("py.warnings").setLevel(logging.WARNING if settings.verbosity > 0 else logging.ERROR)


def common(function: F) -> F:
    """-v, -q and --debug, which every command takes."""
    for option in (
        click.option("--debug", is_flag=True, expose_value=False, callback=_set_debug, help="Show tracebacks."),
        click.option("-q", "--quiet", is_flag=True, expose_value=False, callback=_set_quiet, help="Show errors only."),
        click.option(
            "-v", "--verbose", count=True, expose_value=False, callback=_set_verbose, help="Show more; twice: debug."
        ),
    ):
        function = option(function)
    return function


def model(*, is_required: bool) -> Callable[[F], F]:
    return click.option("-m", "--model", required=is_required, metavar="MODEL", help="Model folder or hub id.")


def task(*, is_required: bool) -> Callable[[F], F]:
    return click.option("-t", "--task", required=is_required, metavar="TASK", help="Task folder, with a task.yaml.")


def output(help_text: str, *, is_required: bool) -> Callable[[F], F]:
    return click.option(
        "-o",
        "--output",
        required=is_required,
        type=click.Path(path_type=Path),
        callback=_set_output,
        metavar="PATH",
        help=help_text,
    )


def device() -> Callable[[F], F]:
    return click.option("--device", metavar="DEVICE", help="Where torch computes: cpu, cuda, cuda:1.  [default: cpu]")


def dtype() -> Callable[[F], F]:
    return click.option("--dtype", type=click.Choice(DTYPES), help="Number format of the weights.  [default: float32]")


def seed() -> Callable[[F], F]:
    return click.option("--seed", type=click.IntRange(0, 2**32 - 1), help="Seed of everything random.  [default: 0]")


def num_samples(default: str, *, what: str = "a split") -> Callable[[F], F]:
    text = f"Take at most this many samples of {what}.  [default: {default}]"
    return click.option("--num-samples", type=click.IntRange(min=2), metavar="N", help=text)


def threads() -> Callable[[F], F]:
    text = "Threads for computing.  [default: all cores]"
    return click.option("--threads", type=click.IntRange(min=1), metavar="N", help=text)


def force(help_text: str = "Replace the output; the old one stays until the new one is complete.") -> Callable[[F], F]:
    return click.option("--force", is_flag=True, help=help_text)


def allow_pickle() -> Callable[[F], F]:
    text = "Read weights from pickle files, which can run any code when they are read."
    return click.option("--allow-pickle", is_flag=True, help=text)


def adapters() -> Callable[[F], F]:
    text = "Put an adapter on the model: peft's folder, so much of it, or a file of ours; may be repeated."
    return click.option("--adapter", "adapters", multiple=True, metavar="NAME=PATH[:WEIGHT]", help=text)


def adapter_sources(texts: Sequence[str]) -> tuple[AdapterSource, ...]:
    """What `--adapter` names."""
    from vlmopt.recipe.schema import adapter_sources as parsed

    return parsed(texts, place="--adapter")


def pass_dir() -> Callable[[F], F]:
    return click.option(
        "--pass-dir",
        "pass_dirs",
        multiple=True,
        type=click.Path(path_type=Path, file_okay=False, exists=True),
        metavar="DIR",
        help="Folder with passes of your own, one .py file each; may be repeated.",
    )


def pass_timeout() -> Callable[[F], F]:
    return click.option(
        "--pass-timeout",
        "pass_timeout_s",
        type=click.FloatRange(0, min_open=True),
        default=DEFAULT_TIME_LIMIT_S,
        show_default=True,
        metavar="SECONDS",
        help="Stop a pass that takes longer than this to import, to plan or to apply one site.",
    )


class Formats(click.ParamType[tuple[str, ...]]):
    """Names of formats, separated by commas."""

    name = "formats"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "FORMAT[,FORMAT...]"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = tuple(name.strip() for name in str(value).split(","))
        for name in names:
            if name not in FORMATS:
                self.fail(f"{name!r} is not one of {', '.join(map(repr, FORMATS))}.", param, ctx)
        return names


def _join_formats(_ctx: click.Context, _param: click.Parameter, value: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for names in value for name in names))


def quantize() -> Callable[[F], F]:
    text = (
        "After the cut: products in int8 (inputs by the range of each call, or static, found on the task), or weights"
        " of 8 bits, 4 bits or float16."
    )
    return click.option("--quantize", type=click.Choice(QUANTIZATIONS), help=text)


def together() -> Callable[[F], F]:
    text = (
        "Make one plan for all passes: at every branch whether it is cut, narrowed, or computed in fewer bits, by what"
        " that loses on the task and saves here. Adds widths, int8 and fewer tokens of an image where the recipe has"
        " none."
    )
    return click.option("--together", "is_together", is_flag=True, help=text)


def device_profile() -> Callable[[F], F]:
    text = "With --together: plan for the device of this profile (`vlmopt device profile`) and not for this machine."
    return click.option("--device-profile", metavar="FILE", help=text)


def emit() -> Callable[[F], F]:
    text = f"Formats to write ({', '.join(FORMATS)}); with commas, or repeated.  [default: onnx]"
    return click.option("--emit", multiple=True, type=Formats(), callback=_join_formats, help=text)


class BudgetType(click.ParamType[str]):
    """A budget as `vlmopt.core.budgets` reads it; handed on as it was written."""

    def __init__(self, quantity: Quantity) -> None:
        self.quantity = quantity
        self.name = quantity.value

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            parse_limit(self.quantity, value)
        except BudgetError as error:
            self.fail(f"{error.found}; expected {error.expected}.", param, ctx)
        return str(value)


def budgets(*, default_drop: str = "") -> Callable[[F], F]:
    """--max-drop, --latency, --size and --macs.

    Args:
        default_drop: what the help says of the drop where none is given.
    """
    texts = (
        (Quantity.MACS, "MACS", "Multiply-accumulates for one sample: 1.2G, or 0.5x of the original's."),
        (Quantity.SIZE, "SIZE", "Size of the graph files: 20MB, or 0.5x of the original's."),
        (Quantity.LATENCY, "TIME", "Latency in ONNX Runtime at batch 1: 5ms, or 0.5x of the original's."),
        (
            Quantity.DROP,
            "POINTS",
            f"Points of the metric that may be lost: 1, or 2% of the original's.{default_drop}",
        ),
    )

    def decorate(function: F) -> F:
        for quantity, metavar, text in texts:
            option = click.option(quantity.option, type=BudgetType(quantity), metavar=metavar, help=text)
            function = option(function)
        return function

    return decorate


def as_json() -> Callable[[F], F]:
    return click.option("--json", "is_json", is_flag=True, help="Print JSON on standard output.")


def set_threads(threads: int | None) -> None:
    """Limits torch to this many threads; imports torch only when a limit is asked for."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
