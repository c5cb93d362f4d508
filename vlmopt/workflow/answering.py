"""What a program or an artifact says of the items of a task: outputs in one pass, or texts written token by token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from vlmopt.core.errors import ArtifactError
from vlmopt.core.manifest import ComponentEntry, DimEntry, GenerationEntry
from vlmopt.core.program import Program
from vlmopt.core.progress import Progress
from vlmopt.core.workload import Feed
from vlmopt.graph.assembled import DECODER, greedy
from vlmopt.graph.replay import device_of, run_component
from vlmopt.runtime.generation import Decoding, Prompt
from vlmopt.runtime.session import Session, open_session
from vlmopt.tasks.binding import TaskWorkload
from vlmopt.tasks.kinds.text_generation import ANSWERS, MODEL, TextGeneration
from vlmopt.verify.parity import open_file

Files = Mapping[str, Mapping[str, str]]  # component -> format -> file name


def program_outputs(program: Program, workload: TaskWorkload, *, what: str, progress: Progress) -> dict[str, Tensor]:
    """The first output of every component on all items; of a generative program the answers, as token ids [n, T]."""
    if isinstance(workload, TextGeneration):
        batches = progress.track(_batches(workload), f"answers of {what}", total=len(workload.feeds[MODEL]))
        return {ANSWERS: _joined([_answered(program, workload, *batch) for batch in batches])}
    outputs = {}
    for name, component in program.components.items():
        feeds = workload.feeds[name]
        tracked = progress.track(feeds, f"evaluating {what} {name}", total=len(feeds))
        outputs[name] = run_component(component, tracked)
    return outputs


class ArtifactFiles:
    """The graphs of an artifact in their own runtime, by what a manifest says of them."""

    def __init__(
        self,
        folder: Path,
        components: Mapping[str, ComponentEntry],
        dims: Mapping[str, DimEntry],
        generation: GenerationEntry | None,
    ) -> None:
        self._folder, self._components, self._dims, self._generation = folder, components, dims, generation
        self._sessions: dict[str, Session] = {}

    def outputs(self, workload: TaskWorkload, *, what: str, progress: Progress) -> dict[str, Tensor]:
        """As `program_outputs`; a generative artifact answers from its ONNX files."""
        if isinstance(workload, TextGeneration):
            batches = progress.track(_batches(workload), f"answers of {what}", total=len(workload.feeds[MODEL]))
            return {ANSWERS: _joined([self._answered(workload, *batch) for batch in batches])}
        found = {}
        for name, entry in self._components.items():
            kind, file = next(iter(entry.files.items()))
            run, feeds = open_file(self._folder / file, kind), workload.feeds[name]
            tracked = progress.track(feeds, f"evaluating {what} {name}", total=len(feeds))
            found[name] = torch.cat([run(feed)[0] for feed in tracked])
        return found

    def _session(self, name: str) -> Session:
        if name not in self._sessions:
            entry = self._components[name]
            if "onnx" not in entry.files:
                found = f"holds {name} as {', '.join(entry.files)} only, and answers are written by ONNX Runtime"
                raise ArtifactError(str(self._folder), found, remedy="emit it with --emit onnx")
            opened = open_session(self._folder / entry.files["onnx"])
            self._sessions[name] = Session(name, entry, self._dims, opened)
        return self._sessions[name]

    def _answered(self, workload: TextGeneration, first: int, feed: Feed) -> Tensor:
        assert self._generation is not None
        pixels = feed["pixel_values"].numpy()
        asked = workload.prompts[first : first + len(feed["input_ids"])]
        per_item = len(pixels) // len(asked)
        prompts = [
            Prompt(prompt.token_ids, {"pixel_values": pixels[i * per_item : (i + 1) * per_item]})
            for i, prompt in enumerate(asked)
        ]
        stops = frozenset(workload.prompter.end_tokens)
        limit = _limit(workload, self._dims["sequence"].maximum)
        decoding = Decoding(self._session, self._generation, prompts, stop_tokens=stops, max_new_tokens=limit)
        return torch.stack([torch.from_numpy(tokens) for tokens in decoding], dim=1)


def _batches(workload: TextGeneration) -> Iterator[tuple[int, Feed]]:
    """Every batch with the number of its first item."""
    first = 0
    for feed in workload.feeds[MODEL]:
        yield first, feed
        first += len(feed["input_ids"])


def _answered(program: Program, workload: TextGeneration, first: int, feed: Feed) -> Tensor:
    """Token ids of the answers to one batch, [B, T], -1 behind the end."""
    rows = [prompt.token_ids for prompt in workload.prompts[first : first + len(feed["input_ids"])]]
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    device = device_of(program.components[DECODER].graph)
    stops = frozenset(workload.prompter.end_tokens)
    limit = _limit(workload, program.dims["sequence"].maximum)
    found = greedy(program, ids.to(device), mask.to(device), feed["pixel_values"].to(device), limit, stops)
    return found.cpu()


def _limit(workload: TextGeneration, longest: int) -> int:
    """How many tokens an answer may have: those of the task, as far as the model has room behind the longest prompt."""
    return max(1, min(workload.max_new_tokens, longest - max(len(prompt.token_ids) for prompt in workload.prompts)))


def _joined(answers: list[Tensor]) -> Tensor:
    """Answers of all batches, [n, T]."""
    length = max(tokens.shape[1] for tokens in answers)
    padded = [torch.nn.functional.pad(tokens, (0, length - tokens.shape[1]), value=-1) for tokens in answers]
    return torch.cat(padded)
