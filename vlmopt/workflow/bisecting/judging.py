"""Says whether a state of a run is good: by what a run itself promises, or by the user's own command."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import IO, Protocol

from vlmopt.core.contract import Promise
from vlmopt.core.errors import VlmoptError
from vlmopt.core.program import Component, Program
from vlmopt.core.workload import by_part
from vlmopt.graph.text import component_text
from vlmopt.rewrite.invariants import checksum
from vlmopt.rundir import LOG, disk_errors
from vlmopt.verify.bisection import Answer
from vlmopt.workflow.answering import program_outputs
from vlmopt.workflow.bisecting.findings import (
    CANNOT_SAY,
    GOOD,
    Fault,
    Finding,
    bad,
    broken_promise,
    cannot_run,
    failure,
    not_finite,
    other_file,
)
from vlmopt.workflow.bisecting.state_artifact import write_state
from vlmopt.workflow.bisecting.states import Done, Reached, SiteLine
from vlmopt.workflow.run_state import RunState

ARTIFACT_VARIABLE = "VLMOPT_ARTIFACT"
_NOT_RUN = (126, 127)  # what a shell exits with when it cannot run a command, or cannot find it
_VALIDATION_SAMPLES = 2048
_SPECIAL = set("$`(){}[];|&<>*?!~\\")
_GRACE_S = 5.0  # for a command to end by itself before it is killed


class Judge(Protocol):
    """Looks at one state."""

    def __call__(self, reached: Reached) -> Finding: ...


def judge_state(line: SiteLine, number: int, judge: Judge) -> Finding:
    """The answer for the state with the first `number` sites; what cannot be built or run is bad.

    Raises:
        VlmoptError: the machine is at fault (a full disk, a command that does not exist).
    """
    try:
        return judge(line.reach(number))
    except VlmoptError as error:
        if type(error) is VlmoptError:
            raise
        return failure(error)
    except (MemoryError, OSError):
        raise
    except Exception as error:  # noqa: BLE001 - whatever a broken program raises when it runs is what is looked for
        return cannot_run(error)


class PromiseJudge:
    """What a run itself checks: promises, finite outputs, emitted files, and the drop on the validation split.

    Promises are held against the program before their step, so that what one site breaks stays broken behind it.
    """

    def __init__(self, state: RunState) -> None:
        self._state = state
        self._baseline: dict[str, float] | None = None
        self._equal_files: set[object] = set()

    def __call__(self, reached: Reached) -> Finding:
        found = next((finding for done in reached.steps if (finding := self._promise(done))), None)
        feeds = self._state.sample_feeds(reached.program)
        found = found or not_finite(reached.program, feeds)
        for component in reached.program.components.values():
            found = found or self._file(reached.program, component)
        return found or self._drop(reached.program) or GOOD

    def _promise(self, done: Done) -> Finding | None:
        if done.result.promise is Promise.LOSSY:
            return None
        name = f"step {done.result.step} {done.result.name}"
        feeds = self._state.sample_feeds(done.before)
        return broken_promise(name, done.result.promise, done.before, done.result.program, feeds)

    def _file(self, program: Program, component: Component) -> Finding | None:
        recipe, key = self._state.recipe, _content(component)
        if key in self._equal_files:
            return None  # most sites leave most components as they are
        feed = self._state.sample_feeds(program)[component.name]
        folder = self._state.run.work("state")
        found = other_file(program, component, feed, folder, formats=recipe.emit, opset=recipe.opset)
        if found is None:
            self._equal_files.add(key)
        return found

    def _drop(self, program: Program) -> Finding | None:
        allowed = self._state.recipe.budgets.drop
        if allowed is None or not judges_drop(self._state):
            return None
        if self._baseline is None:
            self._baseline = self._metrics(self._state.original)
        recovery, now = self._state.recipe.recovery, self._metrics(program)
        headroom = recovery.headroom if recovery.trains else 0.0  # states are judged before training
        for part, before in self._baseline.items():
            limit, drop = allowed.resolve(100.0 * before) + headroom, 100.0 * (before - now[part])
            if drop > limit:
                of_task = f" of {part}" if part else ""
                text = f"the metric{of_task} drops by {drop:.2f} points on the validation split (allowed {limit:g})"
                return bad(Fault.DROP, text)
        return None

    def _metrics(self, program: Program) -> dict[str, float]:
        """By what a drop is taken over: one entry a task, where each is held to the bound by itself."""
        bound, recipe = self._state.bound, self._state.recipe
        assert bound is not None
        limit = min(_VALIDATION_SAMPLES, recipe.num_samples or _VALIDATION_SAMPLES)
        workload = bound.source.workload(program, "validation", limit=limit)
        outputs = program_outputs(program, workload, what="the program", progress=self._state.progress)
        return {part: float(own.mean()) for part, own in by_part(workload, workload.item_scores(outputs)).items()}


def _content(component: Component) -> tuple[object, ...]:
    """What a component's files are made from: its graph and its weights."""
    tensors = [*component.graph.named_parameters(), *component.graph.named_buffers()]
    return (component_text(component), *((name, checksum(tensor)) for name, tensor in tensors))


