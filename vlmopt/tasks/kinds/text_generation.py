"""Answers that a model writes, to questions about images or as captions: taught token by token, and judged as texts.

Losses and scores come from one of two outputs. A component `model` reads the expected answer behind the prompt and says
of each of its tokens how likely it is, and how far it leads the next best; that costs one pass, so profiling and
planning use it. Generated token ids, under the name `answers`, are judged by the task's metric.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlmopt.core.errors import TaskError
from vlmopt.core.program import Assembly, Program
from vlmopt.core.workload import Outputs
from vlmopt.graph.joined import MODEL as MODEL
from vlmopt.prompting import Prompter
from vlmopt.tasks.answers import Answer, Query, Slice, named_slices, question_slices
from vlmopt.tasks.dataset import Task
from vlmopt.tasks.feeding import Batches, Feeder
from vlmopt.tasks.folder import SPLITS
from vlmopt.tasks.measures import RIGHT_FROM, Measure, corpus_percentages, measures
from vlmopt.tasks.scoring import percent
from vlmopt.tasks.specification import QUESTION_PLACE, TaskKind
from vlmopt.tasks.splits import Sample
from vlmopt.tasks.taught_rows import Prompt, TaughtRows

ANSWERS = "answers"  # generated token ids [n, T], int64, -1 behind the end of an answer
MARGIN_TOKENS = 4  # how many tokens longer than any reference an answer may grow
_ANOTHER = "another answer"


def bind(program: Program, task: Task, feeder: Feeder) -> Program:
    """The program as it is, for a model that writes text.

    Raises:
        TaskError: the model writes none.
    """
    if program.assembly is not Assembly.GENERATIVE:
        raise _writes_nothing(program, task)
    return program.with_components(program.components)


def _writes_nothing(program: Program, task: Task) -> TaskError:
    kind = task.specification.kind.value
    found = f"{kind} needs a model that writes text, and this {program.source.model_type} model is no such model"
    return TaskError(str(task.path), found, remedy="choose a generative model (LLaVA, InternVL)")


@dataclass(frozen=True, eq=False)
class RejectedAnswers:
    """Rows with the rejected answers in the places of the expected ones; `n_tokens` is their length, [n]."""

    feeds: Batches
    n_tokens: Tensor

    def part(self, items: Sequence[int]) -> RejectedAnswers:
        return RejectedAnswers(self.feeds.part(items), self.n_tokens[list(items)])


@dataclass(eq=False)
class TextGeneration:
    """One split; an item is a prompt with an image, and so is a row of `model`.

    `n_answer_tokens` holds the length of every expected answer, its end token included; it stands at the end of its
    row. Of several references the first is the one that is taught.
    """

    fingerprint: str
    n_items: int
    feeds: Mapping[str, Batches]
    kind: TaskKind
    metric: str
    measures: Mapping[str, Measure]
    samples: Sequence[Sample]
    item_groups: Sequence[str]
    prompts: Sequence[Prompt]
    n_answer_tokens: Tensor  # [n]
    max_new_tokens: int
    prompter: Prompter
    rejected_answers: RejectedAnswers | None = None

    def losses(self, outputs: Outputs) -> Tensor:
        """The mean negative log-probability of the tokens of the expected answer, from the output of `model`."""
        scores = outputs[MODEL].double()
        return -torch.where(self._is_answer(scores), scores[..., 0], 0.0).sum(1) / self.n_answer_tokens

    def item_scores(self, outputs: Outputs) -> Tensor:
        """The metric of generated answers; without them 1 where greedy decoding would give exactly the expected one."""
        if ANSWERS in outputs:
            return self._measured(self.measures[self.metric], self._texts(outputs))
        return (self._n_right(outputs) == self.n_answer_tokens).double()

    def metrics(self, outputs: Outputs) -> dict[str, float]:
        """All measures of generated answers. Without them the metric is the share of answers that greedy decoding
        would give exactly, and beside it stands the share of their tokens."""
        if ANSWERS not in outputs:
            share = 100 * float(self._n_right(outputs, is_prefix=False).sum() / self.n_answer_tokens.sum())
            return {self.metric: percent(self.item_scores(outputs)), "token_accuracy": share}
        texts = self._texts(outputs)
        found = {name: percent(self._measured(measure, texts)) for name, measure in self.measures.items()}
        return found | corpus_percentages(self.kind, texts, [sample.references for sample in self.samples])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of generated token ids."""
        return self.prompter.decode([int(token) for token in ids])

    def head_targets(self, component: str, reference: Outputs) -> Tensor | None:
        """Nothing: the last linear map gives the words of a language, which no single task can fit."""
        return None

    def groups(self, component: str) -> Sequence[str]:
        return self.item_groups

    def rows(self, component: str, items: Sequence[int]) -> Sequence[int]:
        return items

    def part(self, items: Sequence[int]) -> TextGeneration:
        """These items alone; captions are still measured with the document frequencies of the whole split."""
        return replace(
            self,
            n_items=len(items),
            feeds={name: feeds.part(items) for name, feeds in self.feeds.items()},
            samples=[self.samples[item] for item in items],
            item_groups=[self.item_groups[item] for item in items],
            prompts=[self.prompts[item] for item in items],
            n_answer_tokens=self.n_answer_tokens[list(items)],
            rejected_answers=None if self.rejected_answers is None else self.rejected_answers.part(items),
        )

    def rejected(self) -> TextGeneration:
        """The same items, and how likely their rejected answers are."""
        missing = next((sample for sample in self.samples if not sample.rejected), None)
        if self.rejected_answers is None or missing is not None:
            origin = self.samples[0].origin if missing is None else missing.origin
            remedy = "`columns: {rejected: COLUMN}` in task.yaml names them; `vlmopt triples` makes them"
            raise TaskError(origin, "has no rejected answer, which tuning by preference needs", remedy=remedy)
        own = self.rejected_answers
        return replace(self, feeds={MODEL: own.feeds}, n_answer_tokens=own.n_tokens, rejected_answers=None)

    def queries(self) -> Sequence[Query]:
        return [
            Query(
                name=sample.image.name,
                question=sample.text,
                expected=_listed(sample.references),
                picture=sample.image,
                kind=sample.label if sample.text else self.kind.value,
                group=sample.group,
            )
            for sample in self.samples
        ]

    def answers(self, outputs: Outputs) -> Sequence[Answer]:
        """The generated texts; without them only whether greedy decoding would give the expected one, and how far."""
        if ANSWERS not in outputs:
            found = zip(self.samples, self._n_right(outputs).tolist(), self.n_answer_tokens.tolist(), strict=True)
            return [
                Answer(sample.label, is_right=True)
                if n_right == n
                else Answer(_ANOTHER, is_right=False, note=f"it departs at token {int(n_right) + 1} of {n}")
                for sample, n_right, n in found
            ]
        scores = self.item_scores(outputs).tolist()
        enough = RIGHT_FROM[self.metric]
        return [
            Answer(text, score >= enough, note=f"{self.metric} {100 * score:.0f} %" if enough < 1 else "")
            for text, score in zip(self._texts(outputs), scores, strict=True)
        ]

    def slices(self, outputs: Outputs) -> Sequence[Slice]:
        """By the question and the type of its answer; captions are all alike."""
        scores = self.item_scores(outputs)
        if self.kind is TaskKind.IMAGE_CAPTIONING:
            return named_slices(["all captions"] * self.n_items, scores)
        return question_slices(self.samples, scores)

    def _is_answer(self, scores: Tensor) -> Tensor:
        """Which places of the rows [n, S, 2] hold the answer, [n, S]: the last ones."""
        from_end = torch.arange(scores.shape[1], 0, -1)
        return from_end[None] <= self.n_answer_tokens[:, None]

    def _n_right(self, outputs: Outputs, *, is_prefix: bool = True) -> Tensor:
        """Tokens of the answer that lead all others, [n]: those before the first that does not, or all."""
        scores = outputs[MODEL]
        is_answer = self._is_answer(scores)
        leads = (scores[..., 1] > 0) & torch.isfinite(scores).all(-1)
        if not is_prefix:
            return (leads & is_answer).sum(1)
        return ((leads | ~is_answer).cumprod(1).bool() & is_answer).sum(1)

    def _texts(self, outputs: Outputs) -> list[str]:
        return [self.decode(row) for row in outputs[ANSWERS].tolist()]

    def _measured(self, measure: Measure, texts: Sequence[str]) -> Tensor:
        pairs = zip(texts, self.samples, strict=True)
        return torch.tensor([measure(text, sample.references) for text, sample in pairs], dtype=torch.float64)


