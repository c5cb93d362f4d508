"""Notices what a call prints, and keeps it from the user's terminal and from `--json`."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import threading
from types import FrameType, TracebackType
from typing import IO, Any, Self, TextIO

_REPORTERS = ("logging", "warnings")  # what goes through these is no print


class OutputWatch:
    """While it is open, prints are gathered: by `print`, by writing to `sys.stdout` or `sys.stderr`, and by libraries or
    child processes to file descriptor 1. Threads that ran before, such as a progress display, print as ever. Nobody can be asked
    anything: standard input is empty.
    """

    def __init__(self) -> None:
        self._text = io.StringIO()
        self._bystanders = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}

    @property
    def text(self) -> str:
        return self._text.getvalue()

    @property
    def first_line(self) -> str | None:
        """The first line that is not empty; None when nothing at all was printed."""
        if not self.text:
            return None
        return next((line.strip() for line in self.text.splitlines() if line.strip()), "")

    def __enter__(self) -> Self:
        self._streams = sys.stdin, sys.stdout, sys.stderr
        self._descriptor = _DescriptorWatch()
        sys.stdin = io.StringIO()
        sys.stdout = _Gathering(self._streams[1], self)
        sys.stderr = _Gathering(self._streams[2], self)
        return self

    def __exit__(self, *_: object) -> None:
        sys.stdin, sys.stdout, sys.stderr = self._streams
        self._text.write(self._descriptor.close())

    def is_bystander(self) -> bool:
        return threading.get_ident() in self._bystanders

    def gather(self, text: str) -> None:
        self._text.write(text)


class _Gathering:
    """Stands for a standard stream: gathers what is printed and is the stream in everything else."""

    def __init__(self, stream: TextIO, watch: OutputWatch) -> None:
        self._stream, self._watch = stream, watch

    def write(self, text: str) -> int:
        if self._watch.is_bystander() or _is_report(sys._getframe(1)):
            return self._stream.write(text)
        self._watch.gather(text)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    @property
    def buffer(self) -> Any:
        return _GatheringBytes(self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _GatheringBytes(io.RawIOBase):
    def __init__(self, stream: _Gathering) -> None:
        self._stream = stream

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._stream.write(bytes(data).decode("utf-8", "replace"))
        return len(data)


class _DescriptorWatch:
    """Leads file descriptor 1 into a file until it is closed."""

    def __init__(self) -> None:
        self._saved: int | None = None
        if threading.current_thread() is not threading.main_thread():
            return  # other threads may be writing there
        import tempfile

        with contextlib.suppress(OSError, ValueError):  # there may be no standard output at all
            _flush()
            saved = os.dup(1)
            self._file: IO[bytes] = tempfile.TemporaryFile()
            os.dup2(self._file.fileno(), 1)
            self._saved = saved

    def close(self) -> str:
        if self._saved is None:
            return ""
        _flush()
        os.dup2(self._saved, 1)
        os.close(self._saved)
        with self._file as file:
            file.seek(0)
            return file.read().decode("utf-8", "replace")


def _flush() -> None:
    for stream in (sys.stdout, sys.__stdout__):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()  # type: ignore[union-attr]


def _is_report(frame: FrameType | None) -> bool:
    """Whether a warning or a log record is what is being written."""
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] in _REPORTERS:
            return True
        frame = frame.f_back
    return False
