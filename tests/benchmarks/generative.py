"""Models that write text: which families are captured and how exactly, and what capture and ONNX cost.

`families`: a toy of each family from the model to its ONNX graphs, compared with the model's own `generate` at two
shapes, behind the prompt and behind three cached steps; or the reason why it is refused.

`structure`: LLaVA 1.5 7B without weights. `example`: a LLaVA of 157M parameters, random weights, capture and ONNX.

`real-NAME`: the same as `families` of one published configuration at its full size, random weights, with the size of
its files; `structure-NAME`: one that is too large for that here, without weights (`real_sizes.py`).

`cuts-TASK`: the LLaVA example with branches skipped for one of its tasks (`llava_cuts.py`).

`speedup`: capture and ONNX of a toy LLaVA beside the exporter of transformers, which compares nothing with eager;
runs alternate, so that a slow moment of the machine hits both sides.

Every job is a process of its own (`generative_jobs.py`).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from vlmopt.verify.tolerances import ARTIFACT

ROOT = Path(__file__).resolve().parents[2]
REPEATS = 3
CUT_TASKS = ("style", "vegetarian")
TOLERANCE = ARTIFACT["float32"]
REAL = ("smolvlm_256m", "florence2_base", "git_base", "blip_base", "internvl3_1b", "llava_onevision_05b")
STRUCTURES = ("qwen2_vl_2b", "paligemma_3b")
PARITIES = ("parity_capture", "parity_prefill", "parity_decode")

Found = dict[str, float | str]


def parts() -> Mapping[str, Callable[[], Found]]:
    """What can be measured on its own; words among the figures are notes to them."""
    fixed: dict[str, Callable[[], Found]] = {
        "families": _families, "structure": _structure, "example": _example, "speedup": _speedup
    }  # fmt: skip
    real = {f"real-{name}": partial(_real, name) for name in REAL}
    real |= {f"structure-{name}": partial(_real_structure, name) for name in STRUCTURES}
    return fixed | real | {f"cuts-{task}": partial(_cuts, task) for task in CUT_TASKS} | {"tokens": _tokens}


def _real(name: str) -> Found:
    return {f"real_{name}_{key}": value for key, value in _job("real", name).items()}


def _real_structure(name: str) -> Found:
    return {f"real_{name}_structure_{key}": value for key, value in _job("structure", name).items()}


def real_counts(figures: Mapping[str, float | str]) -> dict[str, float]:
    """How many published configurations were tried at full size, and how many are exact."""
    tried = [name for name in REAL if f"real_{name}_seconds" in figures]
    found = [n for n in tried if f"real_{n}_parity_decode" in figures and is_exact(figures, f"real_{n}")]
    return {"real_sizes_tried": float(len(tried)), "real_sizes_ok": float(len(found))}


def _cuts(task: str) -> Found:
    from tests.benchmarks import llava_cuts

    return {**llava_cuts.figures(task)}


def _tokens() -> Found:
    from tests.benchmarks import tokens

    return {**tokens.figures("style")}


def _families() -> Found:
    from tests.benchmarks.families import TRIED  # loads torch, which the other benchmarks start without

    figures: Found = {}
    rows = {}
    for name in TRIED:
        rows[name] = _job("family", name)
        print(name, rows[name], file=sys.stderr, flush=True)
        figures |= {f"{name}_{key}": value for key, value in rows[name].items() if key != "cpu_seconds"}
    captured = [name for name, row in rows.items() if "refusal" not in row]
    exact = [name for name in captured if is_exact(figures, name)]
    counts = {"tried": len(rows), "ok": len(exact), "refused": len(rows) - len(captured)}
    return figures | {f"families_{key}": float(n) for key, n in counts.items()}


def is_exact(figures: Mapping[str, float | str], name: str) -> bool:
    """Program and files of this family answer as eager does; a figure that is not a number does not count."""
    return all(float(figures[f"{name}_{key}"]) <= TOLERANCE for key in PARITIES)


def _structure() -> Found:
    found = _job("structure")
    return {
        "llava_7b_structure_s": found["seconds"],
        "llava_7b_structure_cpu_s": found["cpu_seconds"],
        "llava_7b_structure_gb": found["peak_gb"],
        "llava_7b_parameters": found["parameters"],
    }


def _example() -> Found:
    found = _job("example")
    return {
        "llava_example_compile_s": found["seconds"],
        "llava_example_compile_cpu_s": found["cpu_seconds"],
        "llava_example_peak_gb": found["peak_gb"],
        "llava_example_parameters": found["parameters"],
        "size_over_unique_params": found["size_over_unique_params"],
    }


def _speedup() -> Found:
    sides: dict[str, list[Found]] = {"vlmopt": [], "exporter": []}
    for _ in range(REPEATS):
        for side, rows in sides.items():
            rows.append(_job(side))
    ours, theirs = (_medians(rows) for rows in sides.values())
    return {
        "llava_toy_compile_s": ours["seconds"],
        "llava_toy_compile_cpu_s": ours["cpu_seconds"],
        "export_for_generation_s": theirs["seconds"],
        "export_for_generation_cpu_s": theirs["cpu_seconds"],
        "speedup_over_export_for_generation": theirs["seconds"] / ours["seconds"],
        "cpu_speedup_over_export_for_generation": theirs["cpu_seconds"] / ours["cpu_seconds"],
        "export_for_generation_graphs": sides["exporter"][-1]["graphs"],
    }


def _medians(rows: Sequence[Found]) -> dict[str, float]:
    return {key: statistics.median(float(row[key]) for row in rows) for key in ("seconds", "cpu_seconds")}


def _job(*arguments: str) -> Found:
    """What a job found, in its last line. What it writes beside is shown only where it fails."""
    command = [sys.executable, "-m", "tests.benchmarks.generative_jobs", *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.stderr.write(done.stderr[-4000:])
        done.check_returncode()
    found: Found = json.loads(done.stdout.splitlines()[-1])
    return found
