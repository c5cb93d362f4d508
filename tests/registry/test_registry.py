from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vlmopt import registry
from vlmopt.core.contract import Promise
from vlmopt.core.errors import PassError

FIRST_PARTY = (
    "canonicalize", "skip-branches", "skip-layers", "fold-constants", "fold-fixed-inputs", "insert-skip-adapter",
    "insert-adaptation-adapter", "fold-skip-adapter", "fold-adapters", "insert-low-rank-adapter",
    "insert-cross-modal-adapter", "fold-cross-modal-adapter", "replace-adapter-gate",
    "insert-phantom", "drop-phantom", "freeze-first-token",
    "insert-traversal", "drop-traversal", "fold-routers", "quantize-int8", "quantize-weights",
    "fold-channel-scales",
    "prune-ffn", "prune-heads", "prune-tokens", "hoist-token-reads", "fold-keys-values",
)  # fmt: skip
GOOD = '''
"""Drops nothing.

Before: anything; after: the same.
"""
from __future__ import annotations
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal
from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Site
from vlmopt.core.facts import CANONICAL, CAPTURED, Fact
from vlmopt.core.program import Program

@dataclass(frozen=True)
class DropNothing(Pass):
    """Drops nothing at all."""

    name: ClassVar[str] = "drop-nothing"
    promise: ClassVar[Promise] = Promise.EXACT
    requires: ClassVar[frozenset[Fact]] = frozenset({CAPTURED})
    produces: ClassVar[frozenset[Fact]] = frozenset({CANONICAL})
    names: tuple[str, ...] = ()
    ratio: float = 0.5
    limit: int | None = None
    mode: Literal["soft", "hard"] = "soft"

    def plan(self, program: Program, context: Context) -> Plan:
        return Plan()

    def apply(self, program: Program, site: Site, context: Context) -> None:
        return None

    @classmethod
    def cases(cls) -> Iterable[Case]:
        return ()
'''


def folder_with(folder: Path, text: str = GOOD, name: str = "drop_nothing.py") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_a_pass_in_a_folder_is_listed_beside_the_installed_ones(tmp_path: Path) -> None:
    found = registry.find_passes([folder_with(tmp_path)])
    assert set(FIRST_PARTY) < set(found)
    info = found["drop-nothing"]
    assert (info.summary, info.promise, info.produces) == ("Drops nothing at all.", Promise.EXACT, ("canonical",))
    assert list(found) == sorted(found)


def test_producers_name_the_passes_of_every_fact(tmp_path: Path) -> None:
    found = registry.producers([folder_with(tmp_path)])["canonical"]
    assert {info.name for info in found} >= {"canonicalize", "drop-nothing"}
    assert {info.requires for info in found} == {("captured",)}


