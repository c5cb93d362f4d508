"""`passes/README.md` is true: its blocks and commands run, in order, and its messages are those of the code."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from vlmopt.cli import entry
from vlmopt.core.contract import Promise
from vlmopt.registry import find_passes
from vlmopt.registry.scaffolding import new_files

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "passes" / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def blocks(kind: str) -> list[str]:
    return [text for found, text in BLOCKS if found == kind]


def test_the_table_names_every_pass_with_its_promise() -> None:
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| (\w+) \|", PAGE, re.MULTILINE)
    assert dict(rows) == {
        name: info.promise.value for name, info in find_passes().items() if info.origin.startswith("vlmopt ")
    }


def test_the_pass_on_the_page_is_the_one_that_new_writes() -> None:
    assert blocks("python")[0] in new_files("drop-scaling", promise=Promise.EXACT, is_package=False).values()


def test_the_list_of_verbs_is_the_one_that_new_knows(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.run(["passes", "new", "xyz-it"]) == 1
    listed = re.search(r"expected one of (.*)$", capsys.readouterr().err)
    assert listed is not None
    assert listed.group(1).strip() in " ".join(PAGE.split())


def test_the_other_blocks_of_python_run(capsys: pytest.CaptureFixture[str]) -> None:
    graph, fact = blocks("python")[1:]
    exec(compile(graph, "page", "exec"), {})
    assert "layers.0.ffn" in capsys.readouterr().out
    made: dict[str, object] = {}
    exec(compile(fact, "page", "exec"), made)
    assert "scales-dropped" in str(made["SCALES_DROPPED"])


def test_the_messages_on_the_page_are_those_of_the_code() -> None:
    folders = [ROOT / "vlmopt" / room for room in ("core", "registry", "rewrite", "recipe")]
    sources = "\n".join(file.read_text(encoding="utf-8") for folder in folders for file in folder.rglob("*.py"))
    rows = re.findall(r"^\| `([^`]+)` \| [a-z]", PAGE.split("### What refusals say")[1], re.MULTILINE)
    assert len(rows) > 15
    for message in rows:
        words = message.removeprefix("expected ").replace("returned None", "returned {kind_of(")
        assert words in sources, message


@pytest.mark.slow
def test_the_commands_on_the_page_work_in_order(tmp_path: Path, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(clip)
    installed = tmp_path / "installed"
    installed.mkdir()
    monkeypatch.syspath_prepend(installed)
    variables = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PIP_TARGET": str(installed),  # where the reader has an environment of their own
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip's spelling of "no isolation"
    }
    (recipe,) = blocks("yaml")
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(lines) > 10
    for line in lines:
        assert run(line, variables) == 0, line
    assert (tmp_path / "out" / "manifest.json").is_file()


def run(line: str, variables: Mapping[str, str]) -> int:
    program, *words = shlex.split(line)
    if program == "vlmopt":
        return entry.run(words)
    return subprocess.run([program, *words], env=variables, timeout=240).returncode
