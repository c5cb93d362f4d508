"""`vlmopt doctor`: whether this installation can do the work."""

from __future__ import annotations

import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import click

from vlmopt import __version__
from vlmopt.cli import options
from vlmopt.cli.display import show_json
from vlmopt.core.errors import EXIT_ERROR
from vlmopt.core.machine import memory_bytes, n_cores

_EXTRA_OF = {"datasets": "hub", "resvg-py": "examples", "openvino": "openvino", "executorch": "executorch"}


@dataclass(frozen=True)
class Check:
    """One line of the doctor's answer; `is_fine` is None where there is nothing to judge."""

    name: str
    found: str
    is_fine: bool | None = None
    advice: str = ""


@click.command("doctor", short_help="Check whether this installation can do the work.")
@options.as_json()
@options.common
@click.pass_context
def command(ctx: click.Context, /, *, is_json: bool) -> int:
    """Check whether this installation can do the work.

    \b
    Example: vlmopt doctor

    Exits with 1 when something that is needed is missing or outside its tested range.
    """
    checks = [*_python(), *_packages(), *_machine(), *_engines()]
    if is_json:
        show_json({"vlmopt": __version__, "checks": [asdict(check) for check in checks]})
    else:
        for check in checks:
            mark = {True: "ok", False: "BAD", None: "-"}[check.is_fine]
            advice = f"  ({check.advice})" if check.advice else ""
            click.echo(f"{mark:4} {check.name:16} {check.found}{advice}")
    return EXIT_ERROR if any(check.is_fine is False for check in checks) else 0


def _python() -> list[Check]:
    is_fine = sys.version_info >= (3, 11)
    return [
        Check("vlmopt", __version__),
        Check("python", platform.python_version(), is_fine, "" if is_fine else "vlmopt needs 3.11 or newer"),
    ]


def _packages() -> list[Check]:
    from packaging.requirements import Requirement

    try:
        every = [Requirement(text) for text in requires("vlmopt") or ()]
    except PackageNotFoundError:
        return [Check("installation", "vlmopt is not installed", False, "pip install -e .")]
    checks, needed = [], {requirement.name: requirement for requirement in reversed(every)}  # the first of each name
    for requirement in reversed(needed.values()):
        is_needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if is_needed or requirement.name in _EXTRA_OF:
            checks.append(_package(requirement.name, str(requirement.specifier), is_needed=is_needed))
    return [*checks, _torchvision()]


def _package(name: str, tested: str, *, is_needed: bool) -> Check:
    from packaging.specifiers import SpecifierSet

    try:
        found = version(name)
    except PackageNotFoundError:
        if is_needed:
            return Check(name, "is missing", False, f"pip install '{name}{tested}'")
        return Check(name, "is not installed", None, f"optional: pip install 'vlmopt[{_EXTRA_OF[name]}]'")
    is_fine = SpecifierSet(tested).contains(found, prereleases=True)
    return Check(name, found, is_fine, "" if is_fine else f"tested with {tested}")


def _torchvision() -> Check:
    try:
        return Check("torchvision", version("torchvision"), None, "not used")
    except PackageNotFoundError:
        return Check("torchvision", "is not installed", None, "not needed")


def _machine() -> list[Check]:
    checks = [Check("cores", f"{n_cores()} ({platform.machine()}, {platform.system()})")]
    memory = memory_bytes()
    if memory:
        checks.append(Check("memory", f"{memory / 2**30:.1f} GiB"))
    free = shutil.disk_usage(Path.cwd()).free
    is_enough = free > 2**30
    checks.append(Check("free disk", f"{free / 2**30:.1f} GiB", is_enough, "" if is_enough else "less than 1 GiB"))
    return checks


def _engines() -> list[Check]:
    """What torch and ONNX Runtime can compute on; both are really imported, since a broken library shows only then."""
    checks = []
    try:
        import torch

        devices = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
        checks.append(Check("CUDA", ", ".join(devices) or "none", None, "" if devices else "not needed"))
        checks.append(Check("torch threads", str(torch.get_num_threads())))
    except (ImportError, OSError, RuntimeError) as error:
        checks.append(Check("torch", f"cannot be imported: {error}", False, "reinstall torch"))
    try:
        import onnxruntime

        providers = onnxruntime.get_available_providers()
        checks.append(Check("ONNX Runtime", ", ".join(providers), "CPUExecutionProvider" in providers))
    except (ImportError, OSError, RuntimeError) as error:
        checks.append(Check("ONNX Runtime", f"cannot be imported: {error}", False, "reinstall onnxruntime"))
    return checks
