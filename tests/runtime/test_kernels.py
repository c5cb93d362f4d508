from __future__ import annotations

from vlmopt.runtime.kernels import lacking


def test_the_runtime_has_kernels_of_float16_and_none_of_bfloat16() -> None:
    """Where a newer version has them, programs in bfloat16 can be emitted: refuse_early asks the runtime."""
    assert lacking("float32") == ()
    assert lacking("float16") == ()
    assert lacking("bfloat16") == ("MatMul", "Add", "Mul", "Softmax")
