"""Toy models, tasks and finished artifacts, made once for the whole run and shared by all of its processes.

They lie in folders with spaces in their names. Nobody may change them: copy what you alter.
"""

from __future__ import annotations

import fcntl
import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import toys
from tests.shares import Shares, dearest_first
from vlmopt.capture import capture, kept
from vlmopt.cli import entry
from vlmopt.core.program import AdapterSource, Program
from vlmopt.rewrite.pipeline import clone_program
from vlmopt.workflow import opening

N_IMAGES = 30  # of every split
PROMPTS = ["a {}", "a photo of a {}"]
Make = Callable[[Path], object]


# Graphs and shapes are made by the hundred thousand and most live on: with its usual thresholds Python looks through
# all of them again and again, which took a sixth of the time of a capture.
gc.set_threshold(50_000, 20, 20)

# pytest hangs its handlers on every logger that does not propagate. On this one torch then writes down each step of an
# export, with its stack, which takes a tenth of a capture.
logging.getLogger("torch.__trace").propagate = True


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Shares | None:
    if config.getoption("dist") != "loadfile":
        return None
    config.option.loadscopereorder = False  # they are ordered below
    return Shares(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        items[:] = dearest_first(items)


@dataclass(frozen=True)
class Workshop:
    """Makes folders on demand, each once."""

    root: Path

    def folder(self, name: str, make: Make) -> Path:
        """The folder of this name; whichever process comes first makes it, the others wait."""
        path, done = self.root / name, self.root / f"{name}.done"
        with (self.root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                make(path)
                done.touch()
        return path

    def model(self, family: str) -> Path:
        return self.folder(f"model {family}", lambda path: toys.write_model(family, path))

    def task(self, kind: str) -> Path:
        fields = {"prompts": PROMPTS} if kind == "zero-shot-image-classification" else {}
        return self.folder(f"task {kind}", lambda path: toys.write_task(path, kind, n=N_IMAGES, **fields))

    def artifact(self, family: str, kind: str, *options: str) -> Path:
        """What `vlmopt optimize` makes of a toy for a task, `--max-drop 20` (thirty images say little)."""

        def make(path: Path) -> None:
            words = ["-m", self.model(family), "-t", self.task(kind), "-o", path, "--max-drop", "20", *options]
            assert entry.run(["optimize", "-q", *(str(word) for word in words)]) == 0

        return self.folder(f"artifact {family} {kind}", make)


@pytest.fixture(scope="session", autouse=True)
def kept_captures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What one process exported, the others and their commands read back; nothing of it outlives the run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(kept.VARIABLE, str(shared(tmp_path_factory) / "kept captures"))
        yield


@pytest.fixture(scope="session", autouse=True)
def captured_once() -> Iterator[None]:
    """Every process captures a model folder once: half of the time of a short run is its capture.

    What is handed out are clones, whose tensors no pass may write.
    """
    known: dict[object, Program] = {}

    def remembered(model: str, *, adapters: Sequence[AdapterSource] = (), **options: object) -> Program:
        places = [Path(place) for place in (model, *(adapter.path for adapter in adapters))]
        if not all(place.exists() for place in places):
            return capture(model, adapters=adapters, **options)  # type: ignore[arg-type]
        files = [file for place in places for file in (place, *sorted(place.rglob("*")))]
        stats = tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files)
        key = (model, tuple(adapters), stats, tuple(sorted(options.items())))
        if key not in known:
            known[key] = capture(model, adapters=adapters, **options)  # type: ignore[arg-type]
        return clone_program(known[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "capture", remembered)
        yield


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    root = shared(tmp_path_factory) / "made once"
    root.mkdir(exist_ok=True)
    return Workshop(root)


def shared(factory: pytest.TempPathFactory) -> Path:
    """The folder of the run, which all of its processes know."""
    base = factory.getbasetemp()
    return base.parent if base.name.startswith("popen-") else base


@pytest.fixture(scope="session")
def clip(workshop: Workshop) -> Path:
    return workshop.model("clip")


@pytest.fixture(scope="session")
def colours(workshop: Workshop) -> Path:
    """An image classification task."""
    return workshop.task("image-classification")


@pytest.fixture(scope="session")
def classifier(workshop: Workshop) -> Path:
    return workshop.artifact("clip", "image-classification")


@pytest.fixture(scope="session")
def zero_shot(workshop: Workshop) -> Path:
    return workshop.artifact("clip", "zero-shot-image-classification")


@pytest.fixture(scope="session")
def retriever(workshop: Workshop) -> Path:
    return workshop.artifact("clip", "image-text-retrieval")


@pytest.fixture(scope="session")
def answerer(workshop: Workshop) -> Path:
    formats = ("--emit", "onnx,torchscript", "--emit", "pt2")
    return workshop.artifact("vilt", "visual-question-answering", *formats)
