"""Adapters as files: written behind a training, and attached to the model they were trained on.

Attaching makes the adapter's place again, by the passes that made it, and puts the file's tensors there. Everything
else stays the tensor that it was, so without the file the model is what it was, to the bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from vlmopt import __version__
from vlmopt.core.adapter_file import AdapterHeader, StepEntry, read_header, steps_text
from vlmopt.core.contract import Context, Promise
from vlmopt.core.errors import ModelError, VlmoptError
from vlmopt.core.program import AdapterSource, Program
from vlmopt.graph.modules import ADAPTERS, has_path
from vlmopt.registry import make_pass
from vlmopt.rewrite.pipeline import StepResult, run_step
from vlmopt.tuning.trainable import frozen, trainable_copy


@dataclass(frozen=True)
class AttachedAdapter:
    """A file's adapter: `tensors` by every place that holds them, `COMPONENT/PATH`."""

    name: str
    header: AdapterHeader
    tensors: Mapping[str, Tensor]

    @property
    def has_heads(self) -> bool:
        """Whether heads of the model were trained beside it."""
        return any(not key.partition("/")[2].startswith(f"{ADAPTERS}.") for key in self.tensors)

    def as_bytes(self) -> bytes:
        """The file."""
        own = {name: tensor.contiguous().cpu().clone() for name, tensor in self.tensors.items()}
        kept = {name: tensor for name, tensor in own.items() if name not in self.header.aliases}
        return save(kept, metadata=self.header.as_metadata())


def attach(
    program: Program, sources: Sequence[AdapterSource], pass_dirs: Sequence[str] = ()
) -> tuple[Program, tuple[AttachedAdapter, ...]]:
    """The program with the first adapter on it, and all of them.

    Raises:
        ModelError: a file is corrupt or no adapter, belongs to another model, or has another place than the first.
    """
    found = tuple(_read(source, program) for source in sources)
    if not found:
        return program, ()
    first = found[0]
    for other in found[1:]:
        if steps_text(other.header) != steps_text(first.header):
            raise ModelError(
                _place(sources[found.index(other)]),
                f"was made by other passes than {first.name}",
                expected="adapters of one kind, which an artifact can hold side by side",
                remedy="give one of them, or train both by the same passes",
            )
    bare = _with_place(program, first, _place(sources[0]), pass_dirs)
    for source, one in zip(sources, found, strict=True):
        _check_fit(bare, one, _place(source))
    digest = hashlib.sha256(program.source.fingerprint.encode() + first.as_bytes()).hexdigest()
    attached = with_tensors(bare, first.tensors)
    return replace(attached, source=replace(program.source, fingerprint=digest)), found


def _place(source: AdapterSource) -> str:
    return f"adapter {source.name} ({source.path})"


