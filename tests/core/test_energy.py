from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vlmopt.core.energy import COVERS, Counter, EnergyMeter, energy_meter

NOWHERE = Path("/nowhere")


def zone(root: Path, number: str, name: str, energy_uj: int, *, last: int = 1_000_000) -> Path:
    folder = root / f"intel-rapl:{number}"
    folder.mkdir()
    (folder / "name").write_text(f"{name}\n", encoding="ascii")
    (folder / "max_energy_range_uj").write_text(f"{last}\n", encoding="ascii")
    (folder / "energy_uj").write_text(f"{energy_uj}\n", encoding="ascii")
    return folder / "energy_uj"


def event(root: Path, *, kind: int, scale: str, mask: str = "0") -> Path:
    (root / "events").mkdir()
    (root / "type").write_text(f"{kind}\n", encoding="ascii")
    (root / "cpumask").write_text(f"{mask}\n", encoding="ascii")
    (root / "events" / "energy-pkg").write_text("event=0x00\n", encoding="ascii")
    (root / "events" / "energy-pkg.scale").write_text(f"{scale}\n", encoding="ascii")
    return root


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users may look into, which pytest's own is not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_joules_of_several_packages_are_summed_and_what_lies_inside_them_or_around_them_is_not(tmp_path: Path) -> None:
    first = zone(tmp_path, "0", "package-0", 100)
    core = zone(tmp_path, "0:0", "core", 100)
    second = zone(tmp_path, "1", "package-1-die-0", 5_000)
    board = zone(tmp_path, "2", "psys", 100)
    (tmp_path / "intel-rapl").mkdir()  # the driver itself, which has no counter
    meter = energy_meter(tmp_path, NOWHERE)
    assert (meter.unavailable, meter.note) == ("", COVERS)
    start = meter.start()
    for file, found in ((first, 400_100), (second, 105_000), (core, 900_000), (board, 999_999)):
        file.write_text(f"{found}\n", encoding="ascii")
    assert meter.joules_since(start) == pytest.approx(0.5, abs=1e-12)


def test_a_counter_that_started_again_has_gone_on_counting(tmp_path: Path) -> None:
    file = zone(tmp_path, "0", "package-0", 999_000, last=999_999)
    meter = energy_meter(tmp_path, NOWHERE)
    start = meter.start()
    file.write_text("1000\n", encoding="ascii")
    assert meter.joules_since(start) == pytest.approx(0.002, abs=1e-12)


def test_a_counter_that_root_alone_may_read_makes_energy_unavailable_and_says_why(open_folder: Path) -> None:
    file = zone(open_folder, "0", "package-0", 1)
    file.chmod(0o400 if os.geteuid() == 0 else 0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        meter = energy_meter(open_folder, NOWHERE)
    finally:
        os.seteuid(user)
    assert meter.unavailable == f"{file}: permission denied; no perf event power/energy-pkg/"
    assert meter.start() == ()
    assert meter.joules_since(()) is None


def test_a_machine_without_counters_is_told_in_one_line(tmp_path: Path) -> None:
    zone(tmp_path, "0", "psys", 1)
    meter = energy_meter(tmp_path, NOWHERE)
    why = f"no package in {tmp_path}; no perf event power/energy-pkg/"
    assert meter.note == f"energy is unavailable: {why}"


def test_a_counter_that_vanishes_ends_the_measuring_and_not_the_run(tmp_path: Path) -> None:
    file = zone(tmp_path, "0", "package-0", 1)
    meter = energy_meter(tmp_path, NOWHERE)
    start = meter.start()
    file.unlink()
    assert meter.joules_since(start) is None
    assert meter.unavailable == f"a counter stopped to be readable ({file}: no such file or directory)"


def test_a_counter_that_never_starts_again_may_not_be_corrected() -> None:
    values = iter((10, 30))
    meter = EnergyMeter([Counter(lambda: next(values), 0.5)])
    assert meter.joules_since(meter.start()) == 10.0


def skip_where_forbidden(meter: EnergyMeter) -> None:
    """Some kernels and sandboxes let nobody open perf events; any other reason is a fault of the reader."""
    forbidden = ("permission denied", "operation not permitted", "function not implemented", "not read on")
    if any(reason in meter.unavailable.lower() for reason in forbidden):
        pytest.skip(meter.unavailable)
    assert not meter.unavailable


def test_perf_events_are_read_where_there_is_no_powercap(tmp_path: Path) -> None:
    """The event of the clock stands for that of energy: nanoseconds of the processors, read in the same way."""
    software, processor = 1, min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    meter = energy_meter(NOWHERE, event(tmp_path, kind=software, scale="1e-9", mask=str(processor)))
    skip_where_forbidden(meter)
    start, before = meter.start(), time.perf_counter()
    time.sleep(0.05)
    found = meter.joules_since(start)
    assert found is not None
    assert 0.04 < found < 1.5 * (time.perf_counter() - before) + 0.05


def test_a_list_of_processors_opens_a_counter_for_each(tmp_path: Path) -> None:
    n = os.cpu_count() or 1
    meter = energy_meter(NOWHERE, event(tmp_path, kind=1, scale="1e-9", mask=f"0-{n - 1}" if n > 1 else "0"))
    skip_where_forbidden(meter)
    assert len(meter.start()) == n


def test_an_event_that_the_kernel_refuses_is_unavailable(tmp_path: Path) -> None:
    meter = energy_meter(NOWHERE, event(tmp_path, kind=12345, scale="1e-9"))
    assert meter.unavailable.startswith(f"no package in {NOWHERE}; perf event")
