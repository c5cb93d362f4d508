"""A fault written out as a folder that anybody can run: the program before the site, its inputs, and a script."""

from __future__ import annotations

import difflib
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pprint import pformat

from safetensors.torch import load_file, save_file
from torch import Tensor

from vlmopt.core.contract import Context, Pass, Site
from vlmopt.core.errors import OutputExistsError, VlmoptError
from vlmopt.core.guarding import DEFAULT_TIME_LIMIT_S
from vlmopt.core.program import Component, Program
from vlmopt.graph.stored import read_program, write_program
from vlmopt.graph.text import component_text
from vlmopt.recipe.loading import save_recipe
from vlmopt.recipe.schema import Recipe
from vlmopt.rundir import RECIPE, disk_errors
from vlmopt.workflow.bisecting.findings import Fault, Finding
from vlmopt.workflow.bisecting.single_site import SingleSite

SCRIPT = "case.py"
CHECKS = "checks.log"
_INPUTS = "inputs.safetensors"
_ALONE = (Fault.FAILS, Fault.PROMISE, Fault.FINITE, Fault.FILE)  # what shows without the model and the task

_HEAD = '''"""{title}

{text}

Found by `vlmopt bisect`. Exits with 1 while the fault is there, and with 0 once it is gone.
"""

import sys
from pathlib import Path

'''
_STORED = """from vlmopt.core.contract import Context, Site
from vlmopt.registry import make_pass
from vlmopt.workflow.bisecting.failing_case import read_case

HERE = Path(__file__).resolve().parent
PASS = make_pass({name!r}, {options}, {pass_dirs})
SITE = {site}
CONTEXT = Context(importance={importance}, seed={seed})

case = read_case(HERE, PASS, SITE, CONTEXT, step={step}, time_limit_s={time_limit_s:g})
found = case.judge(files={files})
"""
_REPLAYED = """from vlmopt.recipe import load_recipe
from vlmopt.workflow import judge_again

HERE = Path(__file__).resolve().parent

STEP, SITE = {step}, {site_name!r}
CHECK = {check!r}

# Needs the model and the task that recipe.yaml names: what is wrong shows only with both.
found = judge_again(load_recipe(HERE / "recipe.yaml"), step=STEP, site=SITE, check=CHECK)
"""
_TAIL = """print(found.text or "the fault is gone")
sys.exit(found.exit_code)
"""
_README = """# A failing case

{title}

{text}

`python case.py` exits with 1 while the fault is there, and with 0 once it is gone.

| file | holds |
|---|---|
{files}
"""
_FILES = {
    SCRIPT: "what is done: one site of one pass, and the check that fails",
    "before.json": "the graph just before the site, node for node",
    "before.safetensors": "its weights",
    "reference.json": "the graph before the whole step, which the promise is held against",
    "reference.safetensors": "its weights",
    _INPUTS: "inputs on which the fault shows",
    "before.txt": "the graph before the site, to read",
    "after.txt": "the graph after the site",
    "diff.txt": "what the site changed, by the names of the nodes",
    CHECKS: "what the check printed for every state",
    RECIPE: "the recipe that was searched, with the sites that were chosen",
}


@dataclass(frozen=True)
class Found:
    """A fault with all that is known about where it is. `case` is None where it shows only with model and task."""

    title: str
    finding: Finding
    recipe: Recipe  # resolved
    step: int
    pass_name: str
    options: Mapping[str, object]
    site: Site | None
    before: Program | None
    after: Program | None
    case: SingleSite | None = None
    check: str | None = None


def shows_alone(fault: Fault) -> bool:
    """Whether a fault can be shown without the model and the task."""
    return fault in _ALONE


def write_case(found: Found, folder: Path) -> bool:
    """Writes the case into the folder, which is there and empty; returns whether it needs neither model nor task."""
    is_stored = found.case is not None and _write_programs(found.case, folder)
    script = _script(found, is_stored=is_stored)
    (folder / SCRIPT).write_text(script, encoding="utf-8")
    save_recipe(found.recipe, folder / RECIPE)
    before, after = (found.before, found.after)
    if is_stored and found.case is not None:
        before, after = found.case.program, _after(found.case)
    _write_texts(before, after, None if found.site is None else found.site.component, folder)
    rows = [f"| `{name}` | {text} |" for name, text in _FILES.items() if (folder / name).is_file()]
    readme = _README.format(title=found.title, text=found.finding.text, files="\n".join(rows))
    (folder / "README.md").write_text(readme, encoding="utf-8")
    return is_stored


def read_case(
    folder: Path,
    pass_: Pass,
    site: Site | None,
    context: Context,
    *,
    step: int,
    time_limit_s: float = DEFAULT_TIME_LIMIT_S,
) -> SingleSite:
    """The case that a folder holds."""
    feeds: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(folder / _INPUTS).items():
        component, _, name = key.partition("|")
        feeds.setdefault(component, {})[name] = value.clone()  # aligned as in the search
    program = read_program(folder, name="before")
    reference = read_program(folder, name="reference") if (folder / "reference.json").is_file() else None
    return SingleSite(program, feeds, pass_, step, site, context, reference, time_limit_s)


