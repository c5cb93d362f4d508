"""Whatever a plugin does wrong ends in one line that names it and the step."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.plugins.writing import APPLY, CASES, IMPORT, PLAN, before, write_pass
from vlmopt.core.errors import PassError
from vlmopt.registry import build_case, cases_of, find_broken, find_passes, instantiate, load_pass
from vlmopt.rewrite.pipeline import run_step

Change = tuple[str, str]


def refusal(file: Path, *, time_limit_s: float = 30.0) -> str:
    """What is said of the plugin when its first case is run as step 2 of a recipe."""
    with pytest.raises(PassError) as caught:
        pass_class = load_pass(str(file), time_limit_s=time_limit_s)
        case = cases_of(pass_class, time_limit_s=time_limit_s)[0]
        program = build_case(pass_class, case, time_limit_s=time_limit_s)
        run_step(program, instantiate(pass_class, case.options), case.context, step=2, time_limit_s=time_limit_s)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_the_plugin_that_the_faults_are_planted_in_is_good(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        refusal(write_pass(tmp_path))


PRODUCES_BREAKS = """    produces: ClassVar[frozenset[Fact]] = requires
    breaks: ClassVar[frozenset[Fact]] = requires

"""
RUNNING = [
    (before(PLAN, "raise KeyError('lost')"), "step 2 drop-scaling, plan: raised KeyError: 'lost' ("),
    (before(APPLY, "raise KeyError('lost')"), "step 2 drop-scaling, apply model/mul: raised KeyError: 'lost' ("),
    (before(CASES, "raise KeyError('lost')"), "pass drop-scaling, cases: raised KeyError: 'lost' ("),
    (before(PLAN, "import sys", "sys.exit(0)"), "step 2 drop-scaling, plan: called sys.exit(0) ("),
    (before(APPLY, "raise SystemExit"), "step 2 drop-scaling, apply model/mul: called sys.exit() ("),
    (before(PLAN, "print('a site!')"), "step 2 drop-scaling, plan: printed 'a site!'; expected no output"),
    (before(APPLY, "print('a site!')"), "step 2 drop-scaling, apply model/mul: printed 'a site!'"),
    (before(CASES, "print('a case!')"), "pass drop-scaling, cases: printed 'a case!'"),
    (before(PLAN, "while True: pass"), "step 2 drop-scaling, plan: is not done after 1 s ("),
    (before(APPLY, "while True: pass"), "step 2 drop-scaling, apply model/mul: is not done after 1 s ("),
    (before(CASES, "while True: pass"), "pass drop-scaling, cases: is not done after 1 s ("),
    (before(PLAN, "torch.set_grad_enabled(False)"), "step 2 drop-scaling, plan: changed torch's gradient mode"),
    (
        ("return Plan(tuple(sites), tuple(refusals))", "return None"),
        "step 2 drop-scaling, plan: returned None; expected a Plan",
    ),
    (
        ("return Plan(tuple(sites), tuple(refusals))", "return Plan(tuple(site.name for site in sites))"),
        "step 2 drop-scaling, plan: sites: hold a str; expected Site",
    ),
    (
        ("return Plan(tuple(sites), tuple(refusals))", "return Plan((*sites, *sites))"),
        "step 2 drop-scaling, plan: plans two sites named model/mul",
    ),
    (
        ("Site(key, name, (node.name,), saving)", "Site(key, 'vision', (node.name,), saving)"),
        "step 2 drop-scaling, plan: sites: model/mul is in the component 'vision'; expected one of model",
    ),
    (
        ("Site(key, name, (node.name,), saving)", "Site(key, name, (node,), saving)"),
        "step 2 drop-scaling, plan: site model/mul has the target (mul,); expected a tuple of names",
    ),
    (
        before(APPLY, "program.labels = ('a',)"),
        "step 2 drop-scaling: changed the program's labels; expected changes_signature = True",
    ),
    (
        before(
            APPLY,
            "from dataclasses import replace",
            "part = program.components[site.component]",
            "outputs = (replace(part.outputs[0], name='scores'),)",
            "program.components[site.component] = replace(part, outputs=outputs)",
        ),
        "step 2 drop-scaling: changed the signature of model",
    ),
    (
        before(
            APPLY,
            "out = program.components[site.component].graph.graph.output_node()",
            "out.args = ((out.args[0][0], out.args[0][0]),)",
        ),
        "step 2 drop-scaling, component model: the graph returns 2 values; expected 1",
    ),
]


def label(value: object) -> str:
    return value[:60] if isinstance(value, str) else ""


@pytest.mark.parametrize(("change", "expected"), RUNNING, ids=label)
def test_a_plugin_that_goes_wrong_while_it_runs_is_named_with_the_step(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], change: Change, expected: str
) -> None:
    file = write_pass(tmp_path, change)
    found = refusal(file, time_limit_s=1.0 if "not done" in expected else 30.0)
    assert found.startswith(expected)
    if expected.endswith("("):
        line = file.read_text(encoding="utf-8").split(change[1])[0].count("\n") + 1
        assert f"{file}:" in found
        assert abs(int(found.split(f"{file}:")[1].split(")")[0]) - line) <= 1
    assert capfd.readouterr() == ("", "")


ALIAS = (
    before(
        APPLY,
        "out = program.components[site.component].graph.graph.output_node()",
        "out.args = ((next(iter(out.graph.nodes)),),)",
    ),
    ("    def plan", "    changes_signature: ClassVar[bool] = True\n\n    def plan"),
)
SELF_WEIGHT = "        self.weight = torch.nn.Parameter(torch.ones(4))\n"
WEIGHT = (
    before(APPLY, "program.components[site.component].graph.weight.data += 1"),
    (
        "        self.factor = factor\n",
        "        self.factor = factor\n        self.weight = torch.nn.Parameter(torch.ones(4))\n",
    ),
    ("torch.relu(x * self.factor)", "torch.relu(x * self.factor + self.weight)"),
)


def test_a_plugin_that_writes_a_weight_is_caught(tmp_path: Path) -> None:
    assert refusal(write_pass(tmp_path, *WEIGHT)).startswith("step 2 drop-scaling: wrote tensor model/weight in place")


def test_a_plugin_that_makes_an_output_of_an_input_is_caught(tmp_path: Path) -> None:
    expected = "step 2 drop-scaling, component model: an output is the input x; expected outputs that alias nothing"
    assert refusal(write_pass(tmp_path, *ALIAS)).startswith(expected)


IMPORTING = [
    (before(IMPORT, "raise RuntimeError('no')", indent=0), "import: raised RuntimeError: no (line 14)"),
    (before(IMPORT, "import sys; sys.exit('bye')", indent=0), "import: called sys.exit(bye) (line 14)"),
    (before(IMPORT, "while True: pass", indent=0), "import: is not done after 2 s (line 14)"),
    (before(IMPORT, "print('hello')", indent=0), "import: printed 'hello'; expected no output"),
    (
        ("import CAPTURED, Fact", "import CAPTURD, Fact"),
        "import: vlmopt.core.facts has no 'CAPTURD' (line 21); did you mean 'CAPTURED'?",
    ),
    (
        ("frozenset({CAPTURED})", "frozenset({'captred'})"),
        "requires the unregistered fact 'captred'; did you mean 'captured'?",
    ),
    (
        ("frozenset({CAPTURED})", "frozenset({Fact('captured', 'anything')})"),
        "requires the fact 'captured' with another meaning than the registered one",
    ),
    (("= frozenset({CAPTURED})", "= CAPTURED"), "expected a frozenset of facts: frozenset({CAPTURED})"),
    (
        ("requires: ClassVar[frozenset[Fact]]", "produces = breaks = requires: ClassVar[frozenset[Fact]]"),
        "is not Python: ",
    ),
    (
        ("    def plan", f"{PRODUCES_BREAKS}    def plan"),
        "produces and breaks 'captured'; expected one of the two",
    ),
    (
        ("    def plan", "    changes_signature: ClassVar[bool] = 1\n\n    def plan"),
        "changes_signature is 1; expected True",
    ),
    (
        ("    def plan", "    promise: Promise = Promise.EXACT\n\n    def plan"),
        "the option 'promise' has the name of a part",
    ),
    (
        ("class _Copy", "DropScaling.promise = Promise.LOSSY\n\n\nclass _Copy"),
        "promise is Promise.LOSSY once it is imported; expected what its class body says",
    ),
    (
        ("class _Copy", "_Other = type('_Other', (DropScaling,), {})\n\n\nclass _Copy"),
        "2 passes in one file (DropScaling, _Other)",
    ),
    (
        ("class _Copy", "class _Other(DropScaling):\n    pass\n\n\nclass _Copy"),
        "2 passes in one file (DropScaling, _Other); expected one class that inherits from Pass",
    ),
    (('"drop-scaling"\n', '"drop-scaling" + ""\n'), "the pass has no literal name"),
    (
        ('needs_vlmopt: ClassVar[str] = ">=0.1,<0.2"', 'needs_vlmopt: ClassVar[str] = ">=7"'),
        "is for vlmopt >=7, and this is",
    ),
    (('= ">=0.1,<0.2"', '= "new"'), "needs_vlmopt is 'new'; expected versions such as"),
    (('= ">=0.1,<0.2"', "= str(1)"), "needs_vlmopt is no literal text"),
]


@pytest.mark.parametrize(("change", "expected"), IMPORTING, ids=label)
def test_a_plugin_that_breaks_a_rule_is_refused_with_its_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], change: Change, expected: str
) -> None:
    file = write_pass(tmp_path, change)
    for _ in range(2):  # the second time as well: a failed import must not pass as done
        found = refusal(file, time_limit_s=2.0 if "not done" in expected else 30.0)
        assert found.startswith(str(file))
        assert expected in found
    assert capfd.readouterr() == ("", "")


def test_the_base_class_may_be_imported_under_another_name(tmp_path: Path) -> None:
    change = ("import Case, Context, Pass, Plan", "import Case, Context, Pass as Base, Plan")
    file = write_pass(tmp_path, change, ("(Pass):", "(Base):"))
    assert load_pass(str(file)).name == "drop-scaling"


def test_two_passes_that_hide_behind_another_name_of_the_base_class_are_found(tmp_path: Path) -> None:
    change = ("import Case, Context, Pass, Plan", "import Case, Context, Pass as Base, Plan")
    other = ("class _Copy", "class Other(Base):\n    pass\n\n\nclass _Copy")
    file = write_pass(tmp_path, change, ("(Pass):", "(Base):"), other)
    assert "2 passes in one file (DropScaling, Other)" in refusal(file)


def test_a_fact_registered_twice_with_other_meanings_names_the_second_file(tmp_path: Path) -> None:
    register = "from vlmopt.core.facts import register_fact\nMADE = register_fact('made-for-a-test', '{}')"
    first = write_pass(tmp_path / "a", before(IMPORT, *register.format("one thing").split("\n"), indent=0))
    second = write_pass(tmp_path / "b", before(IMPORT, *register.format("another").split("\n"), indent=0))
    load_pass(str(first))
    expected = f"{second}, import, fact made-for-a-test: is registered already as 'one thing'"
    assert refusal(second).startswith(expected)


def test_a_file_that_was_corrected_is_imported_anew(tmp_path: Path) -> None:
    file = write_pass(tmp_path, before(IMPORT, "raise RuntimeError", indent=0))
    assert "RuntimeError" in refusal(file)
    assert load_pass(str(write_pass(tmp_path))).name == "drop-scaling"


def test_a_faulty_file_in_a_folder_is_set_aside_and_the_others_work(tmp_path: Path) -> None:
    write_pass(tmp_path, ("Promise.EXACT", "Promise.MAYBE"))
    (tmp_path / "no_python.py").write_text("def (:\n")
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "test_drop_scaling.py").write_text("def (:\n")
    assert "canonicalize" in find_passes([tmp_path])
    assert [entry.name for entry in find_broken([tmp_path])] == ["binary", "drop-scaling", "no-python"]
    with pytest.raises(PassError, match=r"drop_scaling\.py: the pass makes no promise"):
        load_pass("drop-scaling", [tmp_path])
    with pytest.raises(PassError, match=r"did you mean 'canonicalize'\? \(3 more cannot be used: `vlmopt passes list`"):
        load_pass("canonicalise", [tmp_path])


def test_a_file_is_a_pass_wherever_it_lies_and_an_installed_one_is_itself(tmp_path: Path) -> None:
    assert load_pass(str(write_pass(tmp_path))).__module__.startswith("_vlmopt_pass_")
    own = Path(__file__).parents[2] / "passes" / "canonicalize.py"
    assert load_pass(str(own)) is load_pass("canonicalize")
    with pytest.raises(PassError, match=r"nowhere\.py: there is no such file"):
        load_pass(str(tmp_path / "nowhere.py"))


POST_INIT = "    def __post_init__(self) -> None:\n        {}\n\n    def plan"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("raise KeyError('x')", "pass 'drop-scaling', options: raised KeyError: 'x' ("),
        ("raise ValueError('too large')", "pass 'drop-scaling': refuses its options: too large"),
        ("print('made')", "pass 'drop-scaling', options: printed 'made'"),
    ],
)
def test_a_plugin_that_goes_wrong_with_its_options_is_named(tmp_path: Path, line: str, expected: str) -> None:
    assert refusal(write_pass(tmp_path, ("    def plan", POST_INIT.format(line)))).startswith(expected)


CASE_FAULTS = [
    ("yield 3", "cases: hold a int; expected a Case"),
    ("yield Case('', lambda: None, 1)", "the case has no name"),
    ("yield Case('a', lambda: None, -1)", "n_sites is -1"),
    ("yield Case('a', lambda: None, 1, 'text')", "refusals is 'text'; expected a tuple of reasons"),
    ("yield Case('a', None, 1)", "build is None; expected a function"),
    ("yield Case('by one', lambda: None, 1)", "two are named 'by one'"),
    ("yield Case('a', lambda: None, 1)", "case 'a', build: gave a NoneType; expected a Program"),
    ("yield Case('a', lambda: 1 // 0, 1)", "case 'a', build: raised ZeroDivisionError"),
]


@pytest.mark.parametrize(("line", "expected"), CASE_FAULTS)
def test_cases_that_are_none_are_refused(tmp_path: Path, line: str, expected: str) -> None:
    found = refusal(write_pass(tmp_path, before(CASES, line)))
    assert found.startswith("pass drop-scaling, ")
    assert expected in found
