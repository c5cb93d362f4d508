"""Train the projector and the adapters of the LLaVA example on the profile splits of its tasks.

    python examples/llava/train.py                       # goes on where it stopped; Ctrl-C and the time limit stop it
    python examples/llava/train.py --steps 4000 --time-limit 3600

The backbone is frozen and its features are cached. The language model is frozen too, in bfloat16 where the processor
computes in it (measured on a core with AVX512-BF16: see README.md), with adapters of rank 16 in float32. The loss is
the cross-entropy of the answer's tokens alone. After the last step the trained tensors and the log are written beside
this file; until then they lie in CACHE/llava/training, and the same command takes them up there.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import alignment
import neighbours  # noqa: F401  (makes the modules below importable)
import torch
import torch.nn.functional as F
from adapters import PROJECTOR, insert_adapters, projector, save_trained, trained_tensors
from alignment import Whitening
from fetch import BACKBONE, UNREACHABLE, FetchError, UnreachableError, cache_root, fetch
from lessons import Course, Lesson, batches, load_course
from prepare import TRAINED, prepare_model, prepare_tasks, untrained
from torch import Tensor

from vlmopt.core.errors import VlmoptError

LOG = Path(__file__).with_name("train_log.txt")
N_LOGGED = 20
_NO_LABEL = -100


@dataclass(frozen=True)
class Settings:
    """What a checkpoint belongs to; one of other settings is not taken up."""

    seed: int = 0
    batch: int = 8
    adapter_rate: float = 1e-3
    projector_rate: float = 5e-4
    warmup_steps: int = 20
    cooldown_share: float = 0.4  # of all steps, in which the rate falls to a twentieth
    alignment_steps: int = alignment.STEPS


@dataclass
class Progress:
    """Where training stands, beside the tensors."""

    step: int
    seconds: float
    lines: list[str]


class Trainer:
    """The model with its adapters, the optimizer, and what a checkpoint holds of them."""

    def __init__(
        self, model: Any, course: Course, settings: Settings, *, n_steps: int, device: torch.device, frozen: torch.dtype
    ) -> None:
        self.course, self.settings, self.n_steps = course, settings, n_steps
        torch.manual_seed(settings.seed)
        insert_adapters(model)
        self.model = model.to(device)
        self.device = device
        self.whitening = Whitening.of(course.features).to(self.device)
        self.projector: Any = projector(model)
        adapters = [p for name, p in model.named_parameters() if p.requires_grad and PROJECTOR not in name]
        groups = [
            {"params": adapters, "base": settings.adapter_rate},
            {"params": list(self.projector.parameters()), "base": settings.projector_rate},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.adapter_rate, weight_decay=0.01)
        self.progress = Progress(0, 0.0, [])
        for parameter in model.parameters():  # once; autocast would do it again in every step
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(frozen)

    def align(self) -> float:
        """The stage before the language model; see `alignment.py`."""
        embedding = self.model.get_input_embeddings().weight.detach()
        seed, steps = self.settings.seed, self.settings.alignment_steps
        return alignment.align(self.projector, embedding, self.course, self.whitening, seed=seed, steps=steps)

    def step(self, batch: list[Lesson]) -> list[tuple[Lesson, float, bool]]:
        """One step; of every lesson its loss and whether all its tokens were right before the step."""
        logits, wanted, rows = self.answers(batch)
        losses = F.cross_entropy(logits.float(), wanted, reduction="none")
        rate = self._rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["base"]
        self.optimizer.zero_grad()
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], 1.0)
        self.optimizer.step()
        self.progress.step += 1
        return _by_lesson(batch, losses.detach(), logits.argmax(-1) == wanted, rows)

    def answers(self, batch: list[Lesson]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [T, V] of the T answer tokens of the batch, the tokens [T], and the row of the batch of each [T]."""
        ids, labels = _padded(batch)
        features = self.course.features[[lesson.image for lesson in batch]].to(self.device)
        projected = self.projector(self.whitening(features))
        embeds = self.model.get_input_embeddings()(ids.to(self.device))
        is_image = (ids == self.model.config.image_token_id).to(self.device)
        embeds = embeds.masked_scatter(is_image[..., None], projected.to(embeds.dtype))
        # rows are padded behind their end, which a causal model never looks at from before: no mask is needed
        hidden = self.model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        rows, places = (labels[:, 1:] != _NO_LABEL).nonzero(as_tuple=True)
        logits = self.model.lm_head(hidden[rows.to(self.device), places.to(self.device)])
        return logits, labels[rows, places + 1].to(self.device), rows

    def _rate(self) -> float:
        """Share of the learning rate at this step: up, level, down."""
        done, settings = self.progress.step, self.settings
        n_last = max(1, round(settings.cooldown_share * self.n_steps))
        return min((done + 1) / settings.warmup_steps, 1.0, max(0.05, (self.n_steps - done) / n_last))

    def tensors(self) -> dict[str, Tensor]:
        """The trained tensors as the model takes them, whitening folded in."""
        found = {name: value.cpu() for name, value in trained_tensors(self.model).items()}
        weight, bias = (next(n for n in found if n.endswith(f"linear_1.{part}")) for part in ("weight", "bias"))
        folded = self.whitening.to(torch.device("cpu")).folded(found[weight], found[bias])
        return found | {weight: folded[0], bias: folded[1]}

    def save(self, file: Path) -> None:
        """Write a checkpoint; it appears whole or not at all."""
        state = {
            "settings": asdict(self.settings) | {"course": self.course.fingerprint},
            "progress": asdict(self.progress),
            "trained": {name: value.cpu() for name, value in trained_tensors(self.model).items()},
            "optimizer": self.optimizer.state_dict(),
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        torch.save(state, partial)
        partial.rename(file)

    def resume(self, file: Path) -> bool:
        """Take up a checkpoint; returns whether there was one.

        Raises:
            ValueError: it belongs to other settings or other data.
        """
        if not file.is_file():
            return False
        state = torch.load(file, map_location="cpu", weights_only=True)
        wanted = asdict(self.settings) | {"course": self.course.fingerprint}
        if state["settings"] != wanted:
            differ = ", ".join(key for key in wanted if state["settings"].get(key) != wanted[key])
            raise ValueError(f"{file} was made with another {differ}; add --restart to begin anew")
        self.model.load_state_dict(state["trained"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])
        return True


def frozen_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies in it; elsewhere it is emulated, and slower than float32."""
    if device.type == "cuda":
        is_quick = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        is_quick = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if is_quick else torch.float32


def _padded(batch: list[Lesson]) -> tuple[Tensor, Tensor]:
    """Token ids and labels [B, S], padded behind the end; a label stands at its own token's place."""
    length = max(len(lesson.prompt) + len(lesson.answer) for lesson in batch)
    ids = torch.zeros(len(batch), length, dtype=torch.long)
    labels = torch.full_like(ids, _NO_LABEL)
    for row, lesson in enumerate(batch):
        n = len(lesson.prompt) + len(lesson.answer)
        ids[row, :n] = torch.tensor([*lesson.prompt, *lesson.answer])
        labels[row, len(lesson.prompt) : n] = torch.tensor(lesson.answer)
    return ids, labels


def _by_lesson(batch: list[Lesson], losses: Tensor, is_right: Tensor, rows: Tensor) -> list[tuple[Lesson, float, bool]]:
    found = []
    for row, lesson in enumerate(batch):
        own = (rows == row).to(losses.device)
        found.append((lesson, float(losses[own].mean()), bool(is_right[own].all())))
    return found


def train(
    trainer: Trainer, checkpoint: Path, *, time_limit_s: float, save_every_s: float, log: Callable[[str], None]
) -> bool:
    """Take steps until all are done, the time is over or a signal asks to stop; returns whether all are done."""
    began = saved = time.monotonic()
    seconds_before = trainer.progress.seconds
    recent: list[tuple[Lesson, float, bool]] = []
    source = batches(
        trainer.course, size=trainer.settings.batch, seed=trainer.settings.seed, first=trainer.progress.step
    )
    with _stopping() as is_stopped:
        while trainer.progress.step < trainer.n_steps and not is_stopped() and time.monotonic() - began < time_limit_s:
            recent += trainer.step(next(source))
            now = time.monotonic()
            trainer.progress.seconds = seconds_before + now - began
            if trainer.progress.step % N_LOGGED == 0:
                log(f"step {trainer.progress.step}, {trainer.progress.seconds:.0f} s: {_summary(recent)}")
                recent = []
            if now - saved > save_every_s:
                trainer.save(checkpoint)
                saved = now
    trainer.save(checkpoint)
    return trainer.progress.step >= trainer.n_steps


@contextmanager
def _stopping() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or a request to end came; the step that runs then is finished and saved first."""
    asked: list[int] = []
    before = {kind: signal.signal(kind, lambda kind, _: asked.append(kind)) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _summary(recent: list[tuple[Lesson, float, bool]]) -> str:
    """Mean loss and share of wholly right answers by task, on lessons as they were before they were learnt."""
    counts = Counter(lesson.task for lesson, _, _ in recent)
    parts = []
    for task in sorted(counts):
        own = [(loss, is_right) for lesson, loss, is_right in recent if lesson.task == task]
        loss, right = (sum(values) / len(own) for values in zip(*own, strict=True))
        parts.append(f"{task} {loss:.2f} {100 * right:.0f} %")
    return ", ".join(parts)


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        return _run(options)
    except (FetchError, ValueError, VlmoptError) as error:
        print(f"train: {error}", file=sys.stderr)
        return UNREACHABLE if isinstance(error, UnreachableError) else 1


def _run(options: argparse.Namespace) -> int:
    home = cache_root() / "llava"
    tasks = prepare_tasks(cache_root())
    folder = prepare_model(home / "model", trained=TRAINED)
    model, _ = untrained(fetch([BACKBONE])[0])
    course = load_course(model, folder, tasks, home / "training")
    device = torch.device(options.device)
    frozen = frozen_dtype(device)
    trainer = Trainer(model, course, Settings(), n_steps=options.steps, device=device, frozen=frozen)
    checkpoint = home / "training" / "checkpoint.pt"

    def log(line: str) -> None:
        trainer.progress.lines.append(line)
        print(line, flush=True)

    if options.restart or not trainer.resume(checkpoint):
        counts = ", ".join(f"{name} {len(lessons)}" for name, lessons in course.lessons.items())
        log(f"torch {torch.__version__}, {options.threads} threads, {device}, {frozen}; lessons: {counts}")
        log(f"{trainer.settings}")
        log(f"alignment without the language model: {100 * trainer.align():.0f} % right")
    log(f"from step {trainer.progress.step} to {options.steps}")
    limit = options.time_limit or float("inf")
    is_done = train(trainer, checkpoint, time_limit_s=limit, save_every_s=options.save_every, log=log)
    if not is_done:
        print(f"stopped at step {trainer.progress.step} of {options.steps}; the same command goes on from here")
        return 0
    save_trained(trainer.tensors(), options.out)
    options.log.write_text("\n".join(trainer.progress.lines) + "\n", encoding="utf-8")
    print(f"{options.out} is written; prepare.py puts it into the model")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="steps in all (default: %(default)s)")
    parser.add_argument("--time-limit", type=float, help="seconds after which this run stops, to be gone on with")
    parser.add_argument(
        "--save-every", type=float, default=180, help="seconds between checkpoints (default: %(default)s)"
    )
    parser.add_argument("--restart", action="store_true", help="forget the checkpoint")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=TRAINED)
    parser.add_argument("--log", type=Path, default=LOG)
    return parser


if __name__ == "__main__":
    sys.exit(main())
