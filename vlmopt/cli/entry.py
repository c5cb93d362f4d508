"""`vlmopt`: finds the command, and turns every failure into one line and an exit code."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import click
from click.exceptions import NoSuchCommand

from vlmopt import __version__
from vlmopt.cli.settings import Settings
from vlmopt.core.errors import EXIT_ERROR, EXIT_INTERNAL, EXIT_INTERRUPTED, EXIT_OK, VlmoptError

# Commands with their lines in `vlmopt --help`, spelled out so that help imports no command (a test compares them).
COMMANDS = {
    "optimize": "Compile a model for one task into a smaller, faster, verified artifact.",
    "explain": "Show what a recipe would do: facts, plans, predicted savings and refusals.",
    "inspect": "Show a model's components and residual branches with their costs.",
    "profile": "Measure how much every branch of a model matters for a task.",
    "plan": "Choose what to cut under budgets, from profiles alone; draw the Pareto front.",
    "eval": "Evaluate a model or an artifact on a task.",
    "triples": "Make triples (question, answer, wrong answer) for tuning by preference.",
    "bisect": "Find the one edit of a recipe after which something is wrong.",
    "verify": "Check an artifact again: its files, its outputs and its metric.",
    "recheck": "Check on new data whether what was cut still holds.",
    "run": "Run an artifact on images and texts.",
    "bench": "Measure the latency of an artifact on this machine.",
    "device": "Measure what operations cost on a device, and predict what a model takes there.",
    "report": "Show the report of an artifact, or compare several.",
    "diff": "Show what differs between two runs.",
    "passes": "List and show passes, check them, or begin a new one.",
    "doctor": "Check whether this installation can do the work.",
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called, and not for `--help`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"vlmopt.cli.commands.{cmd_name}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if not args[0].startswith("-") and args[0] not in COMMANDS:
            raise NoSuchCommand(args[0], possibilities=COMMANDS, ctx=ctx)  # click looks only among imported commands
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="vlmopt")
def cli() -> None:
    """A compiler for vision-language models: keeps what one task needs, and proves it.

    \b
    Example: vlmopt optimize -m MODEL -t TASK -o OUT --max-drop 1
    """


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line and exits: 0 done, 1 error, 2 usage, 3 verified and different, 70 internal, 130 Ctrl-C."""
    code = run(args)
    if code == EXIT_INTERRUPTED:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not end in a traceback on the way out
    sys.exit(code)


def run(args: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    # Progress bars and advice of libraries would break the one-line-per-event output; the user's own setting wins.
    for name, value in (("TRANSFORMERS_VERBOSITY", "error"), ("HF_HUB_DISABLE_PROGRESS_BARS", "1")):
        os.environ.setdefault(name, value)
    settings = Settings()
    try:
        words = None if args is None else list(args)
        result = cli.main(args=words, prog_name="vlmopt", standalone_mode=False, obj=settings)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        with _without_interrupts():
            _say(f"interrupted: {_what_is_kept(settings)}")
        return EXIT_INTERRUPTED
    except VlmoptError as error:
        return _fail(settings, error.one_line(), error.exit_code)
    except OSError as error:
        return _os_error(settings, error)
    except MemoryError:
        return _fail(settings, "there is not enough memory; try a smaller --num-samples", EXIT_ERROR)
    except Exception as error:  # noqa: BLE001 - the last line of defence: one line instead of a traceback
        return _internal(settings, error)
    return result if isinstance(result, int) else EXIT_OK


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Whoever presses Ctrl-C twice gets the same one line."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _os_error(settings: Settings, error: OSError) -> int:
    from vlmopt.rundir import disk_error

    full = disk_error(error)
    return _fail(settings, full.one_line(), full.exit_code) if full is not None else _internal(settings, error)


def _internal(settings: Settings, error: Exception) -> int:
    text = " ".join(str(error).split())[:300]
    advice = "" if settings.is_debugging else "; --debug shows the traceback"
    return _fail(settings, f"internal: {type(error).__name__}: {text}{advice}", EXIT_INTERNAL)


def _fail(settings: Settings, message: str, exit_code: int) -> int:
    if settings.is_debugging:
        traceback.print_exc()
    _say(f"error: {message}")
    return exit_code


def _say(line: str) -> None:
    click.secho(line, fg="red", err=True)


def _what_is_kept(settings: Settings) -> str:
    from vlmopt.rundir import partial_path

    if settings.output is None or not partial_path(settings.output).exists():
        return "nothing was written"
    return f"finished steps are kept in {partial_path(settings.output)}; run the same command again to resume"