def _listed(references: Sequence[str]) -> str:
    """The reference that is taught, and how many others count as right."""
    n_others = len(set(references)) - 1
    return references[0] if not n_others else f"{references[0]} (or one of {n_others} more)"


def workload(program: Program, task: Task, samples: Sequence[Sample], feeder: Feeder) -> TextGeneration:
    """The workload of these samples; `program` comes from `bind`, in its components or joined to one `model`.

    Raises:
        TaskError: a prompt with its answer is longer than the model reads, or the model writes no text.
    """
    generation = program.generation
    if generation is None:
        raise _writes_nothing(program, task)
    prompter = Prompter.of(feeder.preprocessor, generation)
    asked = {sample.text: _asked(task, sample.text) for sample in samples}
    encoded = {text: tuple(prompter.encode(prompt, 1)) for text, prompt in asked.items()}
    prompts = [Prompt(encoded[sample.text], (sample.image,)) for sample in samples]
    answers = [prompter.encode_answer(sample.label) for sample in samples]
    rows = TaughtRows(program, prompts, answers, feeder, pad=prompter.pad_token)
    rows.check(samples)
    rejected = None
    if all(sample.rejected for sample in samples):
        wrong = [prompter.encode_answer(sample.rejected) for sample in samples]
        others = TaughtRows(program, prompts, wrong, feeder, pad=prompter.pad_token)
        others.check(samples)
        lengths = torch.tensor([len(answer) for answer in wrong])
        rejected = RejectedAnswers(Batches(len(samples), others.feed), lengths)
    return TextGeneration(
        fingerprint=task.fingerprint_of(samples),
        n_items=len(samples),
        feeds={MODEL: Batches(len(samples), rows.feed)},
        kind=task.specification.kind,
        metric=task.specification.headline,
        measures=measures(task.specification.kind, [sample.references for sample in samples]),
        samples=samples,
        item_groups=[sample.group for sample in samples],
        prompts=prompts,
        n_answer_tokens=torch.tensor([len(answer) for answer in answers]),
        max_new_tokens=task.specification.max_new_tokens or _longest_reference(task, prompter) + MARGIN_TOKENS,
        prompter=prompter,
        rejected_answers=rejected,
    )


def _asked(task: Task, question: str) -> str:
    prompt = task.specification.prompt
    if task.specification.kind is TaskKind.IMAGE_CAPTIONING:
        return prompt
    return prompt.replace(QUESTION_PLACE, question) if prompt else question


def _longest_reference(task: Task, prompter: Prompter) -> int:
    """Tokens of the longest reference of all splits, without its end."""
    texts = {text for split in SPLITS for sample in task.all_samples(split) for text in sample.references}
    return max(len(prompter.encode_answer(text)) - 1 for text in texts)
