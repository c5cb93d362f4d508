"""Gradient recovery: adapters or all kept weights are trained on the program's own graph.

The state after every epoch is kept, and a run that was stopped goes on from there with the same numbers: the order of
items comes from the seed and the epoch, and the learning rate from the step. The result is the epoch with the best
metric on validation (of equal ones the one of least loss), the untuned program among them, so tuning never ends worse
there than it began. The metric decides and not the loss, since a program that grows sure of itself loses more on what
it gets wrong while it gets more right.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from vlmopt.core.errors import TuningError
from vlmopt.core.program import Component, Program
from vlmopt.core.progress import Progress
from vlmopt.core.workload import Feed, Outputs, PreferenceWorkload, TrainableWorkload, Workload, by_part
from vlmopt.graph.head import head_features
from vlmopt.graph.replay import device_of, inputs_of, run_component
from vlmopt.tuning.objective import Teacher, objective, preference
from vlmopt.tuning.settings import TuningSettings
from vlmopt.tuning.trainable import Wanted, frozen, trainable_copy


@dataclass(frozen=True)
class Epoch:
    """One line of the history; `train_loss` is None for epoch 0, the program before tuning."""

    number: int
    train_loss: float | None
    validation_loss: float
    validation_score: float  # mean of the item scores, in [0, 1]
    seconds: float
    part_scores: Mapping[str, float] = field(default_factory=dict)  # the same by task, where several share the program

    @property
    def rank(self) -> tuple[float, float]:
        """The better epoch has the greater one."""
        return self.validation_score, -self.validation_loss


@dataclass(frozen=True)
class Tuned:
    """The program of the best epoch, and how it went."""

    program: Program
    history: tuple[Epoch, ...]
    best: int
    n_trainable: int


@dataclass(frozen=True)
class State:
    """All that a training needs to go on: weights as they are, the best ones, and the optimizer's moments."""

    tensors: Mapping[str, Tensor]
    step: int
    best: int
    history: tuple[Epoch, ...]


class Store(Protocol):
    """Keeps the state of a training between epochs."""

    def load(self) -> State | None:
        """What was saved last, if anything."""
        ...

    def save(self, state: State) -> None: ...


class NoStore:
    """Keeps nothing."""

    def load(self) -> State | None:
        return None

    def save(self, state: State) -> None:
        return None


def teacher_of(program: Program, workload: Workload, *, progress: Progress) -> Teacher:
    """Outputs and head features of the original on every row of the workload."""
    outputs, features = {}, {}
    for name, feeds in workload.feeds.items():
        component = program.components[name]
        watch = head_features(component, program.heads.get(name))
        rows = []
        for feed in progress.track(feeds, f"running the original {name}", total=len(feeds)):
            with torch.no_grad():
                rows.append([value.cpu() for value in _forward(component, feed, watch.name)])
        outputs[name] = torch.cat([row[0] for row in rows])
        features[name] = torch.cat([row[1] for row in rows])
    return Teacher(outputs, features, are_logits=bool(program.labels) and program.similarity is None)


def tune(
    program: Program,
    wanted: Wanted,
    fit: TrainableWorkload,
    check: Workload,
    teacher: Teacher | None,
    settings: TuningSettings,
    *,
    progress: Progress,
    store: Store | None = None,
) -> Tuned:
    """Trains the wanted weights on `fit`, looking at `check` after every epoch.

    Args:
        teacher: the original on every row of `fit`; None where the settings distil nothing.

    Raises:
        TuningError: nothing to train, nothing to distil from, a loss that is not finite, or too little memory.
    """
    if settings.distils and teacher is None:
        raise TuningError("tuning", "there is no teacher", expected="the original's outputs, which the settings need")
    student, weights = trainable_copy(program, wanted)
    if not weights:
        remedy = "insert adapters, or let all kept weights train"
        raise TuningError("tuning", "no weight is to be trained", remedy=remedy)
    training = _Training(student, weights, fit, check, teacher, settings, progress, store or NoStore())
    try:
        training.run()
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise TuningError(
            "tuning", "memory is not enough for a step", remedy=f"lower batch_items (now {settings.batch_items})"
        ) from error
    return Tuned(
        frozen(student), tuple(training.history), training.best, sum(weight.numel() for weight in weights.values())
    )


