"""A copy of a program's weights, for a faulty pass that writes in place what all states of a program share."""

from __future__ import annotations

from vlmopt.core.program import Program


class KeptWeights:
    """The weights as they are now."""

    def __init__(self, program: Program) -> None:
        parts = program.components.values()
        shared = {id(t): t for part in parts for t in [*part.graph.parameters(), *part.graph.buffers()]}
        self._kept = [(tensor, tensor.detach().clone()) for tensor in shared.values()]

    def restore(self) -> None:
        """Gives every tensor the values back that it had."""
        for tensor, values in self._kept:
            tensor.data.copy_(values)
