"""What a pass must leave as it is in the process, read before a call and put back after it.

Random generators (Python's, NumPy's, torch's) are put back in silence, so that the run's numbers do not hang on what a
pass drew. Everything else is put back and reported: working directory, environment variables, and torch's default
dtype, gradient mode, deterministic mode and number of threads. A call that imports libraries may leave what they set in
the environment.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True)
class _Setting:
    """A setting of torch. `default` is what it is when torch is imported first during the call."""

    what: str
    read: Callable[[Any], Any]
    write: Callable[[Any, Any], object]
    default: Callable[[Any], Any] | None = None


_SETTINGS = (
    _Setting(
        "torch's default dtype",
        lambda torch: torch.get_default_dtype(),
        lambda torch, value: torch.set_default_dtype(value),
        lambda torch: torch.float32,
    ),
    _Setting(
        "torch's gradient mode",
        lambda torch: torch.is_grad_enabled(),
        lambda torch, value: torch.set_grad_enabled(value),
        lambda torch: True,
    ),
    _Setting(
        "torch's deterministic mode",
        lambda torch: torch.are_deterministic_algorithms_enabled(),
        lambda torch, value: torch.use_deterministic_algorithms(value),
        lambda torch: False,
    ),
    _Setting(
        "torch's number of threads",
        lambda torch: torch.get_num_threads(),
        lambda torch, value: torch.set_num_threads(value),
    ),
)


@dataclass(frozen=True)
class ProcessState:
    """The process at one moment."""

    folder: str | None
    environment: Mapping[str, str]
    modules: frozenset[str]
    settings: Mapping[str, Any]
    generators: Mapping[str, Any]

    @classmethod
    def now(cls) -> Self:
        torch = sys.modules.get("torch")
        settings = {s.what: s.read(torch) for s in _SETTINGS} if torch is not None else {}
        return cls(_folder(), dict(os.environ), frozenset(sys.modules), settings, _generators())

    def restore(self, *, with_environment: bool) -> tuple[str, ...]:
        """Puts everything back; returns what had changed, random generators excepted.

        Args:
            with_environment: also environment variables, unless a library was imported meanwhile.
        """
        changes = [*self._restore_folder(), *self._restore_settings()]
        if with_environment and self.modules >= sys.modules.keys():
            changes += self._restore_environment()
        _restore_generators(self.generators)
        return tuple(changes)

    def _restore_folder(self) -> list[str]:
        if self.folder is None or _folder() == self.folder:
            return []
        os.chdir(self.folder)
        return ["the working directory"]

    def _restore_environment(self) -> list[str]:
        found = dict(os.environ)
        names = sorted(
            name for name in found.keys() | self.environment.keys() if found.get(name) != self.environment.get(name)
        )
        for name in names:
            if name in self.environment:
                os.environ[name] = self.environment[name]
            else:
                del os.environ[name]
        return [f"the environment variable {name}" for name in names]

    def _restore_settings(self) -> list[str]:
        torch = sys.modules.get("torch")
        changes = []
        for setting in _SETTINGS if torch is not None else ():
            if setting.what in self.settings:
                wanted = self.settings[setting.what]
            elif setting.default is not None:
                wanted = setting.default(torch)
            else:
                continue
            found = setting.read(torch)
            if found != wanted:
                setting.write(torch, wanted)
                changes.append(f"{setting.what} from {wanted} to {found}")
        return changes


def _folder() -> str | None:
    try:
        return os.getcwd()  # noqa: PTH109 - as text, since Path.cwd() would fail alike in a folder that is gone
    except OSError:
        return None


def _generators() -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "random" in sys.modules:
        found["random"] = sys.modules["random"].getstate()
    numpy_random, torch = sys.modules.get("numpy.random"), sys.modules.get("torch")
    if numpy_random is not None:
        found["numpy"] = numpy_random.get_state()
    if torch is not None:
        found["torch"] = torch.random.get_rng_state()
        if torch.cuda.is_initialized():
            found["cuda"] = torch.cuda.get_rng_state_all()
    return found


def _restore_generators(states: Mapping[str, Any]) -> None:
    if "random" in states:
        sys.modules["random"].setstate(states["random"])
    if "numpy" in states:
        sys.modules["numpy.random"].set_state(states["numpy"])
    if "torch" in states:
        sys.modules["torch"].random.set_rng_state(states["torch"])
    if "cuda" in states:
        sys.modules["torch"].cuda.set_rng_state_all(states["cuda"])
