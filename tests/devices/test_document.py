"""A device profile that does not fit is refused in one line; one that does says what a graph takes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.architecture.rules import ROOT
from tests.devices.graphs import profile
from vlmopt.core.errors import ProfileError
from vlmopt.devices.document import GraphCheck, read_device_profile
from vlmopt.devices.operations import GraphOperations
from vlmopt.devices.predicting import predict


def written(path: Path, edit: Callable[[dict[str, Any]], object] = lambda data: None, **options: Any) -> Path:
    data = json.loads(profile({"Relu": 3.0}, **options).to_json())
    edit(data)
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def test_a_profile_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_device_profile(written(tmp_path / "a.json")) == profile({"Relu": 3.0})


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        (lambda data: data.update(schema_version=2), "has schema 2; expected schema 1 of this vlmopt"),
        (lambda data: data.pop("operations"), "is not a device profile (operations: Field required)"),
        (lambda data: data.update(more=1), "is not a device profile (more: Extra inputs are not permitted)"),
        (lambda data: data["operations"]["Relu"].update(median_us="slow"), "operations.Relu.median_us"),
        (lambda data: data.update(kind="importance"), "is not a device profile (kind: Input should be 'device')"),
    ],
)
def test_a_file_that_is_no_device_profile_is_refused(
    tmp_path: Path, edit: Callable[[dict[str, Any]], object], line: str
) -> None:
    with pytest.raises(ProfileError) as caught:
        read_device_profile(written(tmp_path / "a.json", edit))
    assert line in caught.value.one_line()


@pytest.mark.parametrize(("content", "line"), [(b"{", "is not JSON"), (b"\xff", "is not JSON"), (b"[]", "is not a")])
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes, line: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ProfileError, match=line):
        read_device_profile(path)


def test_the_profiles_that_are_shipped_can_be_read() -> None:
    shipped = sorted((ROOT / "profiles" / "devices").glob("*.json"))
    assert shipped
    for path in shipped:
        found = read_device_profile(path, allow_other_runtime=True)
        assert found.operations
        assert all(time.quietest_us <= time.median_us for time in found.operations.values())


def test_a_file_that_is_not_there_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="no such file; make one with `vlmopt device profile"):
        read_device_profile(tmp_path / "a.json")


def test_times_of_another_runtime_version_are_refused_unless_asked_for(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", version="1.2.3")
    with pytest.raises(ProfileError, match=r"measured with ONNX Runtime 1\.2\.3; expected .*--other-runtime"):
        read_device_profile(path)
    assert read_device_profile(path, allow_other_runtime=True).runtime.version == "1.2.3"


def test_a_graph_takes_its_operations_as_often_as_they_occur() -> None:
    known = profile({"Relu": 3.0, "Add": 0.5}, call_us=2.0)
    graph = GraphOperations(Counter({"Relu": 4, "Add": 2}), {})
    assert predict(graph, known, place="a.json").us == 2.0 + 4 * 3.0 + 2 * 0.5
    check = GraphCheck(component="model", n_operations=6, predicted_us=15.0, measured_us=18.0)
    fitted = known.model_copy(update={"checks": (check,)}).fitted()
    found = predict(graph, fitted, place="a.json")
    assert (fitted.node_us, found.sum_us, found.us) == (0.5, 15.0, 18.0)
    assert check.error == pytest.approx(-1 / 6)


def test_a_graph_faster_than_its_sum_fits_nothing_below_zero() -> None:
    check = GraphCheck(component="model", n_operations=6, predicted_us=15.0, measured_us=12.0)
    assert profile({}).model_copy(update={"checks": (check,)}).fitted().node_us == 0.0


def test_an_operation_without_a_time_is_named() -> None:
    graph = GraphOperations(Counter({"Relu": 4, "Unheard": 1}), {})
    with pytest.raises(ProfileError, match="a.json: has no time of 1 of the graph's 2 operations, such as Unheard"):
        predict(graph, profile({"Relu": 3.0}), place="a.json")


def test_profiles_of_one_device_are_joined_and_those_of_two_are_not() -> None:
    joined = profile({"Relu": 3.0, "Add": 1.0}).with_more(profile({"Add": 2.0, "Mul": 4.0}))
    assert {name: time.quietest_us for name, time in joined.operations.items()} == {"Relu": 3.0, "Add": 2.0, "Mul": 4.0}
    with pytest.raises(ProfileError, match="is of another runtime"):
        profile({"Relu": 3.0}).with_more(profile({"Add": 2.0}, version="1.2.3"))