def test_listing_runs_no_code_of_a_pass(tmp_path: Path) -> None:
    folder_with(tmp_path, GOOD.replace("@dataclass", "raise SystemError('was run')\n@dataclass"))
    script = f"""
import sys
from pathlib import Path
from vlmopt.registry import find_passes
assert "drop-nothing" in find_passes([Path({str(tmp_path)!r})])
assert "torch" not in sys.modules and "vlmopt_passes.canonicalize" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_options_become_fields_of_the_right_type(tmp_path: Path) -> None:
    options = {"names": ["a", "b"], "ratio": 1, "limit": 3, "mode": "hard"}
    made = registry.make_pass("drop-nothing", options, [folder_with(tmp_path)])
    assert (made.names, made.ratio, made.limit, made.mode) == (("a", "b"), 1.0, 3, "hard")  # type: ignore[attr-defined]
    assert isinstance(made.ratio, float)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"nmaes": ["a"]}, "pass 'drop-nothing': has no option 'nmaes'; did you mean 'names'?"),
        ({"ratio": "half"}, "option 'ratio' is 'half'"),
        ({"limit": 1.5}, "expected int | None"),
        ({"limit": True}, "option 'limit' is True"),
        ({"mode": "sotf"}, "Input should be 'soft' or 'hard'"),
        ({"names": "a"}, "expected tuple[str, ...]"),
        ({"name": "other"}, "has no option 'name'; did you mean 'names'?"),
    ],
)
def test_an_option_that_does_not_fit_is_refused(tmp_path: Path, options: dict[str, object], expected: str) -> None:
    with pytest.raises(PassError) as caught:
        registry.make_pass("drop-nothing", options, [folder_with(tmp_path)])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_option_is_named(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, GOOD.replace("names: tuple[str, ...] = ()", "names: tuple[str, ...]"))
    with pytest.raises(PassError, match="needs the option 'names'; expected tuple"):
        registry.make_pass("drop-nothing", {}, [folder])


def test_what_a_pass_says_of_its_own_options_is_shown(tmp_path: Path) -> None:
    check = "\n    def __post_init__(self) -> None:\n        raise ValueError('ratio is above names')\n"
    with pytest.raises(PassError, match="refuses its options: ratio is above names"):
        registry.make_pass("drop-nothing", {}, [folder_with(tmp_path, GOOD + check)])


def test_a_pass_is_described_with_options_facts_and_specification(tmp_path: Path) -> None:
    found = registry.describe_pass("drop-nothing", [folder_with(tmp_path)])
    assert found.options == (
        registry.Option("names", "tuple[str, ...]", (), False),
        registry.Option("ratio", "float", 0.5, False),
        registry.Option("limit", "int | None", None, False),
        registry.Option("mode", "Literal['soft', 'hard']", "soft", False),
    )
    assert (found.requires, found.produces, found.breaks) == (("captured",), ("canonical",), ())
    assert found.specification.startswith("Drops nothing.\n\nBefore: anything")


def test_an_unknown_name_gets_the_closest_one(tmp_path: Path) -> None:
    with pytest.raises(PassError, match="did you mean 'skip-branches'"):
        registry.load_pass("skip-brances")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            ("requires: Class", "require: Class"),
            "public attribute 'require', which the contract does not know",
        ),
        (("    def apply", "    def aply(self) -> None: ...\n\n    def apply"), "public attribute 'aply'"),
        (("frozenset({CANONICAL})", "frozenset({Fact('new', 'x')})"), "produces the unregistered fact Fact(name='new'"),
        (
            ("from typing import", "import no_such_library\nfrom typing import"),
            "import: raised ModuleNotFoundError: No module named 'no_such_library' (line 9)",
        ),
        (("@dataclass(frozen=True)", "@dataclass"), "is no frozen dataclass"),
        (("    def plan", "    def _plan"), "has no plan"),
        (('= "drop-nothing"', '= "DropNothing"'), "is not kebab-case"),
        (('= "drop-nothing"', '= "drop-something"'), "expected the file name drop_something.py"),
        (("class DropNothing", "class Nothing"), "is called Nothing; expected DropNothing"),
        (('= "drop-nothing"', '= "drop-" + "nothing"'), "no literal name"),
        (("Promise.EXACT", "Promise.SURELY"), "makes no promise; expected `promise = ...`"),
        (("class DropNothing(Pass)", "class DropNothing(object)"), "0 passes in one file (none)"),
        (("@dataclass", "class Second(Pass): ...\n\n@dataclass"), "2 passes in one file (Second, DropNothing)"),
        (("@dataclass", "def (:\n@dataclass"), "is not Python"),
    ],
)
def test_a_pass_that_breaks_a_rule_is_refused_with_file_and_reason(
    tmp_path: Path, change: tuple[str, str], expected: str
) -> None:
    assert change[0] in GOOD
    folder = folder_with(tmp_path, GOOD.replace(*change))
    with pytest.raises(PassError) as caught:
        registry.load_pass("drop-nothing", [folder])
    assert expected in str(caught.value)
    assert str(tmp_path / "drop_nothing.py") in str(caught.value)


def test_a_second_claimant_of_a_name_is_refused(tmp_path: Path) -> None:
    first, second = folder_with(tmp_path / "a"), folder_with(tmp_path / "b")
    with pytest.raises(PassError, match=r"b/drop_nothing\.py: claims the name .*, which .*a/drop_nothing\.py"):
        registry.load_pass("drop-nothing", [first, second])
    assert "drop-nothing" not in registry.find_passes([first, second])


def test_the_same_folder_twice_is_no_second_claimant(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    assert "drop-nothing" in registry.find_passes([folder, folder])


def test_files_that_begin_with_an_underscore_are_no_passes(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "x = 1\n", name="_shared.py")
    assert "drop-nothing" in registry.find_passes([folder_with(folder)])


def test_a_pass_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(PassError, match="nowhere: is not a folder"):
        registry.find_passes([tmp_path / "nowhere"])


@pytest.mark.parametrize("name", FIRST_PARTY)
def test_every_first_party_pass_keeps_the_contract(name: str) -> None:
    described = registry.describe_pass(name)
    assert described.info.name == name
    assert described.specification
    assert described.info.produces == described.produces
