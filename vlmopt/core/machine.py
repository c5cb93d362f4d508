"""The machine that this runs on, and the versions of everything here that can change a number."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "transformers", "peft", "onnx", "onnxscript", "onnxruntime", "numpy")
_PROCESSORS = Path("/proc/cpuinfo")
_NAMES = ("model name", "hardware", "cpu model")  # x86, ARM boards, MIPS
_THREADS = Path("/proc/self/task")


def processor_name() -> str:
    """What the processor calls itself; its family where it does not say."""
    return _named_processor(_PROCESSORS) or platform.processor() or platform.machine() or "unknown"


def n_cores() -> int:
    """Logical cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Main memory of the machine; 0 where the system does not say."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return 0
    return max(0, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def operating_system() -> str:
    """Name and release, as in `Linux 6.8.0`."""
    return f"{platform.system()} {platform.release()}"


def n_native_threads() -> int | None:
    """Threads of this process, those of libraries included; None where the system does not say."""
    return len(list(_THREADS.iterdir())) if _THREADS.is_dir() else None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a number; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _named_processor(file: Path) -> str:
    """The name in a file such as /proc/cpuinfo; empty where there is none."""
    if not file.is_file():
        return ""
    named: dict[str, str] = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        named.setdefault(key.strip().lower(), value.strip())
    return next((named[name] for name in _NAMES if named.get(name)), "")
