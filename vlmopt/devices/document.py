"""The device profile: how long operations take on one device, in one runtime. No torch here, and no ONNX."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from vlmopt import __version__
from vlmopt.core.errors import ProfileError
from vlmopt.devices.measure import SCHEMA

_MEASURE_AGAIN = "measure again with `vlmopt device profile -m MODEL -o FILE --force`"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DeviceMachine(_Strict):
    cpu: str
    cores: int
    os: str


class DeviceRuntime(_Strict):
    """What ran the operations. `graph` says how far graphs are optimized before their operations are named: `all` for
    those of this runtime on this machine, `extended` for those that any processor runs."""

    name: Literal["onnxruntime"]
    version: str
    provider: str
    threads: int
    graph: Literal["all", "extended"]


class OperationTime(_Strict):
    """Microseconds of one call: median of all, median of the quietest round, median absolute deviation.

    `measured` says how: `alone`, or `inside` a whole graph by the runtime's own clock, where it cannot stand alone.
    """

    median_us: float
    quietest_us: float
    spread_us: float
    n_runs: int
    measured: Literal["alone", "inside"] = "alone"


class GraphCheck(_Strict):
    """A whole graph beside the plain sum of its operations, both in microseconds of a quiet round.

    The sum is that of times measured alone, without `node_us`, which is fitted to these very graphs. `joules` are those
    of a call, None where they could not be read.
    """

    component: str
    n_operations: int
    predicted_us: float
    measured_us: float
    joules: float | None = None

    @property
    def error(self) -> float:
        """Of the sum, as a share of what was measured."""
        return self.predicted_us / self.measured_us - 1.0


class DeviceProfile(_Strict):
    """Measured times by signature of the operation."""

    schema_version: Literal[1] = 1
    kind: Literal["device"] = "device"
    vlmopt: str
    created: str
    machine: DeviceMachine
    runtime: DeviceRuntime
    clock: Literal["thread", "wall"]  # of one thread its own, which stands still while other programs have the core
    rotated_bytes: int  # weights that the copies of an operation have together: more than caches hold
    call_us: float  # of a graph without operations
    energy: str = ""  # what joules cover, or why there are none
    node_us: float = 0.0  # what an operation takes on top among others: fitted to whole graphs, 0 where none was timed
    operations: dict[str, OperationTime]
    failed: dict[str, str] = {}
    checks: tuple[GraphCheck, ...] = ()

    def to_json(self) -> str:
        return self.model_dump_json(indent=1) + "\n"

    def with_more(self, other: DeviceProfile) -> DeviceProfile:
        """This one, extended by what the other has measured; of both the other's numbers count.

        Raises:
            ProfileError: they are of different machines or runtimes, so that their times do not add up.
        """
        for what, found, wanted in (
            ("processor", self.machine.cpu, other.machine.cpu),
            ("runtime", self.runtime, other.runtime),
        ):
            if found != wanted:
                raise ProfileError("device profile", f"is of another {what}", remedy=_MEASURE_AGAIN)
        known = {signature: why for signature, why in self.failed.items() if signature not in other.operations}
        checks = {check.component: check for check in (*self.checks, *other.checks)}
        return other.model_copy(
            update={
                "operations": {**self.operations, **other.operations},
                "failed": {**known, **other.failed},
                "checks": tuple(checks.values()),
                "call_us": min(self.call_us, other.call_us),
            }
        ).fitted()

    def fitted(self) -> DeviceProfile:
        """With the `node_us` of the whole graphs measured so far: what they take beyond their sums, per operation."""
        n_operations = sum(check.n_operations for check in self.checks)
        beyond = sum(check.measured_us - check.predicted_us for check in self.checks)
        return self.model_copy(update={"node_us": max(0.0, beyond / n_operations) if n_operations else 0.0})


def read_device_profile(path: Path, *, allow_other_runtime: bool = False) -> DeviceProfile:
    """The profile in a file.

    Args:
        allow_other_runtime: take it though another version of ONNX Runtime ran it, which may fuse otherwise.

    Raises:
        ProfileError: there is none, it is no device profile of this schema, or it is of another runtime version.
    """
    data = _read(path)
    _check_schema(data, path, "schema_version")
    profile = _validated(DeviceProfile, data, path)
    if not allow_other_runtime:
        check_runtime(profile, str(path))
    return profile


def profile_of_results(found: Mapping[str, Any]) -> DeviceProfile:
    """What the runner measured, as a profile."""
    fields = {key: found[key] for key in found if key not in ("schema", "date")}
    return DeviceProfile.model_validate({**fields, "vlmopt": __version__, "created": found["date"]})


def read_results(path: Path, *, allow_other_runtime: bool = False) -> DeviceProfile:
    """The `results.json` that the runner left on a device.

    Raises:
        ProfileError: there is none, it is damaged, or another version of ONNX Runtime measured it.
    """
    data = _read(path)
    _check_schema(data, path, "schema")
    missing = [key for key in ("schema", "date") if key not in data]
    if missing:
        raise ProfileError(str(path), f"has no {missing[0]!r}", expected="a results.json that measure.py wrote")
    fields = {key: value for key, value in data.items() if key not in ("schema", "date")}
    profile = _validated(DeviceProfile, {**fields, "vlmopt": __version__, "created": data["date"]}, path)
    if not allow_other_runtime:
        check_runtime(profile, str(path))
    return profile


def described(profile: DeviceProfile) -> dict[str, Any]:
    """The profile as plain data, with the error of every check."""
    data: dict[str, Any] = profile.model_dump(mode="json")
    data["checks"] = [{**row, "error": one.error} for row, one in zip(data["checks"], profile.checks, strict=True)]
    return data


def check_runtime(profile: DeviceProfile, place: str) -> None:
    """Refuses times of another version of the runtime than the installed one, whose graphs are other graphs.

    Raises:
        ProfileError: the versions differ.
    """
    installed = metadata.version("onnxruntime")
    if profile.runtime.version != installed:
        raise ProfileError(
            place,
            f"was measured with ONNX Runtime {profile.runtime.version}",
            expected=f"{installed}, which is installed",
            remedy=f"{_MEASURE_AGAIN}, or take it as it is with --other-runtime",
        )


def _read(path: Path) -> dict[str, Any]:
    import json

    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ProfileError(
            str(path), "no such file", remedy="make one with `vlmopt device profile -m MODEL -o FILE`"
        ) from error
    except OSError as error:
        raise ProfileError(str(path), f"cannot be read ({(error.strerror or str(error)).lower()})") from error
    except ValueError as error:  # no text, or no JSON
        raise ProfileError(str(path), f"is not JSON ({error})", remedy=_MEASURE_AGAIN) from error
    if not isinstance(data, dict):
        raise ProfileError(str(path), "is not a device profile", expected="a file of `vlmopt device`")
    return data


def _check_schema(data: Mapping[str, Any], path: Path, key: str) -> None:
    if data.get(key, SCHEMA) != SCHEMA:
        raise ProfileError(
            str(path), f"has schema {data[key]}", expected=f"schema {SCHEMA} of this vlmopt", remedy=_MEASURE_AGAIN
        )


def _validated(model: type[DeviceProfile], data: Mapping[str, Any], path: Path) -> DeviceProfile:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "file"
        raise ProfileError(
            str(path), f"is not a device profile ({where}: {first['msg']})", expected="a file of `vlmopt device`"
        ) from error