def _read(source: AdapterSource, program: Program) -> AttachedAdapter:
    place, path = _place(source), Path(source.path)
    if source.weight != 1.0:
        raise ModelError(place, "has no scale that a weight could change", expected="the weight 1")
    header = read_header(path, place)
    own = program.source.fingerprint
    if header.base != own:
        found = f"was trained on another model ({header.base[:12]}..., and this one is {own[:12]}...)"
        raise ModelError(place, found, remedy="give the model that the adapter was trained on")
    try:
        with safe_open(path, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
    except (SafetensorError, OSError) as error:
        raise ModelError(place, f"cannot be read ({error})", remedy="copy the file again") from error
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ModelError(place, f"{name} holds numbers that are not finite", remedy="train the adapter again")
    return AttachedAdapter(source.name, header, header.places(tensors))


def _with_place(program: Program, adapter: AttachedAdapter, place: str, pass_dirs: Sequence[str]) -> Program:
    """The program behind the passes that made the adapter's place, untrained."""
    folders = [Path(folder) for folder in pass_dirs]
    for number, step in enumerate(adapter.header.steps, 1):
        try:
            pass_ = make_pass(step.name, dict(step.options), folders)
            done = run_step(program, pass_, Context(seed=adapter.header.seed), step=number, only=frozenset(step.sites))
        except VlmoptError as error:
            raise ModelError(place, f"its place cannot be made again ({error.one_line()})") from error
        if lost := sorted(set(step.sites) - {site.name for site in done.applied}):
            found = f"{step.name} finds no {lost[0]} in this model"
            raise ModelError(place, found, remedy="give the model that the adapter was trained on")
        program = done.program
    return program


def places(program: Program) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter under every path that holds it, as `COMPONENT/PATH`."""
    for name, part in program.components.items():
        for path, weight in part.graph.named_parameters(remove_duplicate=False):
            yield f"{name}/{path}", weight


def adapter_places(program: Program) -> dict[str, nn.Parameter]:
    return {key: weight for key, weight in places(program) if key.partition("/")[2].startswith(f"{ADAPTERS}.")}


def _check_fit(program: Program, adapter: AttachedAdapter, place: str) -> None:
    """Tensors without a place, or places without a tensor, would silently change less than the adapter does."""
    every, given = dict(places(program)), adapter.tensors
    remedy = "give the model that the adapter was trained on"
    for names, what in (
        (given.keys() - every.keys(), "have no place in this model"),
        (adapter_places(program).keys() - given.keys(), "are missing"),
    ):
        if names:
            found = f"{len(names)} of its tensors {what} ({', '.join(sorted(names)[:3])})"
            raise ModelError(place, found, remedy=remedy)
    for key, tensor in given.items():
        if (tensor.shape, tensor.dtype) != (every[key].shape, every[key].dtype):
            sizes = [f"{list(one.shape)} {str(one.dtype).removeprefix('torch.')}" for one in (tensor, every[key])]
            raise ModelError(place, f"{key} is {sizes[0]}", expected=f"{sizes[1]}, as in this model", remedy=remedy)


def with_tensors(program: Program, tensors: Mapping[str, Tensor]) -> Program:
    """The program with these values in these places; all other tensors are shared."""
    copied, weights = trainable_copy(program, lambda key: key in tensors)
    with torch.no_grad():
        for key, weight in weights.items():
            weight.copy_(tensors[key])
    return frozen(copied)


def trained_adapter(
    name: str,
    program: Program,
    *,
    base: Program,
    steps: Sequence[StepResult],
    options: Sequence[Mapping[str, object]],
    data: str | None,
    seed: int,
    on: AttachedAdapter | None = None,
) -> AttachedAdapter:
    """What training made of the adapters in the program, and of heads that the model had before, as a file holds it.

    Args:
        base: the model as it was opened; `on` is the adapter that was attached to it then.
        steps, options: the passes that ran before the training, and their options.
    """
    made = tuple(
        StepEntry(name=step.name, options=dict(given), sites=tuple(site.name for site in step.applied))
        for step, given in zip(steps, options, strict=True)
        if step.promise is Promise.LOSSY and step.applied
    )
    tensors = dict[str, Tensor]({**adapter_places(program), **_trained_heads(program, base)})
    first, aliases = dict[int, str](), dict[str, str]()
    for key, tensor in tensors.items():
        if first.setdefault(id(tensor), key) != key:
            aliases[key] = first[id(tensor)]
    header = AdapterHeader(
        vlmopt=__version__,
        base=base.source.fingerprint if on is None else on.header.base,
        data=data,
        steps=made if on is None else (*on.header.steps, *made),
        aliases=aliases,
        seed=seed,
    )
    return AttachedAdapter(name, header, {key: tensor.detach() for key, tensor in tensors.items()})


def _trained_heads(program: Program, base: Program) -> dict[str, Tensor]:
    """Heads that the model had before and that are others now. One that a task brings is fitted on it by every run."""
    found: dict[str, Tensor] = {}
    before = dict(places(base))
    for key, weight in places(program):
        name, _, path = key.partition("/")
        head, old = program.heads.get(name), before.get(key)
        if head is None or old is None or path.rpartition(".")[0] != head or old.shape != weight.shape:
            continue
        if not torch.equal(old, weight):
            found[key] = weight
    return found


def without_adapter(adapter: AttachedAdapter, base: Program) -> AttachedAdapter:
    """The same places with nothing in them: zeros, and the heads of the model as it was opened."""
    before = dict(places(base))
    tensors = {
        key: torch.zeros_like(tensor) if key.partition("/")[2].startswith(f"{ADAPTERS}.") else before[key].detach()
        for key, tensor in adapter.tensors.items()
    }
    return replace(adapter, tensors=tensors)


def is_whole(program: Program, adapter: AttachedAdapter) -> bool:
    """Whether the program still has all places of the adapter and no other: then another can take them."""
    own = {key for key in adapter.tensors if key.partition("/")[2].startswith(f"{ADAPTERS}.")}
    parts = program.components
    heads = (key.split("/", 1) for key in adapter.tensors.keys() - own)
    return own == adapter_places(program).keys() and all(
        name in parts and has_path(parts[name].graph, path) for name, path in heads
    )
