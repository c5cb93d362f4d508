"""Gates pass what is equal and fail what was altered, in every runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor

from vlmopt.core.contract import Promise
from vlmopt.core.errors import ArtifactError
from vlmopt.core.formats import FORMATS, SUFFIXES, is_installed
from vlmopt.core.program import Component, Dim, Program, TensorSpec
from vlmopt.core.progress import Silent
from vlmopt.core.workload import Feed
from vlmopt.emit import emit_program
from vlmopt.graph.example import ResidualBlocks, program_of
from vlmopt.graph.replay import run_outputs
from vlmopt.verify.parity import check_file, check_step, difference, open_file, two_shapes
from vlmopt.verify.tolerances import ARTIFACT, CLOSE, allowed

INSTALLED = tuple(name for name in FORMATS if is_installed(name))
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("found", "wanted", "value"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.1], [1.0, 2.0], 0.05),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([1e-9], [0.0], 1e-3),
        ([NAN, 1.0], [NAN, 1.0], 0.0),
        ([1.0, NAN], [NAN, 1.0], INF),
        ([NAN], [1.0], INF),
        ([INF, 1.0], [INF, 1.0], 0.0),
        ([-INF], [INF], INF),
        ([1.0], [INF], INF),
        ([], [], 0.0),
        ([1.0], [1.0, 1.0], INF),
    ],
)
def test_a_difference_is_relative_to_the_largest_output(found: list[float], wanted: list[float], value: float) -> None:
    assert difference(torch.tensor(found), torch.tensor(wanted)) == pytest.approx(value, rel=1e-6)


def test_every_dtype_has_a_tolerance_and_another_runtime_gets_more() -> None:
    assert CLOSE.keys() == ARTIFACT.keys() == {"float64", "float32", "bfloat16", "float16"}
    assert all(CLOSE[dtype] < ARTIFACT[dtype] < 0.1 for dtype in CLOSE)
    assert allowed(Promise.EXACT, "float32") == 0.0
    assert allowed(Promise.CLOSE, "float16") == CLOSE["float16"]
    assert allowed(Promise.LOSSY, "float32") is None


@pytest.fixture(scope="module")
def program() -> Program:
    return program_of(ResidualBlocks(), torch.ones(2, 8))


@pytest.fixture(scope="module")
def feeds() -> dict[str, Feed]:
    return {"model": {"x": torch.randn(4, 8, generator=torch.Generator().manual_seed(0))}}


def altered(program: Program, by: float) -> Program:
    """The program with one weight of its own changed."""
    model = ResidualBlocks()
    model.head.weight.data[1, 2] += by
    return program_of(model, torch.ones(2, 8))


def test_a_step_is_held_to_its_promise(program: Program, feeds: dict[str, Feed]) -> None:
    same, close, far = altered(program, 0.0), altered(program, 1e-6), altered(program, 1e-2)
    verdicts = {
        promise: [check_step("step", promise, program, after, feeds) for after in (same, close, far)]
        for promise in Promise
    }
    passed = {promise: [gate.passed if gate else None for gate in gates] for promise, gates in verdicts.items()}
    assert passed[Promise.EXACT] == [True, False, False]
    assert passed[Promise.CLOSE] == [True, True, False]
    assert passed[Promise.LOSSY] == [None, None, None]


@pytest.fixture(scope="module")
def files(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    emit_program(program, INSTALLED, folder, progress=Silent())
    return folder


def cases_of(component: Component, feed: Feed) -> list[tuple[Feed, tuple[Tensor, ...]]]:
    shapes = two_shapes(component, feed, {})
    return [(shape, run_outputs(component, shape)) for shape in shapes]


@pytest.mark.parametrize("kind", INSTALLED)
def test_a_file_is_compared_at_two_shapes(kind: str, files: Path, program: Program, feeds: dict[str, Feed]) -> None:
    component, path = program.components["model"], files / f"model{SUFFIXES[kind]}"
    cases = cases_of(component, feeds["model"])
    assert [len(wanted[0]) for _, wanted in cases] == [1, 5]
    gate = check_file("it", path, kind, cases, dtype="float32")
    assert gate.passed
    assert gate.found < 1e-6
    wrong = cases_of(altered(program, 1e-2).components["model"], feeds["model"])
    assert not check_file("it", path, kind, wrong, dtype="float32").passed
    only_second = [cases[0], (cases[1][0], (cases[1][1][0] + 1e-2,))]
    assert not check_file("it", path, kind, only_second, dtype="float32").passed


def test_an_altered_onnx_file_fails(files: Path, program: Program, feeds: dict[str, Feed], tmp_path: Path) -> None:
    model = onnx.load(str(files / "model.onnx"))
    for tensor in model.graph.initializer:
        if numpy_helper.to_array(tensor).ndim == 2:
            tensor.CopyFrom(numpy_helper.from_array(1.01 * numpy_helper.to_array(tensor), tensor.name))
            break
    onnx.save(model, str(tmp_path / "model.onnx"))
    cases = cases_of(program.components["model"], feeds["model"])
    gate = check_file("it", tmp_path / "model.onnx", "onnx", cases, dtype="float32")
    assert not gate.passed
    assert gate.found > 1e-3


def test_text_inputs_get_another_length_that_the_component_takes() -> None:
    specs = (TensorSpec("input_ids", ("batch", "text"), "int64"), TensorSpec("pixels", ("batch", 3, 8), "float32"))
    component = replace(program_of(ResidualBlocks(), torch.ones(2, 8)).components["model"], inputs=specs)
    feed = {"pixels": torch.ones(3, 3, 8), "input_ids": torch.ones(3, 6, dtype=torch.int64)}
    for maximum, length in ((24, 7), (6, 5)):
        small, large = two_shapes(component, feed, {"text": Dim("text", 1, maximum, 6)})
        assert list(small) == list(large) == ["input_ids", "pixels"]  # in the order of the component's inputs
        assert (tuple(small["input_ids"].shape), tuple(large["input_ids"].shape)) == ((1, 6), (5, length))
        assert tuple(large["pixels"].shape) == (5, 3, 8)


def truncate(data: bytes) -> bytes:
    return data[: len(data) // 2]


def empty(data: bytes) -> bytes:
    return b""


def other(data: bytes) -> bytes:
    return b"this is a text"


@pytest.mark.parametrize("damage", [truncate, empty, other])
@pytest.mark.parametrize("kind", INSTALLED)
def test_a_broken_file_is_named_in_one_line(
    kind: str, damage: Callable[[bytes], bytes], files: Path, tmp_path: Path
) -> None:
    path = tmp_path / f"model{SUFFIXES[kind]}"
    path.write_bytes(damage((files / path.name).read_bytes()))
    with pytest.raises(ArtifactError) as caught:
        open_file(path, kind)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("kind", INSTALLED)
def test_a_missing_file_is_named(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nowhere"):
        open_file(tmp_path / "nowhere", kind)


class Cancelling(torch.nn.Module):
    """`w x` as large numbers that all but cancel: the roundings of their sum are a part of what is left. In order, or
    apart, which hardly rounds."""

    def __init__(self, *, is_apart: bool, change: float = 0.0) -> None:
        super().__init__()
        self.is_apart, self.change = is_apart, change
        self.linear = torch.nn.Linear(3, 2)
        self.linear.weight.data, self.linear.bias.data = torch.ones(2, 3), torch.full((2,), -3e4)

    def forward(self, x: Tensor) -> Tensor:
        if self.is_apart:
            return self.linear(x * 0 + 1e4) + (self.linear(x) + 3e4) + self.change  # type: ignore[no-any-return]
        return self.linear(x + 1e4)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("change", "is_passed"), [(0.0, True), (0.05, False)])
def test_a_program_that_multiplies_its_own_roundings_is_held_to_float64(change: float, is_passed: bool) -> None:
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    before, after = program_of(Cancelling(is_apart=False), x), program_of(Cancelling(is_apart=True, change=change), x)
    gate = check_step("step", Promise.CLOSE, before, after, {"model": {"x": x}})
    assert gate is not None
    assert gate.allowed > 10 * CLOSE["float32"]
    assert gate.passed is is_passed
