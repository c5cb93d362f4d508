from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import onnxruntime
import pytest

from tests.devices.graphs import stack
from vlmopt.core.sessions import drop_garbage, n_alive, opened


class Counted:
    """How often Python looked for cycles in everything."""

    def __init__(self) -> None:
        self.n = 0

    def __call__(self, phase: str, info: dict[str, int]) -> None:
        self.n += phase == "start" and info["generation"] == 2


@pytest.fixture
def looked() -> Iterator[Counted]:
    counted = Counted()
    gc.collect()
    gc.callbacks.append(counted)
    gc.disable()
    yield counted
    gc.enable()
    gc.callbacks.remove(counted)


def test_only_a_session_that_is_left_over_is_looked_for(tmp_path: Path, looked: Counted) -> None:
    path, before = str(stack(tmp_path / "a.onnx")), n_alive()
    session = opened(onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]))
    assert n_alive() == before + 1
    del session
    drop_garbage(at_most=before)
    assert (n_alive(), looked.n) == (before, 0)
    kept: list[object] = [opened(onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]))]
    kept.append(kept)
    del kept
    assert n_alive() == before + 1
    drop_garbage(at_most=before)
    assert (n_alive(), looked.n) == (before, 1)
