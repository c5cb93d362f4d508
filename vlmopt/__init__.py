"""vlmopt: a compiler for vision-language models that keeps what one task needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vlmopt.runtime import load as load


def __getattr__(name: str) -> object:
    # `vlmopt.load` pulls in ONNX Runtime, so it is looked up on first use: `import vlmopt` stays instant.
    if name == "load":
        from vlmopt.runtime import load

        return load
    raise AttributeError(f"module 'vlmopt' has no attribute {name!r}")