def publish_case(partial: Path, target: Path | None, pass_name: str, *, force: bool) -> Path:
    """Gives a written case its final name, in one step; without a target the first free of `bisect-PASS`.

    Raises:
        OutputExistsError: the target exists and must not be replaced.
    """
    final = target or _free(Path(f"bisect-{pass_name}"))
    with disk_errors(final):
        refuse_existing_case(final, force=force)
        final.parent.mkdir(parents=True, exist_ok=True)
        replaced = final.with_name(f".{final.name}.{os.getpid()}.old")
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
        if replaced.exists():
            shutil.rmtree(replaced)
    return final


def refuse_existing_case(target: Path, *, force: bool) -> None:
    """Only a case of ours or an empty folder is ever replaced."""
    if not target.exists() and not target.is_symlink():
        return
    if not force:
        raise OutputExistsError(str(target), "exists already", remedy="choose another path, or --force replaces it")
    is_ours = target.is_dir() and ((target / SCRIPT).is_file() or not any(target.iterdir()))
    if not is_ours or target.is_symlink():
        found = f"is no failing case (it holds no {SCRIPT}), so --force does not replace it"
        raise OutputExistsError(str(target), found, remedy="choose another path")


def _free(wanted: Path) -> Path:
    path, count = wanted, 1
    while path.exists() or path.is_symlink():
        count += 1
        path = wanted.with_name(f"{wanted.name}-{count}")
    return path


def _write_programs(case: SingleSite, folder: Path) -> bool:
    """Writes what the script reads, and makes sure that it still fails when it is read back."""
    fault = case.judge(files=True).fault
    try:
        write_program(case.program, folder, name="before")
        if case.reference is not None:
            write_program(case.reference, folder, name="reference")
        flat = {
            f"{part}|{key}": value.clone().contiguous()
            for part, feed in case.feeds.items()
            for key, value in feed.items()
        }
        save_file(flat, folder / _INPUTS)
        read = read_case(folder, case.pass_, case.site, case.context, step=case.step, time_limit_s=case.time_limit_s)
        if read.judge(files=fault is Fault.FILE).fault is fault:
            return True
    except VlmoptError:  # a plugin's own module, say, which has no notation: the case is replayed from the recipe
        pass
    for path in list(folder.iterdir()):
        path.unlink()
    return False


def _script(found: Found, *, is_stored: bool) -> str:
    head = _HEAD.format(title=found.title, text=found.finding.text.replace("\\", "\\\\").replace('"""', "'''"))
    if not is_stored:
        site_name = None if found.site is None else found.site.name
        return head + _REPLAYED.format(step=found.step, site_name=site_name, check=found.check) + _TAIL
    assert found.case is not None
    site, context = found.site, found.case.context
    words = "None"
    if site is not None:
        words = f"Site(\n    {site.name!r},\n    {site.component!r},\n    {site.target!r},\n)"
    body = _STORED.format(
        name=found.pass_name,
        options=pformat(dict(found.options), width=100),
        pass_dirs="[" + ", ".join(f"Path({folder!r})" for folder in found.recipe.pass_dirs) + "]",
        site=words,
        importance=pformat(dict(context.importance), width=100),
        seed=context.seed,
        step=found.step,
        time_limit_s=found.case.time_limit_s,
        files=found.finding.fault is Fault.FILE,
    )
    return head + body + _TAIL


def _after(case: SingleSite) -> Program | None:
    try:
        return case.apply()
    except VlmoptError:
        return None


def _write_texts(before: Program | None, after: Program | None, component: str | None, folder: Path) -> None:
    texts = {"before": _text(before, component), "after": _text(after, component)}
    for name, text in texts.items():
        if text:
            (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    if texts["before"] and texts["after"]:
        old, new = _named_text(before, component), _named_text(after, component)
        lines = difflib.unified_diff(old, new, "before", "after", lineterm="")
        (folder / "diff.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _parts(program: Program | None, component: str | None) -> list[Component]:
    """The component that the site is in; all of them where there is no site, or the site took it away."""
    if program is None:
        return []
    if component in program.components:
        return [program.components[component]]
    return list(program.components.values())


def _text(program: Program | None, component: str | None) -> str:
    return "\n".join(component_text(part) for part in _parts(program, component))


def _named_text(program: Program | None, component: str | None) -> list[str]:
    """The text with names in place of numbers: a removed node must not renumber all lines behind it."""
    lines: list[str] = []
    for part in _parts(program, component):
        names = [node.name for node in part.graph.graph.nodes]
        text = component_text(part)
        lines += re.sub(r"%(\d+)", lambda number: f"%{names[int(number[1])]}", text).splitlines()  # noqa: B023
    return lines
