"""Energy of the processor's packages, where the machine lets it be read.

What the packages used while something ran, other processes and the idle share included: what a machine takes when it
does nothing is not known here, so nothing is taken off.

Two ways, the first that works: the kernel's powercap zones (Intel and AMD, `energy_uj`, mostly for root alone), and the
perf event `power/energy-pkg/` (where `perf_event_paranoid` allows it). Counters move about once a millisecond.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
EVENTS = Path("/sys/bus/event_source/devices/power")
COVERS = "package energy, other processes included"
_EVENT = "energy-pkg"
_OPEN_EVENT = {"x86_64": 298, "aarch64": 241}  # the number of the system call perf_event_open
_ATTRIBUTES_BYTES = 128  # of struct perf_event_attr, which may be longer than what is set of it


@dataclass(frozen=True)
class Counter:
    """A number that counts up, and starts again at 0 behind `last`; None: it never does."""

    read: Callable[[], int]
    joules_per_count: float
    last: int | None = None

    def joules(self, before: int, after: int) -> float:
        """Between two readings, less than one whole turn of the counter apart (minutes, on real ones)."""
        counts = after - before
        if counts < 0 and self.last is not None:
            counts += self.last + 1
        return counts * self.joules_per_count


class EnergyMeter:
    """Reads the counters of all packages; `unavailable` says why it cannot, and is empty where it can."""

    def __init__(self, counters: Sequence[Counter], *, unavailable: str = "") -> None:
        self._counters = tuple(counters)
        self.unavailable = unavailable

    @property
    def note(self) -> str:
        """One line on what the numbers are, or on why there are none."""
        return f"energy is unavailable: {self.unavailable}" if self.unavailable else COVERS

    def start(self) -> tuple[int, ...]:
        """A reading to measure from; empty where nothing can be read (any more)."""
        if self.unavailable:
            return ()
        try:
            return tuple(counter.read() for counter in self._counters)
        except (OSError, ValueError) as error:
            self.unavailable = f"a counter stopped to be readable ({_why(error)})"
            return ()

    def joules_since(self, start: tuple[int, ...]) -> float | None:
        """Joules of all packages since a reading; None where there is no reading of either end."""
        now = self.start()
        if not start or not now:
            return None
        return sum(one.joules(before, after) for one, before, after in zip(self._counters, start, now, strict=True))


@cache
def energy_meter(powercap: Path = POWERCAP, events: Path = EVENTS) -> EnergyMeter:
    """The meter of this machine; the folders are arguments, so that others can be read in their place."""
    reasons = []
    for counters_in, folder in ((_zones, powercap), (_events, events)):
        try:
            return EnergyMeter(counters_in(folder))
        except (OSError, ValueError) as error:
            reasons.append(_why(error))
    return EnergyMeter((), unavailable="; ".join(reasons))


def _zones(folder: Path) -> list[Counter]:
    """A counter for every package. Zones inside a package and the one of the whole board count the same joules again,
    and so does the second driver of a package (`intel-rapl-mmio`)."""
    names = sorted(folder.glob("intel-rapl:*/name"))
    found = [path.parent for path in names if path.read_text(encoding="ascii").strip().startswith("package")]
    if not found:
        raise ValueError(f"no package in {folder}")
    counters = []
    for zone in found:
        last = int((zone / "max_energy_range_uj").read_text(encoding="ascii"))
        counters.append(Counter(_reader(zone / "energy_uj"), 1e-6, last))
        counters[-1].read()
    return counters


def _reader(file: Path) -> Callable[[], int]:
    return lambda: int(file.read_text(encoding="ascii"))


def _events(folder: Path) -> list[Counter]:
    """A counter for every processor that the kernel names as one that counts for its package; these never wrap."""
    event = folder / "events" / _EVENT
    if not event.exists():
        raise ValueError(f"no perf event power/{_EVENT}/")
    kind = int((folder / "type").read_text(encoding="ascii"))
    config = int(event.read_text(encoding="ascii").strip().removeprefix("event="), 0)
    scale = float(event.with_suffix(".scale").read_text(encoding="ascii"))
    return [
        Counter(_opened(kind, config, cpu), scale)
        for cpu in _numbers((folder / "cpumask").read_text(encoding="ascii").strip())
    ]


def _numbers(text: str) -> list[int]:
    """0-2,8 -> [0, 1, 2, 8]."""
    pairs = [part.partition("-") for part in text.split(",")]
    return [number for low, _, high in pairs for number in range(int(low), int(high or low) + 1)]


def _opened(kind: int, config: int, cpu: int) -> Callable[[], int]:
    number = _OPEN_EVENT.get(platform.machine())
    if number is None:
        raise ValueError(f"perf events are not read on {platform.machine()}")
    attributes = ctypes.create_string_buffer(_ATTRIBUTES_BYTES)
    struct.pack_into("=IIQ", attributes, 0, kind, _ATTRIBUTES_BYTES, config)
    all_processes, no_group, no_flags = -1, -1, 0
    library = ctypes.CDLL(None, use_errno=True)
    descriptor = library.syscall(number, attributes, all_processes, cpu, no_group, no_flags)
    if descriptor < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), f"perf event {_EVENT}")
    stream = os.fdopen(descriptor, "rb", buffering=0)  # closed with the meter
    return lambda: int.from_bytes(stream.read(8) or b"", "little")


def _why(error: OSError | ValueError) -> str:
    if isinstance(error, OSError):
        return f"{error.filename}: {(error.strerror or str(error)).lower()}"
    return str(error)