class CommandJudge:
    """The user's command, run on the artifact of every state: exit code 0 is good, 125 cannot say, others are bad.

    Args:
        command: for the shell; `{}` stands for the artifact's folder, which VLMOPT_ARTIFACT holds as well.

    Raises:
        VlmoptError: there is no such command.
    """

    def __init__(self, state: RunState, command: str) -> None:
        self._state, self._command = state, command
        refuse_unknown_command(command)

    def __call__(self, reached: Reached) -> Finding:
        folder = self._state.run.work("state")
        shutil.rmtree(folder)
        folder.mkdir()
        write_state(self._state, reached.program, folder)
        log = self._state.run.path(LOG)
        with disk_errors(log), log.open("a", encoding="utf-8") as stream:
            stream.write(f"--- {reached.number} sites: {self._command}\n")
            stream.flush()
            code = _run(self._command.replace("{}", shlex.quote(str(folder))), folder, stream)
            stream.write(f"--- exit code {code}\n")
        if code in _NOT_RUN:
            raise _no_command(self._command, f"the shell cannot run it (exit code {code})")
        if code == CANNOT_SAY:
            return Finding(Answer.UNKNOWN, Fault.COMMAND, f"the command exits with {CANNOT_SAY}: it cannot say")
        if code == 0:
            return GOOD
        how = f"is ended by signal {-code}" if code < 0 else f"exits with {code}"
        return bad(Fault.COMMAND, f"the check {how}{_last_words(log)}")


def _last_words(log: Path) -> str:
    """The last line that the command printed, in brackets."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    last = lines[-2] if len(lines) > 1 else "---"  # the very last is ours
    return "" if last.startswith("---") else f" ({last[:200]})"


def _run(command: str, artifact: Path, log: IO[str]) -> int:
    """The exit code of a shell command; it and all that it started end when we are interrupted."""
    environment = {**os.environ, ARTIFACT_VARIABLE: str(artifact)}
    process = subprocess.Popen(
        command,
        shell=True,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )
    try:
        return process.wait()
    except BaseException:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_S)
        raise


def judges_drop(state: RunState) -> bool:
    """Whether a recipe says how far the metric of a task may drop."""
    return state.recipe.budgets.max_drop is not None and state.bound is not None


def make_judge(state: RunState, check: str | None) -> Judge:
    """The judge that a search uses: the user's command, or what a run itself promises."""
    return PromiseJudge(state) if check is None else CommandJudge(state, check)


def refuse_unknown_command(command: str) -> None:
    """Asks the shell whether it can read the command and knows its first word, before a model is opened for it.

    Raises:
        VlmoptError: it does not.
    """
    if not command.strip():
        raise _no_command(command, "is no command")
    read = _ask_shell("-n", "-c", command)
    if read.returncode != 0:
        raise _no_command(command, f"is no shell command ({read.stderr.strip().splitlines()[-1]})")
    word = _first_word(command)
    if word is not None and _ask_shell("-c", 'command -v -- "$0"', word).returncode != 0:
        raise _no_command(command, f"there is no command {word!r}")


def _ask_shell(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["/bin/sh", *words], stdin=subprocess.DEVNULL, capture_output=True, text=True)


def _first_word(command: str) -> str | None:
    """The word behind assignments; None where only the shell itself could tell what it is."""
    for word in shlex.split(command):
        if set(word) & _SPECIAL:
            return None
        if "=" not in word:
            return word
    return None


def _no_command(command: str, found: str) -> VlmoptError:
    return VlmoptError(f"--check {command!r}", found, remedy="give a command that the shell finds")
