"""A guarded call prints nothing for the user to see, and leaves the process as it was."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.core.test_guarding import guarded, refusal

say = print  # the linter wants no prints in tests, and these are about printing


def print_behind_the_back() -> None:
    sys.__stdout__.write("hello from behind\n")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: say("hello\nthere"), "printed 'hello'"),
        (lambda: say("\n\n  late"), "printed 'late'"),
        (lambda: say(), "printed ''"),
        (lambda: say("x" * 200), f"printed '{'x' * 80}...'"),
        (lambda: say("to err", file=sys.stderr), "printed 'to err'"),
        (lambda: sys.stderr.writelines(["a line"]), "printed 'a line'"),
        (lambda: sys.stdout.buffer.write(b"bytes"), "printed 'bytes'"),
        (lambda: os.write(1, b"descriptor\n"), "printed 'descriptor'"),
        (lambda: os.system("echo child"), "printed 'child'"),
        (print_behind_the_back, "printed 'hello from behind'"),
    ],
)
def test_a_call_that_prints_is_refused_and_nothing_is_seen(
    call: Callable[[], object], expected: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert refusal(call).startswith(f"{expected}; expected no output; ")
    assert capfd.readouterr() == ("", "")


def test_what_a_call_printed_before_it_failed_is_not_seen_either(capfd: pytest.CaptureFixture[str]) -> None:
    def call() -> None:
        say("about to fail")
        raise ValueError("failed")

    assert refusal(call).startswith("raised ValueError: failed")
    assert capfd.readouterr() == ("", "")


def test_warnings_and_log_records_are_no_prints() -> None:
    script = """
import logging, warnings
from vlmopt.core.guarding import Owner, guarded_call

def call():
    warnings.warn("old", DeprecationWarning)
    logging.getLogger("of.a.library").warning("careful")
    return "done"

print(guarded_call(call, place="plan", owner=Owner("x")))
"""
    done = subprocess.run([sys.executable, "-W", "always", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "done\n"
    assert "DeprecationWarning: old" in done.stderr
    assert "careful" in done.stderr


def test_a_thread_that_ran_before_prints_as_ever(capfd: pytest.CaptureFixture[str]) -> None:
    go, done = threading.Event(), threading.Event()

    def display() -> None:
        go.wait(10)
        say("3 of 7 done", file=sys.stderr)
        done.set()

    thread = threading.Thread(target=display)
    thread.start()

    def call() -> bool:
        go.set()
        return done.wait(10)

    assert guarded(call) is True
    thread.join(10)
    assert capfd.readouterr().err == "3 of 7 done\n"


def test_printing_works_again_afterwards(capfd: pytest.CaptureFixture[str]) -> None:
    streams = sys.stdin, sys.stdout, sys.stderr
    refusal(lambda: say("hidden"))
    assert (sys.stdin, sys.stdout, sys.stderr) == streams
    say("shown")
    os.write(1, b"shown too\n")
    sys.stdout.flush()
    assert set(capfd.readouterr().out.split("\n")) == {"shown", "shown too", ""}


@contextlib.contextmanager
def timer(handler: Callable[[int, object], None], *times: float) -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, *times)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_timer_that_was_set_before_goes_on() -> None:
    rung: list[int] = []

    def ring(number: int, _: object) -> None:
        rung.append(number)

    def wait() -> None:
        threading.Event().wait(0.3)

    with timer(ring, 0.1, 0.05):
        guarded(wait)
        assert rung  # during the call
        assert signal.getsignal(signal.SIGALRM) is ring
        assert signal.getitimer(signal.ITIMER_REAL)[1] == pytest.approx(0.05)
    with timer(ring, 30.0):
        guarded(wait)
        assert 29 < signal.getitimer(signal.ITIMER_REAL)[0] < 30


def test_what_an_outer_timer_raises_is_not_the_plugins_fault() -> None:
    def ring(*_: object) -> None:
        raise TimeoutError("of somebody else")

    with timer(ring, 0.1), pytest.raises(TimeoutError, match="of somebody else"):
        guarded(lambda: threading.Event().wait(10))


def test_ctrl_c_interrupts_a_call() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            guarded(lambda: os.kill(os.getpid(), signal.SIGINT) or threading.Event().wait(10))
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: os.chdir("/"), "changed the working directory"),
        (lambda: os.environ.update(VLMOPT_TEST="1"), "changed the environment variable VLMOPT_TEST"),
        (lambda: os.environ.pop("PATH") and None, "changed the environment variable PATH"),
        (
            lambda: torch.set_default_dtype(torch.float64),
            "changed torch's default dtype from torch.float32",
        ),
        (lambda: torch.set_grad_enabled(False) and None, "changed torch's gradient mode from True to False"),
        (lambda: torch.use_deterministic_algorithms(True), "changed torch's deterministic mode from False to True"),
        (lambda: torch.set_num_threads(3), "changed torch's number of threads from 1 to 3"),
    ],
)
def test_a_call_that_changes_the_process_is_refused_and_undone(call: Callable[[], object], expected: str) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(False)  # imports libraries the first time, which set variables
    before = state()
    assert refusal(call).startswith(f"{expected}")
    assert state() == before


def state() -> object:
    settings = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
    return settings, torch.are_deterministic_algorithms_enabled(), dict(os.environ), Path.cwd()


def test_random_generators_are_put_back_in_silence() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(1))

    torch.manual_seed(0)
    first = draw()
    states = random.getstate(), torch.random.get_rng_state()
    assert guarded(draw) != first
    assert random.getstate() == states[0]
    assert torch.equal(torch.random.get_rng_state(), states[1])
    assert guarded(draw) == guarded(draw)


def test_an_import_may_set_what_it_needs_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLMOPT_TEST", raising=False)
    guarded(lambda: os.environ.update(VLMOPT_TEST="1"), is_import=True)
    assert os.environ.pop("VLMOPT_TEST") == "1"
