"""A small complete report, as a run of two components writes it."""

from __future__ import annotations

from typing import Any


def cost(parameters: int, macs: int) -> dict[str, int]:
    return {"parameters": parameters, "parameters_bytes": 4 * parameters, "macs": macs, "activation_bytes": 1000}


def latency(median_ms: float) -> dict[str, float]:
    return {"median_ms": median_ms, "p10_ms": median_ms - 1, "p90_ms": median_ms + 1}


def branch(name: str, *, kept: bool, score: float) -> dict[str, Any]:
    place = {"component": "image_encoder", "name": name, "kind": "ffn", "layer": 0}
    return {**place, "params": 1000, "macs": 2000, "score": score, "stderr": 0.001, "kept": kept}


def report() -> dict[str, Any]:
    """A new copy each time, so that a test may spoil it."""
    return {
        "schema": 1,
        "vlmopt": "0.1.0",
        "created": "2026-01-02T03:04:05Z",
        "model": {"path": "models/dual", "model_type": "toy", "architecture": "ToyModel", "fingerprint": "ab" * 32},
        "task": {
            "name": "style | drawing",
            "kind": "image-classification",
            "metric": "accuracy",
            "fingerprint": "cd" * 32,
            "n_profile": 100,
            "n_validation": 50,
            "n_test": 200,
        },
        "result": {
            "metric": {
                "name": "accuracy",
                "original": 0.72,
                "optimized": 0.715,
                "drop_points": 0.5,
                "drop_interval95": [-1.25, 2.5],
                "original_interval95": [0.65, 0.78],
                "optimized_interval95": [0.64, 0.77],
                "p_value": 0.61,
                "n": 200,
                "all": {"accuracy": [0.72, 0.715], "macro_f1": [0.7, 0.69]},
            },
            "cost": {"original": cost(22_000_000, 1_500_000_000), "optimized": cost(5_500_000, 500_000_000)},
            "latency_ms": {
                "image_encoder": {"original": latency(32.0), "optimized": latency(8.0), "ratio": 4.0},
                "text_encoder": {"original": latency(5.0), "optimized": None, "ratio": None},
            },
            "size_bytes": {"original": 88_000_000, "optimized": 22_000_000},
        },
        "passes": [
            {
                "step": 1,
                "name": "skip-branches",
                "promise": "lossy",
                "n_sites": 2,
                "n_applied": 1,
                "sites": [{"name": "image_encoder/layers.0.ffn", "component": "image_encoder", "summary": "ffn"}],
                "refusals": [{"name": "image_encoder/x", "component": "image_encoder", "reason": "read behind it"}] * 2,
                "predicted": cost(1000, 2000),
                "counted": cost(1000, 2010),
                "verdict": "judged on the task",
            }
        ],
        "branches": [branch("layers.0.ffn", kept=False, score=0.0002), branch("layers.1.ffn", kept=True, score=0.31)],
        "gates": [
            {"name": "max drop", "passed": True, "found": 0.5, "allowed": 1.0},
            {"name": "parity onnx", "passed": False, "found": 0.25, "allowed": 0.0001},
        ],
        "stages": [{"name": "capture", "seconds": 4.25}, {"name": "profile", "seconds": 60.0}],
        "reproduce": "vlmopt optimize --recipe out/recipe.yaml -o again",
        "warnings": ["the test split is small"],
    }
