"""Trains the embedded model from nothing on freshly drawn scenes and writes it as a Hugging Face folder.

    python examples/embedded/train.py --out examples/embedded/model --force

One CPU thread is enough. Products run in bfloat16, which is quick only on a processor with units for it (`--float32`
switches that off). The state is saved at every evaluation beside the model, and a killed run continues from there.

Two stages. In the first only the lower half of the layers runs, and learns from the hints alone to tell what each patch
shows and which things a question names. In the second the whole model learns to answer, and the hints fade out.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from batches import Batch, make_chunk, split
from network import Hints, build_model, build_processor, fast_path, first_layers
from questions import KINDS
from torch import nn
from transformers import PreTrainedTokenizerBase, ViltForQuestionAnswering

STEPS_PER_CHUNK = 20
CHECK_ROWS = 2000


def main() -> int:
    """Train, or continue, and leave the model folder and the log."""
    options = _options()
    state_file = options.out.with_name(options.out.name + ".state.pt")
    if (options.out / "config.json").exists() and not state_file.exists() and not options.force:
        print(f"{options.out} holds a model already; give --force to train a new one over it", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    trainer = Trainer(options, state_file)
    with fast_path():
        trainer.run()
    state_file.unlink()
    return 0


def _options() -> argparse.Namespace:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=here / "model", help="folder of the model (default: %(default)s)")
    parser.add_argument("--log", type=Path, default=here / "train_log.txt", help="log file (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--look-steps", type=int, default=1800, help="steps of the first stage (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5000, help="steps of both stages together (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="questions a step (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=1e-3, help="highest learning rate (default: %(default)s)")
    parser.add_argument("--check-every", type=int, default=500, help="steps between evaluations (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--float32", action="store_true", help="do not use bfloat16 for the products")
    parser.add_argument("--force", action="store_true", help="train over a model that is already there")
    return parser.parse_args()


class Trainer:
    """The model, its optimizer and where the run stands."""

    def __init__(self, options: argparse.Namespace, state_file: Path) -> None:
        self.options = options
        self.state_file = state_file
        self.model: ViltForQuestionAnswering = build_model(options.seed)
        self.processor = build_processor()
        self.tokenizer: PreTrainedTokenizerBase = self.processor.tokenizer
        self.hints = Hints(self.model.config.hidden_size)
        self.optimizer = torch.optim.AdamW(_weight_groups(self.model, self.hints), betas=(0.9, 0.98), fused=True)
        self.step = 0
        self.seconds = 0.0
        if state_file.exists():
            self._load()
        else:
            options.log.write_text("", encoding="utf-8")
            n_parameters = sum(p.numel() for p in self.model.parameters())
            self._log(
                f"seed {options.seed}, {options.steps} steps of {options.batch} questions, {n_parameters} parameters"
            )

    def run(self) -> None:
        """All remaining steps, with a line of progress every 50 and an evaluation every `--check-every`."""
        begun = time.perf_counter() - self.seconds
        seen = Score()
        for batch in self._batches():
            seen.add(batch, *self._learn(batch))
            self.step += 1
            self.seconds = time.perf_counter() - begun
            if self.step % 50 == 0:
                left = self.seconds / self.step * (self.options.steps - self.step)
                print(f"step {self.step} {seen.line()}  {left / 60:.0f} min left", flush=True)
                seen = Score()
            if self.step % self.options.check_every == 0 or self.step == self.options.steps:
                self._check()

    def _batches(self) -> Iterator[Batch]:
        """The batches from `self.step` on.

        What a chunk holds depends on its number alone, so a continued run sees the rows of an unbroken one.
        """
        options = self.options
        while self.step < options.steps:
            start = self.step - self.step % STEPS_PER_CHUNK
            chunk = make_chunk(
                f"{options.seed}/train/{start // STEPS_PER_CHUNK}",
                self.tokenizer,
                n_rows=STEPS_PER_CHUNK * options.batch,
                has_one_kind_per_scene=start < options.look_steps,
            )
            yield from list(split(chunk, options.batch))[self.step - start : options.steps - start]

    def _learn(self, batch: Batch) -> tuple[torch.Tensor, float]:
        """One step; returns the answers given and the loss, which in the first stage are none and the hint loss."""
        self.model.train()
        is_looking = self.step < self.options.look_steps
        done = max(0.0, (self.step - self.options.look_steps) / (self.options.steps - self.options.look_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.rate * min(1.0, self.step / 200) * 0.5 * (1 + math.cos(math.pi * done))
        with torch.autocast("cpu", torch.bfloat16, enabled=not self.options.float32):
            if is_looking:
                answers = torch.full_like(batch.labels, -1)
                total = loss = self._hint(batch, first_layers(self.model, batch.ids, batch.mask, batch.pixels))
            else:
                out = self.model(
                    input_ids=batch.ids, attention_mask=batch.mask, pixel_values=batch.pixels, output_hidden_states=True
                )
                answers = out.logits.argmax(-1)
                loss = nn.functional.cross_entropy(out.logits.float(), batch.labels)
                total = loss + max(0.0, 1 - done / 0.8) * self._hint(batch, out.hidden_states)
        self.optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return answers, float(loss.detach())

    def _hint(self, batch: Batch, layers: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return self.hints(layers, batch.shapes, batch.colours, batch.first, batch.second)

    def _check(self) -> None:
        """Accuracy on scenes outside the training stream, in float32; then save the model and the state."""
        self.model.eval()
        score = Score()
        chunk = make_chunk(f"{self.options.seed}/check", self.tokenizer, n_rows=CHECK_ROWS)
        with torch.inference_mode():
            for batch in split(chunk, 200):
                logits = self.model(input_ids=batch.ids, attention_mask=batch.mask, pixel_values=batch.pixels).logits
                score.add(batch, logits.argmax(-1), float(nn.functional.cross_entropy(logits, batch.labels)))
        self._log(f"step {self.step:5d}  {self.seconds / 60:5.1f} min  {score.line()}")
        self.model.save_pretrained(self.options.out)
        self.processor.save_pretrained(self.options.out)
        self._save()

    def _save(self) -> None:
        parts = {"model": self.model, "hints": self.hints, "optimizer": self.optimizer}
        state = {name: part.state_dict() for name, part in parts.items()}
        beside = self.state_file.with_suffix(".new")
        torch.save({**state, "step": self.step, "seconds": self.seconds, "setup": self._setup()}, beside)
        beside.replace(self.state_file)

    def _load(self) -> None:
        state = torch.load(self.state_file)
        if state["setup"] != self._setup():
            found, wanted = state["setup"], self._setup()
            raise SystemExit(f"{self.state_file} is of a run with {found}, not {wanted}; delete it to start anew")
        self.model.load_state_dict(state["model"])
        self.hints.load_state_dict(state["hints"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]

    def _setup(self) -> dict[str, float]:
        return {name: getattr(self.options, name) for name in ("seed", "look_steps", "steps", "batch", "rate")}

    def _log(self, line: str) -> None:
        print(line, flush=True)
        with self.options.log.open("a", encoding="utf-8") as log:
            log.write(line + "\n")


class Score:
    """Mean loss, and accuracy per kind of question."""

    def __init__(self) -> None:
        self._loss, self._n_batches = 0.0, 0
        self._right = torch.zeros(len(KINDS))
        self._asked = torch.zeros(len(KINDS))

    def add(self, batch: Batch, answers: torch.Tensor, loss: float) -> None:
        """Count one batch."""
        self._loss += loss
        self._n_batches += 1
        self._asked += torch.bincount(batch.kinds, minlength=len(KINDS))
        self._right += torch.bincount(batch.kinds[answers == batch.labels], minlength=len(KINDS))

    def line(self) -> str:
        """For instance `loss 0.310  colour 0.991  shape 0.985  count 0.903  relation 0.751`."""
        shares = "  ".join(f"{kind} {share:.3f}" for kind, share in zip(KINDS, self._right / self._asked, strict=True))
        return f"loss {self._loss / self._n_batches:.3f}  {shares}"


def _weight_groups(*modules: nn.Module) -> list[dict[str, object]]:
    """Weight decay on matrices only."""
    weights = [weight for module in modules for weight in module.parameters()]
    return [
        {"params": [w for w in weights if w.ndim == 2], "weight_decay": 0.03},
        {"params": [w for w in weights if w.ndim != 2], "weight_decay": 0.0},
    ]


if __name__ == "__main__":
    raise SystemExit(main())
