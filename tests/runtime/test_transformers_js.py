"""An artifact in transformers.js under Node, from its folder: its answers are those of our runtime, token by token."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import Workshop
from tests.runtime.test_generation import ATTENTION, QUESTION, compiled, picture
from vlmopt.prompting import Prompter
from vlmopt.runtime import Model, load

pytestmark = pytest.mark.slow

VERSION = "4.3.1"
SCRIPT = Path(__file__).parent / "transformers_js" / "answer.mjs"
N_NEW = 8
LIMIT_S = 300


@pytest.fixture(scope="module")
def packages() -> Path:
    """A folder with transformers.js, installed once and kept."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    folder = Path.home() / ".cache" / "vlmopt" / "npm" / f"transformers-{VERSION}"
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "done"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            (folder / "package.json").write_text('{"private": true}')
            # without scripts: those of onnxruntime-node only fetch CUDA, and the package holds what a CPU needs
            words = ["npm", "install", "--ignore-scripts", "--no-audit", f"@huggingface/transformers@{VERSION}"]
            found = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=LIMIT_S)
            if found.returncode:
                pytest.skip(f"npm cannot install transformers.js ({found.stderr.strip()[-200:]})")
            done.touch()
    return folder


def prompt_of(model: Model, colours: tuple[str, ...], folder: Path) -> dict[str, Any]:
    """Ids and pixels as our own preprocessing makes them."""
    generation = model.manifest.generation
    assert generation is not None
    prompter = Prompter(model.preprocessor, generation.image_token, generation.image_tokens)
    prompt: dict[str, Any] = {"ids": list(prompter.encode(QUESTION, len(colours)))}
    if colours:
        pixels = model.preprocessor.images([picture(colour) for colour in colours])["pixel_values"]
        sizes = model.manifest.components["vision_encoder"].inputs[0].shape[1:]
        pixels = pixels.reshape(-1, *map(int, sizes))  # the caller takes off the axis that some processors put in front
        file = folder / f"{'-'.join(colours)}.float32"
        file.write_bytes(pixels.astype(np.float32).tobytes())
        prompt["pixels"] = {"file": str(file), "shape": list(pixels.shape)}
    return prompt


def answered_in_node(packages: Path, artifact: Path, prompts: list[dict[str, Any]], folder: Path) -> list[Any]:
    request = folder / "request.json"
    content = {"packages": str(packages), "folder": str(artifact), "prompts": prompts, "max_new_tokens": N_NEW}
    request.write_text(json.dumps(content))
    words = ["node", str(SCRIPT), str(request)]
    found = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S, env={**os.environ, "NO_COLOR": "1"})
    assert found.returncode == 0, found.stderr[-2000:]
    return list(json.loads(found.stdout))


@pytest.mark.parametrize(
    ("family", "branches"),
    [
        ("llava_llama", []),
        ("llava_llama", [ATTENTION]),  # the cache is renumbered
        ("llava_tied", []),  # an embedding in a data file that two graphs read
        ("llava_qwen2", []),
        ("smolvlm", []),
    ],
)
def test_answers_in_node_are_ours_token_by_token(
    packages: Path, workshop: Workshop, tmp_path: Path, family: str, branches: list[str]
) -> None:
    artifact = compiled(workshop, family, branches)
    model = load(artifact, threads=1)
    questions: list[tuple[str, ...]] = [("red",), ("red", "blue"), ()]
    prompts = [prompt_of(model, colours, tmp_path) for colours in questions]
    found = answered_in_node(packages, artifact, prompts, tmp_path)
    ours = [model.generate(QUESTION, [picture(c) for c in colours], max_new_tokens=N_NEW) for colours in questions]
    assert [answer["tokens"] for answer in found] == [list(answer.token_ids) for answer in ours]
    assert [answer["text"] for answer in found] == [answer.text for answer in ours]
    assert len({answer.token_ids for answer in ours}) == len(questions)  # else the images would not matter


def test_images_prepared_in_node_are_ours(packages: Path, workshop: Workshop, tmp_path: Path) -> None:
    """Of the model's size, since the two resize by other filters."""
    artifact = compiled(workshop, "llava_llama", [])
    model = load(artifact, threads=1)
    file = tmp_path / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file)
    ids = prompt_of(model, ("red",), tmp_path)["ids"]
    (found,) = answered_in_node(packages, artifact, [{"ids": ids, "image": str(file)}], tmp_path)
    ours = model.preprocessor.images([file])["pixel_values"]
    assert np.abs(np.array(found["pixels"]).reshape(ours.shape) - ours).max() < 1e-5
    assert found["tokens"] == list(model.generate(QUESTION, file, max_new_tokens=N_NEW).token_ids)
