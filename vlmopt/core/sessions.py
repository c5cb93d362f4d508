"""Which sessions of ONNX Runtime live in this process: threads of one that is idle slow down what is timed.

A session goes when nothing refers to it any more. One that only a cycle of garbage keeps would stay until Python looks
for cycles, which takes half a second in a process with torch: so it is made to look where one is left, and only there.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING
from weakref import WeakSet

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

_alive: WeakSet[InferenceSession] = WeakSet()


def opened(session: InferenceSession) -> InferenceSession:
    """The session, which counts from now on."""
    _alive.add(session)
    return session


def n_alive() -> int:
    return len(_alive)


def drop_garbage(at_most: int = 0) -> None:
    """Frees sessions that only garbage keeps, where more than so many live."""
    if len(_alive) > at_most:
        gc.collect()
