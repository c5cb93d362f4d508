"""The one table of tolerances. A difference is the largest absolute one, relative to the largest absolute output."""

from __future__ import annotations

from vlmopt.core.contract import Promise

# Re-association of sums over some thousand terms: about 30 roundings of the type's epsilon in the worst output.
CLOSE = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 4e-2, "float16": 5e-3}
# ... but a program may multiply its own roundings: so many times as far from float64 as it is itself.
OWN_ROUNDINGS = 4.0
# Another runtime fuses and orders operations its own way, layer after layer.
ARTIFACT = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 6e-2, "float16": 1e-2}
# A quantized layer on equal inputs: a value between two levels may fall to either.
QUANTIZED_LAYER = 2e-3
# A quantized graph: what falls to another level is handed on by all layers behind, as the roundings themselves are. So
# many times what rounding the inputs of its layers changes at all.
QUANTIZED_NOISE = 2.0


def allowed(promise: Promise, dtype: str) -> float | None:
    """Largest difference that a pass with this promise may make; None where it is judged on the task instead."""
    if promise is Promise.EXACT:
        return 0.0
    return CLOSE[dtype] if promise is Promise.CLOSE else None
