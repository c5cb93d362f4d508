"""The additive model: a graph takes what its operations take one after another, and what a call itself takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vlmopt.core.errors import ProfileError
from vlmopt.devices.document import DeviceProfile
from vlmopt.devices.operations import GraphOperations


@dataclass(frozen=True)
class Prediction:
    """Microseconds of one call in a quiet moment, and of all operations of each signature in it.

    `sum_us` is what the operations take alone, `us` what they take among others.
    """

    call_us: float
    among_others_us: float
    by_signature_us: Mapping[str, float]

    @property
    def sum_us(self) -> float:
        return self.call_us + sum(self.by_signature_us.values())

    @property
    def us(self) -> float:
        return self.sum_us + self.among_others_us


def predict(graph: GraphOperations, profile: DeviceProfile, *, place: str) -> Prediction:
    """What a call of the graph takes on the profile's device.

    Args:
        place: the profile's file, for the message.

    Raises:
        ProfileError: the profile has no time of some operation.
    """
    missing = unknown(graph, profile)
    if missing:
        raise ProfileError(
            place,
            f"has no time of {len(missing)} of the graph's {len(graph.counts)} operations, such as {missing[0]}",
            remedy="add what is missing with `vlmopt device profile --update`",
        )
    times = {name: n * profile.operations[name].quietest_us for name, n in graph.counts.items()}
    return Prediction(profile.call_us, profile.node_us * graph.counts.total(), times)


def unknown(graph: GraphOperations, profile: DeviceProfile) -> list[str]:
    """Signatures of the graph that the profile has no time of."""
    return [name for name in graph.counts if name not in profile.operations]
