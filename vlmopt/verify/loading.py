"""What ONNX Runtime says of a graph when it loads it.

Its warnings (a weight that nothing reads, a constant it has no kernel to fold, shapes that contradict each other) go to
the C library's standard error, past Python. What it says of the machine, such as a graphics card that it does not find,
is no fault of a graph, and is told from it by the name that a session's own messages carry.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

from vlmopt.verify.descriptors import led_into
from vlmopt.verify.parity import Gate

_NAME = "vlmopt-graph"
_WARNINGS = 2  # ONNX Runtime's severity of a warning, as a number that sessions take
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_MESSAGE = re.compile(rf"\[[WEF]:onnxruntime:{_NAME}, [^\]]*\] ?(.*)")


def check_loading(name: str, path: Path) -> Gate:
    """Whether ONNX Runtime loads the file without a warning; a gate that fails has the first one in its name."""
    found = load_warnings(path)
    return Gate(f"{name} ({found[0]})" if found else name, not found, float(len(found)), 0.0)


def load_warnings(path: Path) -> list[str]:
    """What ONNX Runtime warns of when it loads the file, a line each, whatever it writes beside."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.logid, options.log_severity_level = _NAME, _WARNINGS
    with tempfile.TemporaryFile() as file:
        with led_into(file):
            onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        file.seek(0)
        found, others = told_apart(file.read().decode("utf-8", "replace"))
    sys.stderr.write(others)
    return found


def told_apart(text: str) -> tuple[list[str], str]:
    """What a session says of its graph, and all the rest: of the machine, or of a progress display."""
    lines = [(line, _MESSAGE.search(_ANSI.sub("", line))) for line in text.splitlines(keepends=True)]
    own = [match[1].strip() for _, match in lines if match is not None]
    return own, "".join(line for line, match in lines if match is None)
