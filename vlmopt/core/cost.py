"""What a program or a part of it costs. Units are in every name."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Cost:
    """Counted cost of a component, a branch or a saving.

    Units: parameters in number and bytes, multiply-accumulates for one sample (batch 1), bytes of activations written,
    bytes that a decoder keeps of every token for the next step.
    """

    parameters: int = 0
    parameters_bytes: int = 0
    macs: int = 0
    activation_bytes: int = 0
    kv_cache_bytes_per_token: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    def as_dict(self) -> dict[str, int]:
        return {f.name: getattr(self, f.name) for f in fields(self)}
