"""A small complete report, as a run of two components writes it."""

from __future__ import annotations

from typing import Any

PICTURE = (  # a red square of eight by eight pixels
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAFElEQVR4nGO8IyfHgA0wYRUdtBIA4FYB"
    "KCgCg6AAAAAASUVORK5CYII="
)


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


def full() -> dict[str, Any]:
    """The report with every section that a run can write, larger than `report` where a picture needs it."""
    found = report()
    metric = found["result"]["metric"]
    metric["groups"] = [
        group("4", n=62, original=0.95, optimized=0.903, interval=(0.5, 9.7)),
        group("how many yellow crosses are there?", n=12, original=1.0, optimized=0.97, interval=None),
        group("0", n=126, original=0.99, optimized=0.99, interval=(-0.2, 0.2)),
    ]
    metric["changes"] = {
        "n": 200,
        "n_lost": 3,
        "n_gained": 2,
        "n_other": 1,
        "items": [item("lost", 0), item("lost", 1), item("gained", 2), item("other", 3, image="")],
    }
    pair = found["result"]["latency_ms"]["image_encoder"]
    for side in ("original", "optimized"):
        pair[side]["samples_ms"] = [pair[side]["median_ms"] * (0.95 + 0.002 * i) for i in range(60)]
    found["plan"] = {
        "max_drop_points": 1.0,
        "drop_points": 0.4,
        "stderr_points": 0.2,
        "n_items": 150,
        "kept_out_drop_points": 0.6,
        "kept_out_stderr_points": 0.4,
        "notes": ["1 better-looking cut did not hold on the items kept out of the search"],
        "trials": [trial(n, drop=0.02 * n**3) for n in range(1, 9)],
    }
    found["branches"] = [
        branch(f"layers.{i // 2}.{kind}", kept=i < 7, score=0.5 / (i + 1)) | {"kind": kind, "layer": i // 2}
        for i, kind in enumerate(["attention", "ffn"] * 6)
    ]
    for row, certainty in zip(found["branches"][7:], ["uncertain", *["certain"] * 4], strict=True):
        row["certainty"] = certainty
    found["gates"] = [
        {"name": "drop of accuracy on the test split, in points", "passed": True, "found": 0.5, "allowed": 1.0}
    ]
    found["machine"] = {
        "processor": "Toy Processor 9",
        "n_cores": 4,
        "n_threads": 1,
        "memory_bytes": 8_000_000_000,
        "system": "Linux 6.1",
        "python": "3.11.2",
        "versions": {"torch": "2.13.0"},
    }
    found["recipe"] = "version: 1\nmodel: models/dual\nseed: 7\npasses: [skip-branches]\n"
    return found


def group(
    name: str, *, n: int, original: float, optimized: float, interval: tuple[float, float] | None
) -> dict[str, Any]:
    drop = round(100 * (original - optimized), 6)
    levels = {"original": original, "optimized": optimized, "drop_points": drop, "drop_interval95": interval}
    return {"name": name, "n": n, **levels}


def item(kind: str, number: int, *, image: str = PICTURE) -> dict[str, Any]:
    before, after = {"lost": (True, False), "gained": (False, True), "other": (False, False)}[kind]
    answers = {"original": "three" if before else "two", "optimized": "three" if after else "four"}
    judged = {"original_is_right": before, "optimized_is_right": after}
    return {
        "name": f"images/{number}.png",
        "question": "how many?",
        "expected": "three",
        **answers,
        **judged,
        "image": image,
    }


def trial(n: int, *, drop: float) -> dict[str, Any]:
    cut = {"n_cut": n, "saved_macs": 100_000_000 * n, "drop_points": drop, "stderr_points": 0.1}
    return {**cut, "is_accepted": drop <= 0.8}