class _Training:
    def __init__(
        self,
        program: Program,
        weights: Mapping[str, nn.Parameter],
        fit: TrainableWorkload,
        check: Workload,
        teacher: Teacher | None,
        settings: TuningSettings,
        progress: Progress,
        store: Store,
    ) -> None:
        self.program, self.weights, self.fit, self.check = program, dict(weights), fit, check
        self.teacher, self.settings, self.progress, self.store = teacher, settings, progress, store
        self.optimizer = torch.optim.AdamW(self._groups(), betas=(0.9, 0.98), fused=True)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.n_steps = settings.epochs * -(-fit.n_items // settings.batch_items)
        self.history: list[Epoch] = []
        self.best, self.best_weights = 0, self._copied()
        self.step = 0

    def _groups(self) -> list[dict[str, object]]:
        heads = {f"{name}/{path}." for name, path in self.program.heads.items()}
        settings = self.settings
        groups = []
        for name, weight in self.weights.items():
            factor = settings.head_factor if any(name.startswith(head) for head in heads) else 1.0
            decay = settings.weight_decay if weight.ndim > 1 else 0.0
            groups.append({"params": [weight], "lr": settings.learning_rate * factor, "weight_decay": decay})
        return groups

    def run(self) -> None:
        if not self._resume():
            self._look(0, None, 0.0)
        for number in range(len(self.history), self.settings.epochs + 1):
            if number - 1 - self.best >= self.settings.patience:
                break
            start = time.perf_counter()
            loss = self._epoch(number)
            self._look(number, loss, time.perf_counter() - start)
            self._save()
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(self.best_weights[name])

    def _epoch(self, number: int) -> float:
        """One pass over the items in an order of its own; the mean loss."""
        generator = torch.Generator().manual_seed(self.settings.seed * 100_003 + number)
        order = torch.randperm(self.fit.n_items, generator=generator)
        parts = torch.split(order, self.settings.batch_items)
        total = 0.0
        for items in self.progress.track(parts, f"tuning, epoch {number} of {self.settings.epochs}", total=len(parts)):
            total += self._train_on(items.tolist()) * len(items)
        return total / self.fit.n_items

    def _train_on(self, items: Sequence[int]) -> float:
        part = self.fit.part(items)
        rows = {name: list(self.fit.rows(name, items)) for name in self.fit.feeds}
        outputs, features = self._run(part)
        loss = objective(
            part,
            outputs,
            features,
            None if self.teacher is None else self.teacher.of_rows(rows),
            distillation=self.settings.distillation,
            feature_distillation=self.settings.feature_distillation,
        )
        if self.settings.preference > 0:
            loss = loss + self.settings.preference * self._preference(part, outputs)
        if not torch.isfinite(loss):
            raise TuningError(
                f"tuning, step {self.step + 1}", "the loss is not a finite number",
                remedy=f"lower learning_rate (now {self.settings.learning_rate:g})",
            )  # fmt: skip
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.weights.values(), self.settings.gradient_norm)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * _schedule(self.step, self.n_steps, self.settings.warm_up)
        self.optimizer.step()
        self.step += 1
        return float(loss.detach())

    def _preference(self, part: Workload, outputs: Outputs) -> Tensor:
        """The mean preference that is lacking on these items."""
        if not isinstance(part, PreferenceWorkload):
            found = "there are no rejected answers that the expected ones are preferred to"
            raise TuningError("tuning", found, expected="a task with questions, answers and rejected answers")
        rejected = part.rejected()
        against = rejected.losses(self._run(rejected)[0])
        beta, gamma = self.settings.preference_beta, self.settings.preference_gamma
        return preference(part.losses(outputs), against, beta=beta, gamma=gamma).mean()

    def _run(self, part: Workload) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Outputs and features of every component on the part's rows, with gradients."""
        outputs, features = {}, {}
        is_half = self.settings.precision == "bfloat16"
        for name, feeds in part.feeds.items():
            component = self.program.components[name]
            watch = head_features(component, self.program.heads.get(name)).name
            made = []
            for feed in feeds:
                with torch.autocast(device_of(component.graph).type, torch.bfloat16, enabled=is_half):
                    made.append(_forward(component, feed, watch))
            # On the CPU, where labels and references are; gradients find their way back.
            outputs[name] = torch.cat([one[0] for one in made]).float().cpu()
            features[name] = torch.cat([one[1] for one in made]).float().cpu()
        return outputs, features

    def _look(self, number: int, loss: float | None, seconds: float) -> None:
        """Measures the program on the validation workload and keeps its weights where it is the best so far."""
        outputs = {}
        for name, feeds in self.check.feeds.items():
            tracked = self.progress.track(feeds, f"checking {name}", total=len(feeds))
            outputs[name] = run_component(self.program.components[name], tracked)
        loss_now, scores = float(self.check.losses(outputs).mean()), self.check.item_scores(outputs)
        parts = {name: float(own.mean()) for name, own in by_part(self.check, scores).items()}
        found = Epoch(number, loss, loss_now, float(scores.mean()), seconds, parts)
        self.history.append(found)
        if number and found.rank > self.history[self.best].rank:
            self.best, self.best_weights = number, self._copied()

    def _copied(self) -> dict[str, Tensor]:
        return {name: weight.detach().clone() for name, weight in self.weights.items()}

    def _save(self) -> None:
        tensors = {f"now|{name}": weight.detach() for name, weight in self.weights.items()}
        tensors |= {f"best|{name}": weight for name, weight in self.best_weights.items()}
        for name, weight in self.weights.items():
            state = self.optimizer.state[weight]
            tensors |= {f"optimizer|{name}|{key}": state[key] for key in ("step", "exp_avg", "exp_avg_sq")}
        self.store.save(State(tensors, self.step, self.best, tuple(self.history)))

    def _resume(self) -> bool:
        """Takes up what an earlier, stopped training saved."""
        kept = self.store.load()
        if kept is None:
            return False
        tensors = kept.tensors
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(tensors[f"now|{name}"])
                self.best_weights[name] = tensors[f"best|{name}"].to(weight)
                keys = ("step", "exp_avg", "exp_avg_sq")
                self.optimizer.state[weight] = {
                    key: tensors[f"optimizer|{name}|{key}"].to(weight.device) for key in keys
                }
        self.step, self.best, self.history = kept.step, kept.best, list(kept.history)
        return True


def _schedule(step: int, n_steps: int, warm_up: float) -> float:
    """Share of the learning rate at a step: linear from zero, then a cosine to zero."""
    first = max(1, round(warm_up * n_steps))
    if step < first:
        return (step + 1) / first
    return 0.5 * (1.0 + math.cos(math.pi * (step - first) / max(1, n_steps - first)))


def _forward(component: Component, feed: Feed, watch: str) -> tuple[Tensor, Tensor]:
    """First output and the value of the node `watch` from one run of the graph, with gradients where they are on."""
    seen = _Watching(component.graph, watch)
    output = seen.run(*inputs_of(component, feed))[0]
    return output, seen.value


class _Watching(torch.fx.Interpreter):
    """Runs a graph and keeps the value of one node; values are freed after their last reader."""

    def __init__(self, graph: nn.Module, watch: str) -> None:
        super().__init__(graph)
        self._watch = watch
        self.value = torch.empty(0)

    def run_node(self, node: torch.fx.Node) -> object:
        value: object = super().run_node(node)
        if node.name == self._watch:
            assert isinstance(value, Tensor)
            self.value = value
        return value
