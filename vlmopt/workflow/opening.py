"""Opens a model and a task, and binds the two: how every command begins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vlmopt.capture import capture
from vlmopt.capture.loading import resolve_folder
from vlmopt.core.adapter_file import is_adapter_file
from vlmopt.core.errors import VlmoptError
from vlmopt.core.program import AdapterSource, Program
from vlmopt.core.progress import Progress
from vlmopt.core.workload import Workload
from vlmopt.graph.joined import joined
from vlmopt.graph.replay import run_component
from vlmopt.preprocess import Preprocessor
from vlmopt.recipe.schema import Recipe
from vlmopt.tasks.binding import TaskSource, bind
from vlmopt.tasks.dataset import Task, load_task
from vlmopt.tuning.closed_form import has_unfitted_head, recover_heads
from vlmopt.workflow.attaching import AttachedAdapter, attach


@dataclass(frozen=True)
class OpenedModel:
    """A captured model with its processor and the folder it came from.

    `adapters` are those that came as files: the first is on the program, the others fit its place.
    """

    program: Program
    preprocessor: Preprocessor
    folder: Path
    adapters: tuple[AttachedAdapter, ...] = ()


@dataclass(frozen=True)
class OpenedTask:
    """A task with the program bound to it and the source of its workloads."""

    program: Program
    task: Task
    source: TaskSource


def open_recipe(recipe: Recipe, *, progress: Progress) -> OpenedModel:
    """The model of a recipe, with the adapters that the recipe puts on it; raises what `open_model` does."""
    adapters = tuple(one.source for one in recipe.adapters)
    return open_model(
        recipe.model,
        device=recipe.device,
        dtype=recipe.dtype,
        allow_pickle=recipe.allow_pickle,
        adapters=adapters,
        pass_dirs=recipe.pass_dirs,
        progress=progress,
    )


def open_model(
    model: str,
    *,
    device: str,
    dtype: str,
    allow_pickle: bool,
    progress: Progress,
    adapters: Sequence[AdapterSource] = (),
    pass_dirs: Sequence[str] = (),
) -> OpenedModel:
    """The model, captured at the image size that its processor makes.

    Args:
        adapters: peft's folders, and files of ours; of several files the first is on the program.
        pass_dirs: folders of passes, where one of them made the place of an adapter.

    Raises:
        ModelError, CaptureError: the model cannot be used.
        VlmoptError: torch has no such device here.
    """
    check_device(device)
    with progress.stage("capture"):
        folder = resolve_folder(model)
        preprocessor = Preprocessor.load(folder)
        program = capture(
            model,
            image=preprocessor.image_size,
            device=device,
            dtype=dtype,
            allow_pickle=allow_pickle,
            adapters=[one for one in adapters if not is_adapter_file(one.path)],
        )
        program, attached = attach(program, [one for one in adapters if is_adapter_file(one.path)], pass_dirs)
    return OpenedModel(program, preprocessor, folder, attached)


def check_device(device: str) -> None:
    """Refuses a device that torch does not know, or does not find on this machine."""
    try:
        torch.empty(0, device=device)
        is_real = torch.device(device).type in ("cpu", "cuda", "mps")
        reason = "it cannot compute"
    except (RuntimeError, AssertionError) as error:  # an AssertionError where torch was built without CUDA
        is_real, reason = False, str(error).strip().splitlines()[0].split(": ")[0][:120]
    if not is_real:
        raise VlmoptError("device", f"{device!r} cannot be used ({reason})", expected="cpu, cuda, cuda:1 or mps")


def open_task(opened: OpenedModel, path: str, *, seed: int, progress: Progress) -> OpenedTask:
    """The task, with the model bound to it."""
    with progress.stage("task"):
        task = load_task(path)
        program = bind(opened.program, task, opened.preprocessor)
    return OpenedTask(program, task, TaskSource(task, opened.preprocessor, seed=seed))


class LazyOutputs(Mapping[str, Tensor]):
    """Outputs of a program's components on a workload, each computed when it is first asked for."""

    def __init__(self, program: Program, workload: Workload, *, progress: Progress) -> None:
        self._program, self._workload, self._progress = joined(program).program, workload, progress
        self._known: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._known:
            feeds = self._workload.feeds[name]
            tracked = self._progress.track(feeds, f"running {name}", total=len(feeds))
            self._known[name] = run_component(self._program.components[name], tracked)
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._program.components if name in self._workload.feeds)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def with_fitted_head(program: Program, workload: Workload, *, seed: int, progress: Progress) -> Program:
    """The program the others are compared with: where the task brings its own head, it is fitted here first."""
    if not has_unfitted_head(program):
        return program
    heads = frozenset(program.heads)
    return recover_heads(program, workload, {}, components=heads, progress=progress, seed=seed)
