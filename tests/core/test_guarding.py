"""Somebody else's code ends in a result or in one line naming it, whatever it does."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vlmopt.core.errors import PassError
from vlmopt.core.guarding import UNGUARDED, Owner, guarded_call
from vlmopt.core.time_limit import TimeLimit

HERE = Path(__file__)


def guarded(call: Callable[[], object], *, seconds: float = 10.0, is_import: bool = False) -> object:
    owner = Owner("drop-x", HERE)
    return guarded_call(call, place="step 2 drop-x, plan", owner=owner, time_limit_s=seconds, is_import=is_import)


def refusal(call: Callable[[], object], *, seconds: float = 10.0) -> str:
    with pytest.raises(PassError) as caught:
        guarded(call, seconds=seconds)
    text = str(caught.value)
    assert text.startswith("step 2 drop-x, plan: ")
    assert "\n" not in text
    return text.removeprefix("step 2 drop-x, plan: ")


def raising(error: BaseException) -> Callable[[], object]:
    def call() -> object:
        raise error

    return call


def line_of(function: Callable[[], object], offset: int) -> str:
    return f"({HERE}:{function.__code__.co_firstlineno + offset})"


def test_a_result_is_handed_on() -> None:
    assert guarded(lambda: 42) == 42
    assert guarded(lambda: None) is None


def test_an_error_names_the_deepest_line_of_the_plugin() -> None:
    def inner() -> object:
        return Path("/nowhere/at/all").read_text(encoding="utf-8")

    found = refusal(lambda: inner())
    assert found.startswith("raised FileNotFoundError: [Errno 2] No such file")
    assert line_of(inner, 1) in found


class _UnspeakableError(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


class _Base(BaseException):
    pass


def forever() -> object:
    return forever()


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (raising(ValueError("two\nlines")), "raised ValueError: two lines ("),
        (raising(ValueError("x" * 999)), f"raised ValueError: {'x' * 300}... ("),
        (raising(KeyError()), "raised KeyError ("),
        (raising(_UnspeakableError()), "raised _UnspeakableError ("),
        (raising(_Base("odd")), "raised _Base: odd ("),
        (raising(MemoryError()), "raised MemoryError ("),
        (raising(GeneratorExit()), "raised GeneratorExit ("),
        (lambda: sys.exit(3), "called sys.exit(3) ("),
        (lambda: sys.exit(), "called sys.exit() ("),
        (forever, "raised RecursionError: maximum recursion depth exceeded"),
        (lambda: input("name? "), "raised EOFError"),
    ],
)
def test_whatever_is_raised_becomes_one_line(call: Callable[[], object], expected: str) -> None:
    assert refusal(call).startswith(expected)


def test_a_forgotten_breakpoint_ends_at_once() -> None:
    script = """
from vlmopt.core.guarding import Owner, guarded_call
guarded_call(lambda: breakpoint(), place="plan", owner=Owner("x"))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert "PassError: plan: raised BdbQuit" in done.stderr
    assert done.stdout == ""


def test_ctrl_c_goes_through() -> None:
    with pytest.raises(KeyboardInterrupt):
        guarded(raising(KeyboardInterrupt()))


def loop() -> object:
    while True:
        pass


def loop_that_catches_errors() -> object:
    while True:
        with contextlib.suppress(Exception):
            loop()


def catch_everything_once() -> object:
    try:
        time.sleep(60)
    except BaseException:  # noqa: BLE001 - what a careless plugin does
        return "done after all"


def catch_everything_twice() -> object:
    try:
        loop()
    except BaseException:  # noqa: BLE001 - what a careless plugin does
        loop()
    return None


ENDLESS = [loop, loop_that_catches_errors, catch_everything_once, catch_everything_twice]


@pytest.mark.parametrize("call", ENDLESS)
def test_a_call_that_takes_too_long_is_ended(call: Callable[[], object]) -> None:
    start = time.monotonic()
    found = refusal(call, seconds=0.1)
    assert time.monotonic() - start < 5
    assert found.startswith("is not done after 0.1 s")
    assert found.endswith("leave the pass out, or allow more with --pass-timeout")


@pytest.mark.parametrize("call", [loop, loop_that_catches_errors, catch_everything_twice])
def test_a_call_in_another_thread_is_ended_as_well(call: Callable[[], object]) -> None:
    messages: list[str] = []
    thread = threading.Thread(target=lambda: messages.append(refusal(call, seconds=0.1)))
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert messages[0].startswith("is not done after 0.1 s")


def test_in_another_thread_no_reminder_comes_after_the_end() -> None:
    found: list[object] = []

    def many() -> None:
        for _ in range(200):
            limit = TimeLimit(1e-4)
            done = limit.run(lambda: time.sleep(1e-4))
            found.append(done.has_expired)
        time.sleep(0.05)

    thread = threading.Thread(target=many)
    thread.start()
    thread.join(20)
    assert len(found) == 200


def test_the_inner_of_two_limits_does_not_stop_the_outer_one() -> None:
    def inner() -> object:
        return guarded_call(loop, place="inner", owner=Owner("inner"), time_limit_s=60.0)

    assert refusal(inner, seconds=0.1).startswith("is not done after 0.1 s")


def test_the_inner_of_two_limits_is_named_when_it_is_the_shorter_one() -> None:
    def inner() -> object:
        return guarded_call(loop, place="inner", owner=Owner("inner"), time_limit_s=0.1)

    assert "plan, inner: is not done after 0.1 s" in str(_caught(inner))


def _caught(call: Callable[[], object]) -> PassError:
    with pytest.raises(PassError) as caught:
        guarded(call)
    return caught.value


def test_errors_of_ours_get_the_place_unless_they_name_the_pass() -> None:
    named, other = PassError("drop-x: names", "'a' matches nothing"), PassError("fact f", "is taken", remedy="rename")
    assert str(_caught(raising(named))) == "drop-x: names: 'a' matches nothing"
    assert str(_caught(raising(other))) == "step 2 drop-x, plan, fact f: is taken; rename"


def test_the_guard_can_be_switched_off_for_a_debugger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(UNGUARDED, "1")
    with pytest.raises(ZeroDivisionError):
        guarded(lambda: 1 // 0)
    monkeypatch.setenv(UNGUARDED, "0")
    assert refusal(lambda: 1 // 0).startswith("raised ZeroDivisionError")


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="this system has no signal masks")
def test_a_reminder_that_comes_when_the_call_is_over_ends_nothing() -> None:
    """Held back until the limit is gone, as where another thread would take it: the default is to end the process."""
    code = """
import signal, time
from vlmopt.core.time_limit import TimeLimit
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
done = TimeLimit(0.05).run(lambda: time.sleep(0.2))
assert signal.SIGALRM not in signal.sigpending()
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
print("alive")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "alive"), done.stderr
