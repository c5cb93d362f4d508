"""Files of OpenVINO and ExecuTorch in their own runtimes, against the program."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.emit.test_onnx_quantized import KINDS, X, quantized
from tests.emit.toy import DIMS, cases, image_component, text_component, wanted
from vlmopt.core.errors import ArtifactError, EmitError, RecipeError, VlmoptError
from vlmopt.core.formats import FORMATS, ROUNDS_INPUTS, refuse_missing
from vlmopt.core.program import Component
from vlmopt.emit import emit_executorch, emit_openvino
from vlmopt.emit.onnx_file import DEFAULT_OPSET
from vlmopt.graph.quantized import with_exact_inputs
from vlmopt.graph.replay import run_outputs
from vlmopt.verify.parity import check_file, difference, open_file
from vlmopt.workflow.checking_quantized import quantized_tolerance

BOTH = pytest.mark.parametrize("component", [image_component(), text_component()], ids=lambda c: c.name)


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"pip install 'vlmopt[{name}]'")


def written(kind: str, component: Component, folder: Path) -> Path:
    if kind == "openvino":
        return emit_openvino(component, DIMS, folder / "graph.xml", opset=DEFAULT_OPSET).path
    return emit_executorch(component, DIMS, folder / "graph.pte").path


@pytest.mark.parametrize(
    "kind", [pytest.param("openvino", marks=needs("openvino")), pytest.param("executorch", marks=needs("executorch"))]
)
@BOTH
def test_a_file_computes_the_program_at_every_shape(component: Component, kind: str, tmp_path: Path) -> None:
    run = open_file(written(kind, component, tmp_path), kind)
    for inputs in cases(component):
        feed = {spec.name: value for spec, value in zip(component.inputs, inputs, strict=True)}
        (found,) = run(feed)
        assert difference(found, wanted(component, inputs)) < 1e-5


@needs("openvino")
def test_openvino_writes_two_files_and_nothing_on_failure(tmp_path: Path) -> None:
    written("openvino", image_component(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graph.bin", "graph.xml"]
    with pytest.raises(VlmoptError, match="cannot be written"):
        written("openvino", image_component(), tmp_path / "missing")


@needs("openvino")
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timer signals")
def test_a_model_let_go_of_in_another_thread_leaves_signals_as_they_were(tmp_path: Path) -> None:
    """As the garbage collector may; faulthandler is what gives Python a stack for signals."""
    code = """
import sys, threading, time
from pathlib import Path
from vlmopt.core.time_limit import TimeLimit
from vlmopt.verify.edge_runtimes import open_openvino
models = [open_openvino(Path(sys.argv[1]))]
thread = threading.Thread(target=models.clear)
thread.start()
thread.join()
print(TimeLimit(0.05).run(lambda: time.sleep(0.2)).has_expired)
"""
    path = written("openvino", image_component(), tmp_path)
    done = subprocess.run([sys.executable, "-X", "faulthandler", "-c", code, str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr


@needs("executorch")
def test_executorch_writes_one_file_and_nothing_on_failure(tmp_path: Path) -> None:
    written("executorch", image_component(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["graph.pte"]
    with pytest.raises(VlmoptError, match="cannot be written"):
        written("executorch", image_component(), tmp_path / "missing")


@needs("openvino")
@pytest.mark.parametrize("kind", KINDS)
def test_quantized_layers_stay_small_in_openvino(kind: str, tmp_path: Path) -> None:
    component = quantized(kind)
    path = written("openvino", component, tmp_path)
    simulated = with_exact_inputs(component) if kind in ("8 bits", "4 bits") else component
    (wanted_,), (found,) = run_outputs(simulated, {"x": X}), open_file(path, "openvino")({"x": X})
    assert difference(found, wanted_) < 2e-6
    weights = sum(value.nbytes for value in component.graph.state_dict().values())
    assert path.with_suffix(".bin").stat().st_size < 1.1 * weights + 4096


@needs("executorch")
@pytest.mark.parametrize("kind", ["dynamic", "qdq"])
def test_int8_products_run_in_kernels_of_xnnpack(kind: str, tmp_path: Path) -> None:
    component = quantized(kind)
    path = written("executorch", component, tmp_path)
    (wanted_,), (found,) = run_outputs(component, {"x": X}), open_file(path, "executorch")({"x": X})
    limit = quantized_tolerance(component, [({"x": X}, [wanted_])])
    assert limit is not None
    assert 0 < difference(found, wanted_) <= limit
    assert "executorch" in ROUNDS_INPUTS  # a run's gate allows as much
    assert b"dequantize" not in path.read_bytes()  # no operation outside of XNNPACK's graphs


@needs("executorch")
@pytest.mark.parametrize("kind", ["8 bits", "4 bits", "float16"])
def test_weights_without_a_kernel_are_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(EmitError, match="which XNNPACK has no kernel for; quantize it with quantize-int8"):
        written("executorch", quantized(kind), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "kind", [pytest.param("openvino", marks=needs("openvino")), pytest.param("executorch", marks=needs("executorch"))]
)
def test_a_broken_file_is_named_in_one_line(kind: str, tmp_path: Path) -> None:
    path = written(kind, image_component(), tmp_path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    with pytest.raises(ArtifactError, match="cannot load it") as caught:
        open_file(path, kind)
    assert "\n" not in str(caught.value)
    with pytest.raises(ArtifactError, match="nowhere"):
        open_file(tmp_path / "nowhere", kind)


@pytest.mark.parametrize("kind", ["openvino", "executorch"])
def test_what_is_not_installed_is_said_before_anything_runs(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refuse_missing(name for name in FORMATS if name != kind and name not in ("openvino", "executorch"))
    with pytest.raises(RecipeError, match=rf"emit: {kind}: is not installed; pip install 'vlmopt\[{kind}\]'"):
        refuse_missing(["onnx", kind])
    with pytest.raises(ArtifactError, match=rf"is a file for {kind}, which is not installed"):
        check_file("x", tmp_path / "x", kind, [], dtype="float32")
