"""The pipeline applies, measures and judges; every invariant catches a pass that breaks it."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import pytest
import torch

from tests.rewrite import bad_passes as bad
from tests.rewrite.bad_passes import DeclaresSignature, DoAnything, PlanAnything
from vlmopt.core.contract import Context, Pass, Plan, Refusal, Site
from vlmopt.core.errors import GateError, PassError
from vlmopt.core.program import Program
from vlmopt.graph.branches import find_branches
from vlmopt.graph.canonical import drop_dead_nodes
from vlmopt.graph.example import ResidualBlocks, program_of
from vlmopt.graph.regions import skip_branch
from vlmopt.registry import make_pass
from vlmopt.rewrite.invariants import checksum
from vlmopt.rewrite.pipeline import Observer, StepResult, program_text, run_step


@pytest.fixture
def program() -> Program:
    return program_of(ResidualBlocks(), torch.ones(2, 8))


def step(program: Program, pass_: Pass, **options: object) -> StepResult:
    return run_step(program, pass_, Context(), step=3, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("pass_", "message"),
    [
        (DoAnything(on_apply=bad.write_in_place), "wrote tensor model/head.weight in place"),
        (DoAnything(on_apply=bad.write_behind_autograd), "wrote tensor model/layers.0.up.weight in place"),
        (DoAnything(on_apply=bad.reorder_rows_of_weight), "wrote tensor model/layers.0.up.weight in place"),
        (DoAnything(on_plan=bad.write_in_place), "wrote tensor model/head.weight in place"),
        (DoAnything(on_plan=bad.double_output), "changed the program without applying a site"),
        (DoAnything(on_apply=bad.forget_metadata), "has no shape metadata"),
        (DoAnything(on_apply=bad.rename_output), "changed the signature of model"),
        (DoAnything(on_apply=bad.add_component), "changed the signature of copy"),
        (DoAnything(on_apply=bad.return_twice_in_silence), "the graph returns 2 values; expected 1"),
        (DoAnything(on_apply=bad.rename_input), "the graph takes renamed; expected x"),
        (DeclaresSignature(on_apply=bad.return_input), "an output is the input x; expected outputs that alias nothing"),
        (DeclaresSignature(on_apply=bad.return_twice), "an output is output 0 again"),
        (DeclaresSignature(on_apply=bad.claim_other_shape), "output has shape"),
        (DeclaresSignature(on_apply=bad.claim_other_dtype), "dtype torch.float32; expected ('batch', 3) and float16"),
        (DoAnything(on_apply=bad.replace_weight_of_leaf), "changed the module model/head in place"),
        (DoAnything(on_apply=bad.change_setting_of_leaf), "changed the module model/norm in place"),
        (DoAnything(on_plan=bad.replace_leaf), "changed the program without applying a site"),
        (DoAnything(on_apply=bad.change_labels), "changed the program's labels; expected changes_signature = True"),
        (DoAnything(on_apply=bad.take_component_away), "apply model/site: put None at components['model']"),
        (DoAnything(on_apply=bad.rename_component), "put the component 'other' at components['model']"),
        (DoAnything(on_apply=bad.return_no_tuple), "left a program that cannot be read (TypeError: "),
        (DoAnything(on_apply=bad.forget_head), "left head as the head of model, which calls no such module"),
        (DoAnything(on_apply=bad.break_graph), "apply model/site: left a broken graph"),
        (DoAnything(sites=("model/a", "model/b", "model/a")), "plans two sites named model/a"),
        (DoAnything(on_plan=bad.fail), "plan: raised ZeroDivisionError: division by zero"),
        (DoAnything(on_apply=bad.fail), "apply model/site: raised ZeroDivisionError: division by zero"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_pass_that_breaks_the_contract_is_named_with_its_step(program: Program, pass_: Pass, message: str) -> None:
    text = program_text(program)
    with pytest.raises(PassError) as caught:
        step(program, pass_)
    assert str(caught.value).startswith("step 3 do-anything")
    assert message in str(caught.value)
    assert program_text(program) == text  # graphs are clones, so the program given is as it was


SITE = Site("model/a", "model", ("a",))


@pytest.mark.parametrize(
    ("plans", "message"),
    [
        (None, "plan: returned None; expected a Plan"),
        ([SITE], "plan: returned a list; expected a Plan"),
        (Plan(sites=[SITE]), "plan: sites: are a list; expected a tuple of Site"),  # type: ignore[arg-type]
        (Plan(sites=("model/a",)), "plan: sites: hold a str; expected Site"),  # type: ignore[arg-type]
        (Plan(sites=(replace(SITE, name=""),)), "expected a name, and texts that are text"),
        (Plan(sites=(replace(SITE, summary=3),)), "expected a name, and texts that are text"),
        (Plan(sites=(SITE, SITE)), "plan: plans two sites named model/a"),
        (Plan(sites=(replace(SITE, component="modle"),)), "is in the component 'modle'; expected one of model"),
        (Plan(sites=(replace(SITE, target="a"),)), "has the target 'a'; expected a tuple of names"),
        (Plan(sites=(replace(SITE, saving=3),)), "has the saving 3; expected a Cost"),
        (Plan(refusals=(SITE,)), "plan: refusals: hold a Site; expected Refusal"),  # type: ignore[arg-type]
        (Plan(refusals=(Refusal("model/a", "model", ""),)), "model/a gives no reason"),
        (Plan(refusals=(Refusal("model/a", "", "why"),)), "is in the component ''; expected one of model"),
    ],
)
def test_what_is_no_plan_is_refused(program: Program, plans: object, message: str) -> None:
    with pytest.raises(PassError) as caught:
        step(program, PlanAnything(plans=plans))
    assert str(caught.value).startswith("step 3 do-anything, plan")
    assert message in str(caught.value)


def test_dimensions_that_were_changed_in_place_are_noticed(program: Program) -> None:
    own = replace(program, dims=dict(program.dims))
    with pytest.raises(PassError, match="changed the program's dims"):
        step(own, DoAnything(on_plan=bad.change_dims))


def test_a_module_replaced_under_its_own_name_is_a_change(program: Program) -> None:
    result = step(program, DoAnything(on_apply=bad.replace_leaf))
    assert [site.name for site in result.applied] == ["model/site"]
    assert result.text_before == result.text_after
    weights = [each.components["model"].graph.get_parameter("head.weight") for each in (program, result.program)]
    assert [bool(weight.any()) for weight in weights] == [True, False]


def test_a_pass_that_loops_ends_with_its_time(program: Program) -> None:
    def loop(_: Program) -> None:
        while True:
            pass

    for pass_, action in ((DoAnything(on_plan=loop), "plan"), (DoAnything(on_apply=loop), "apply model/site")):
        with pytest.raises(PassError) as caught:
            step(program, pass_, time_limit_s=0.2)
        assert str(caught.value).startswith(f"step 3 do-anything, {action}: is not done after 0.2 s")


def test_a_pass_that_prints_is_refused_and_not_heard(program: Program, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(PassError, match="step 3 do-anything, apply model/site: printed 'found one'"):
        step(program, DoAnything(on_apply=lambda _: sys.stdout.write("found one\nand more\n")))  # type: ignore[arg-type,return-value]
    assert capfd.readouterr() == ("", "")


def test_random_numbers_that_a_pass_draws_leave_no_trace(program: Program) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    step(program, DoAnything(on_plan=lambda _: torch.rand(100)))  # type: ignore[arg-type,return-value]
    assert torch.equal(torch.rand(3), expected)


def test_importance_cannot_be_written_by_a_pass(program: Program) -> None:
    @dataclass(frozen=True)
    class Boasts(DoAnything):
        def plan(self, program: Program, context: Context) -> Plan:
            context.importance["model/site"] = 1.0  # type: ignore[index]
            return Plan()

    importance = {"model/site": 0.0}
    with pytest.raises(PassError, match="plan: raised TypeError: 'mappingproxy' object does not support item"):
        run_step(program, Boasts(), Context(importance=importance), step=3)
    assert importance == {"model/site": 0.0}


def test_a_signature_may_change_when_the_pass_says_so(program: Program) -> None:
    result = step(program, DeclaresSignature(on_apply=bad.rename_output))
    assert result.program.components["model"].outputs[0].name == "scores"
    assert program.components["model"].outputs[0].name == "output"


def test_an_error_that_names_the_pass_itself_comes_through(program: Program) -> None:
    def refuse(_: Program) -> None:
        raise PassError("do-anything: option x", "is wrong")

    with pytest.raises(PassError, match="^do-anything: option x: is wrong$"):
        step(program, DoAnything(on_plan=refuse))


def test_an_error_of_ours_that_does_not_name_the_pass_gets_pass_and_step(program: Program) -> None:
    def refuse(_: Program) -> None:
        raise GateError("outputs", "differ", expected="equal outputs")

    with pytest.raises(PassError) as caught:
        step(program, DoAnything(on_plan=refuse))
    assert str(caught.value) == "step 3 do-anything, plan, outputs: differ; expected equal outputs"


def test_a_site_that_changes_nothing_is_gone_and_not_applied(program: Program) -> None:
    result = step(program, DoAnything())
    assert (len(result.applied), [site.name for site in result.gone]) == (0, ["model/site"])
    assert result.counted.macs == 0


def skip_first(program: Program) -> None:
    graph = program.components["model"].graph
    for branch in find_branches(graph):
        skip_branch(graph, branch)
        drop_dead_nodes(graph)
        return


def test_a_site_that_dies_with_an_earlier_one_is_gone(program: Program) -> None:
    result = step(program, DoAnything(on_apply=skip_first, sites=("model/a", "model/b", "model/c")))
    assert [site.name for site in result.applied] == ["model/a", "model/b"]
    assert [site.name for site in result.gone] == ["model/c"]
    assert result.left == ()


def test_fuel_limits_how_many_sites_are_applied(program: Program) -> None:
    result = step(program, make_pass("skip-branches", {}), fuel=1)
    assert [site.name for site in result.applied] == ["model/layers.0.ffn"]
    assert [site.name for site in result.left] == ["model/layers.1.ffn"]
    assert [branch.name for branch in find_branches(result.program.components["model"].graph)] == ["layers.1.ffn"]


def test_the_planner_chooses_only_where_the_options_do_not(program: Program) -> None:
    def last(_: Program, plan: Plan) -> list[object]:
        return [plan.sites[-1]]

    free = step(program, make_pass("skip-branches", {}), choose=last)
    assert [site.name for site in free.applied] == ["model/layers.1.ffn"]
    assert [site.name for site in free.left] == ["model/layers.0.ffn"]
    named = step(program, make_pass("skip-branches", {"branches": ["layers.0.*"]}), choose=last)
    assert [site.name for site in named.applied] == ["model/layers.0.ffn"]


def test_new_nodes_are_stamped_even_when_their_metadata_are_copied(program: Program) -> None:
    once = step(program, DoAnything(on_apply=bad.double_output)).program
    twice = run_step(once, DoAnything(on_apply=bad.double_output), Context(), step=4).program
    made = [node.meta["made_by"] for node in twice.components["model"].graph.graph.nodes if "made_by" in node.meta]
    assert made == [(3, "do-anything"), (4, "do-anything")]


class Recorder(Observer):
    def __init__(self) -> None:
        self.seen: list[tuple[str, ...]] = []

    def before(self, step: int, pass_: Pass, program: Program) -> None:
        self.seen.append(("before", f"{step} {pass_.name}"))

    def planned(self, step: int, pass_: Pass, program: Program, plan: Plan) -> None:
        self.seen.append(("planned", *(site.name for site in plan.sites)))

    def applied(self, step: int, pass_: Pass, program: Program, site: Site) -> None:
        self.seen.append(("applied", site.name))

    def after(self, result: StepResult) -> None:
        self.seen.append(("after", f"{result.step} {result.name}"))


def test_observers_see_the_step_its_plan_and_every_site(program: Program) -> None:
    recorder = Recorder()
    step(program, make_pass("skip-branches", {}), observers=(recorder,))
    first, second = "model/layers.0.ffn", "model/layers.1.ffn"
    assert recorder.seen == [
        ("before", "3 skip-branches"),
        ("planned", first, second),
        ("applied", first),
        ("applied", second),
        ("after", "3 skip-branches"),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float64])
@pytest.mark.parametrize("n", [0, 1, 3, 8, 1000, 1003])
def test_a_checksum_notices_one_changed_element(dtype: torch.dtype, n: int) -> None:
    tensor = torch.ones(n, dtype=dtype)
    before = checksum(tensor)
    assert checksum(tensor.clone()) == before
    for i in {0, n // 2, n - 1} & set(range(n)):
        tensor.data[i] = 0
        assert checksum(tensor) != before
        tensor.data[i] = 1
    assert checksum(torch.empty(4, device="meta")) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_checksum_notices_rows_that_changed_places(dtype: torch.dtype) -> None:
    tensor = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    orders = [tensor, tensor.flip(0), tensor[[1, 0, 2, 3, 4, 5]], tensor.roll(1, 0)]
    assert len({checksum(order) for order in orders}) == len(orders)


def test_a_checksum_notices_parts_of_a_large_tensor_that_changed_places() -> None:
    tensor = torch.randn(3, 2**21, generator=torch.Generator().manual_seed(0))
    assert checksum(tensor) != checksum(tensor[[1, 0, 2]])


def test_a_checksum_reads_views_and_scales() -> None:
    base = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    assert checksum(base[1:, 1:]) == checksum(base[1:, 1:].clone())
    assert len({checksum(base), checksum(base * 2), checksum(-base), checksum(base.relu())}) == 4
