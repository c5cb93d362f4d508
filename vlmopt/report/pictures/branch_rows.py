"""What a picture says about a branch: its numbers, the value behind its colour, and the evidence for its fate."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vlmopt.report.naming import kind_words
from vlmopt.report.pictures.scale import Scale, is_known
from vlmopt.report.quantities import count, share

LOSS = "importance: increase of the loss without the branch"


@dataclass(frozen=True)
class BranchRow:
    """A branch as it is drawn. `is_kept` is None where nobody decided; `fate` says who cut it or why it stays."""

    name: str
    kind: str
    layer: int | None
    params: int
    macs: int
    score: float | None = None
    stderr: float | None = None
    is_kept: bool | None = None
    fate: str = ""


@dataclass(frozen=True)
class Measure:
    """What the colours stand for, on a scale that all components share."""

    scale: Scale
    title: str
    is_score: bool
    total_macs: int

    @classmethod
    def of(cls, rows: Iterable[BranchRow], *, title: str = LOSS) -> Measure:
        """The scores, described by `title`; where there are none, the share of MACs."""
        listed = list(rows)
        total = sum(row.macs for row in listed)
        if any(is_known(row.score) for row in listed):
            return cls(Scale.over((row.score for row in listed), is_root=True), title, True, total)
        shares = (row.macs / total for row in listed if total)
        return cls(Scale.over(shares, is_root=False), "share of the MACs of all branches", False, total)

    def value(self, row: BranchRow) -> float | None:
        """The number behind the colour of the branch."""
        if self.is_score:
            return row.score
        return row.macs / self.total_macs if self.total_macs else None

    def text(self, value: float | None) -> str:
        if value is None or not is_known(value):
            return "–"
        if not self.is_score:
            return f"{100 * value:.2g} %"
        shown = f"{value:.1e}".replace("e-0", "e-") if 0 < abs(value) < 0.001 else f"{value:.2g}"
        return shown.replace("-", "−")

    def evidence(self, row: BranchRow) -> list[str]:
        """Name, kind, cost, importance and fate, a line each."""
        layer = f", layer {row.layer}" if row.layer is not None else ""
        part = share(row.macs, self.total_macs)
        cost = f"{count(row.params)} parameters, {count(row.macs)} MACs"
        lines = [row.name, f"{kind_words(row.kind)}{layer}", cost + (f" ({part} of all branches)" if part else "")]
        if row.score is not None and is_known(row.score):
            spread = f" ± {row.stderr:.2g} (standard error)" if row.stderr is not None and is_known(row.stderr) else ""
            lines.append(f"importance {row.score:.3g}{spread}".replace("-", "−"))
        elif self.is_score or row.is_kept is not None:
            lines.append("importance not measured")
        if row.is_kept is not None:
            lines.append(("kept" if row.is_kept else "cut") + (f": {row.fate}" if row.fate else ""))
        return lines
