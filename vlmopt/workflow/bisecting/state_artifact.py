"""A state of a run as an artifact that `vlmopt run` and `vlmopt eval` accept, without the evidence of a whole run."""

from __future__ import annotations

from pathlib import Path

from vlmopt.core.program import Program
from vlmopt.core.progress import Silent
from vlmopt.emit import build_manifest, emit_program, write_manifest
from vlmopt.emit.configuration import copy_processor
from vlmopt.graph.numbering import with_numbered_cache
from vlmopt.graph.text import component_text
from vlmopt.tasks.kinds.zero_shot_image_classification import prompts
from vlmopt.tasks.specification import TaskKind
from vlmopt.workflow.run_state import RunState


def write_state(state: RunState, program: Program, folder: Path) -> None:
    """Writes graphs, their text, processor files and manifest into the folder, which is there.

    Raises:
        EmitError: a graph cannot be written.
    """
    recipe, program = state.recipe, with_numbered_cache(program)
    files = emit_program(program, recipe.emit, folder, progress=Silent(), opset=recipe.opset)
    copy_processor(state.opened.preprocessor.files, program, folder)
    for name, component in program.components.items():
        (folder / f"{name}.txt").write_text(component_text(component), encoding="utf-8")
    task = None if state.bound is None else state.bound.task
    is_zero_shot = task is not None and task.specification.kind is TaskKind.ZERO_SHOT
    manifest = build_manifest(
        program,
        files,
        folder,
        files=[path for path in sorted(folder.rglob("*")) if path.is_file()],
        task=None if task is None else task.specification.kind.value,
        metric=None if task is None else task.specification.headline,
        prompts=prompts(task) if task is not None and is_zero_shot else (),
        seed=recipe.seed,
    )
    write_manifest(manifest, folder)
