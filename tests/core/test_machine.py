"""Facts about the machine, against what the system's own tools say."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from vlmopt.core import machine


def test_the_processor_is_called_by_its_own_name_or_by_its_family(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpuinfo"
    monkeypatch.setattr(machine, "_PROCESSORS", file)
    family = machine.processor_name()
    assert family
    file.write_text("processor\t: 0\nmodel name\t: First 3000 @ 2 GHz\n\nprocessor\t: 1\nmodel name\t: Second\n")
    assert machine.processor_name() == "First 3000 @ 2 GHz"
    file.write_text("processor\t: 0\nBogoMIPS\t: 50.0\n\nHardware\t: BCM2711\n")
    assert machine.processor_name() == "BCM2711"
    file.write_bytes(b"model name\t: \nFeatures: \xff\xfe\n")
    assert machine.processor_name() == family


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system does not bind processes to cores")
def test_only_cores_that_the_process_may_use_are_counted() -> None:
    bind = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
    code = f"{bind}; from vlmopt.core import machine; print(machine.n_cores())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "1\n"
    assert machine.n_cores() == len(os.sched_getaffinity(0))


@pytest.mark.skipif(not Path("/proc/meminfo").is_file(), reason="needs /proc")
def test_memory_is_what_the_kernel_says() -> None:
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    assert machine.memory_bytes() == 1024 * int(line.split()[1])


def test_a_system_that_does_not_tell_its_memory_or_threads_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf_names", {})
    monkeypatch.setattr(machine, "_THREADS", Path("/nowhere"))
    assert machine.memory_bytes() == 0
    assert machine.n_native_threads() is None


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc")
def test_a_thread_more_is_a_thread_more() -> None:
    before, go = machine.n_native_threads(), threading.Event()
    thread = threading.Thread(target=go.wait)
    thread.start()
    assert machine.n_native_threads() == (before or 0) + 1
    go.set()
    thread.join()


def test_versions_leave_out_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PACKAGES", ("numpy", "no-such-package-here"))
    import numpy

    assert machine.versions() == {"python": sys.version.split()[0], "numpy": numpy.__version__}
