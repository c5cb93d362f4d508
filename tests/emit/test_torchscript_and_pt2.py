from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from tests.emit.toy import DIMS, cases, image_component, text_component, wanted
from vlmopt.core.errors import VlmoptError
from vlmopt.core.program import Component
from vlmopt.emit import emit_pt2, emit_torchscript

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
BOTH = pytest.mark.parametrize("component", [image_component(), text_component()], ids=lambda c: c.name)


@BOTH
def test_torchscript_is_bit_equal_at_two_other_shapes(component: Component, tmp_path: Path) -> None:
    module = torch.jit.load(str(emit_torchscript(component, tmp_path / "graph.pt").path))
    for inputs in cases(component):
        with torch.no_grad():
            (found,) = module(*inputs)
        assert torch.equal(found, wanted(component, inputs))


@BOTH
def test_pt2_is_bit_equal_at_two_other_shapes(component: Component, tmp_path: Path) -> None:
    module = torch.export.load(str(emit_pt2(component, DIMS, tmp_path / "graph.pt2").path)).module()
    for inputs in cases(component):
        with torch.no_grad():
            (found,) = module(*inputs)
        assert torch.equal(found, wanted(component, inputs))


def test_torchscript_leaves_the_component_as_it_was(tmp_path: Path) -> None:
    component = text_component()
    before = component.graph.code
    emit_torchscript(component, tmp_path / "graph.pt")
    assert component.graph.code == before


def test_torchscript_warnings_do_not_reach_the_caller(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        emit_torchscript(image_component(), tmp_path / "graph.pt")


def test_both_write_one_file_each_and_nothing_on_failure(tmp_path: Path) -> None:
    emit_torchscript(image_component(), tmp_path / "graph.pt")
    emit_pt2(image_component(), DIMS, tmp_path / "graph.pt2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graph.pt", "graph.pt2"]
    with pytest.raises(VlmoptError, match="cannot be written"):
        emit_torchscript(image_component(), tmp_path / "missing" / "graph.pt")
    with pytest.raises(VlmoptError, match="cannot be written"):
        emit_pt2(image_component(), DIMS, tmp_path / "missing" / "graph.pt2")
