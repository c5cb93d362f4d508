"""The run directory: the only module that decides file names, and how a run writes, resumes and publishes them.

A run works in `.OUT.partial` beside OUT, so a folder under the final name is always complete. What a killed run had
finished stays in the partial directory, and the same recipe takes it up again; another recipe for the same output takes
up what was measured, as far as it depends on nothing that differs.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from vlmopt.core.errors import OutputExistsError, VlmoptError

MANIFEST = "manifest.json"
CHECKSUM = "manifest.sha256"
RECIPE = "recipe.yaml"
REPORT_JSON = "report.json"
REPORT_MARKDOWN = "report.md"
REPORT_HTML = "report.html"
ADAPTERS_FOLDER = "adapters"
WORK = ".work"
LEDGER = f"{WORK}/ledger.jsonl"
LOG = f"{WORK}/log.txt"
PROFILE_WORK = "10-profile"
CHOICE_WORK = "15-choice"
TUNING_WORK = "25-tuning"
# Folders below `.work/` whose entries are named by a digest of all that they depend on, so that any run may read them.
MEASURED = (PROFILE_WORK, CHOICE_WORK, TUNING_WORK)
_KEY = f"{WORK}/key"
_DONE = "done.json"


def partial_path(final: Path) -> Path:
    """Where a run for this output works; the name is fixed, so that a killed run is found again."""
    return final.with_name(f".{final.name}.partial")


def atomic_write(path: Path, data: bytes | str) -> None:
    """Writes a file so that after a crash it holds all of the data or what it held before.

    Raises: VlmoptError when the disk is full or the place cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        try:
            with temporary.open("wb") as stream:
                stream.write(data.encode("utf-8") if isinstance(data, str) else data)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes indented JSON with a final newline, atomically."""
    atomic_write(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def disk_errors(place: Path | str) -> Iterator[None]:
    """Turns what the operating system says about a full or closed disk into a VlmoptError."""
    try:
        yield
    except OSError as error:
        raise _explained(error, str(error.filename or place)) from error


def disk_error(error: OSError, place: str = "disk") -> VlmoptError | None:
    """The message for a disk that is full; None for every other error. The error's own path wins over `place`."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    place = str(error.filename or place)
    return VlmoptError(
        place, "there is no space left on the disk", remedy="free some space and run the same command again"
    )


def _explained(error: OSError, place: str) -> VlmoptError:
    full = disk_error(error, place)
    if full is not None:
        return full
    remedy = "choose another output path" if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) else ""
    return VlmoptError(place, f"cannot be written ({(error.strerror or str(error)).lower()})", remedy=remedy)


def _empty(partial: Path) -> None:
    """Removes what a run under another key left, but not what it measured."""
    work = partial / WORK
    for path in [*partial.iterdir(), *(work.iterdir() if work.is_dir() else ())]:
        if path == work or (path.parent == work and path.name in MEASURED):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Lock:
    """At most one run for an output. The operating system lets go of it when the process dies, however it dies."""

    def __init__(self, final: Path) -> None:
        self._path = final.with_name(f".{final.name}.lock")
        self._final = final
        self._stream: IO[str] | None = None

    def acquire(self) -> None:
        while self._stream is None:
            stream = self._path.open("a+", encoding="utf-8")
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                stream.seek(0)
                holder = stream.read().strip() or "unknown"
                stream.close()
                raise VlmoptError(
                    str(self._final), f"another run writes it (process {holder})", remedy="wait for it, or stop it"
                ) from None
            if self._is_still_there(stream):
                self._stream = stream
            else:
                stream.close()  # the run before us took its file away between our open and our lock
        self._stream.truncate(0)
        self._stream.write(f"{os.getpid()}\n")
        self._stream.flush()

    def release(self) -> None:
        if self._stream is not None:
            self._path.unlink(missing_ok=True)
            self._stream.close()
            self._stream = None

    def _is_still_there(self, stream: IO[str]) -> bool:
        try:
            return os.fstat(stream.fileno()).st_ino == self._path.stat().st_ino
        except FileNotFoundError:
            return False


class _Run:
    """What a run for a directory and a run for one file share: the lock, the partial directory and its finished steps.

    Args:
        final: where the result goes.
        key: digest of everything the result depends on; steps that were finished under another key are thrown away,
            except those below MEASURED.
        force: an existing result may be replaced. The old one stays until the new one is complete.
    """

    def __init__(self, final: Path, *, key: str, force: bool = False) -> None:
        self.final = final.absolute()
        self.partial = partial_path(self.final)
        self.has_resumed = False
        self._key, self._force = key, force
        self._lock = _Lock(self.final)

    def __enter__(self) -> Self:
        with disk_errors(self.final.parent):
            self.final.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            try:
                self._restore_replaced()
                self._refuse_existing()
                self._open_partial()
            except BaseException:
                self._lock.release()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with disk_errors(self.partial):
            if error is not None and self.partial.exists() and not self._holds_work():
                shutil.rmtree(self.partial)  # nothing in it is worth a resume
            self._lock.release()

    def work(self, step: str) -> Path:
        """The folder of a step below `.work/`, created when it is not there."""
        folder = self.partial / WORK / step
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def finish(self, step: str, payload: Mapping[str, Any] | None = None) -> None:
        """Marks a step as finished, with JSON data for the run that takes it up again."""
        write_json(self.work(step) / _DONE, payload or {})

    def finished(self, step: str) -> dict[str, Any] | None:
        """What `finish` got for this step, or None when it has not been finished."""
        try:
            payload: dict[str, Any] = json.loads((self.partial / WORK / step / _DONE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return payload

    def discard(self) -> None:
        """Removes the partial directory, finished steps included."""
        with disk_errors(self.partial):
            shutil.rmtree(self.partial, ignore_errors=False)

    def _open_partial(self) -> None:
        key_file = self.partial / _KEY
        if key_file.is_file() and key_file.read_text(encoding="utf-8") == self._key:
            self.has_resumed = True
            return
        if self.partial.exists():
            _empty(self.partial)
        key_file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(key_file, self._key)

    def _holds_work(self) -> bool:
        files = {path.relative_to(self.partial).as_posix() for path in self.partial.rglob("*") if path.is_file()}
        return not files <= {_KEY, LEDGER, LOG}

    def _refuse_existing(self) -> None:
        refuse_existing(self.final, force=self._force)

    @property
    def _replaced(self) -> Path:
        return self.final.with_name(f".{self.final.name}.old")

    def _restore_replaced(self) -> None:
        """Undoes a replacement that a crash cut in half, or finishes one that only lacked its last step."""
        if self._replaced.exists():
            if self.final.exists():
                shutil.rmtree(self._replaced)
            else:
                self._replaced.rename(self.final)


class RunDirectory(_Run):
    """A run whose result is a directory: files are written below `partial`, and `publish` gives them the final name."""

    def path(self, name: str) -> Path:
        """Where a file of the artifact is written; `name` may hold folders, which are created."""
        path = self.partial / name
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def publish(self) -> Path:
        """Renames the partial directory to the final name, in one step that leaves no half-written state.

        Raises: OutputExistsError when somebody created the output meanwhile and it must not be replaced.
        """
        with disk_errors(self.final):
            self._refuse_existing()
            _sync_folder(self.partial)
            if self.final.exists():
                self.final.rename(self._replaced)
            try:
                self.partial.rename(self.final)
            except BaseException:
                self._restore_replaced()
                raise
            _sync_folder(self.final.parent)
            if self._replaced.exists():
                shutil.rmtree(self._replaced)
        return self.final


class RunFile(_Run):
    """A run whose result is one file, such as a profile; its finished steps lie in a partial directory until then."""

    def publish(self, data: bytes | str) -> Path:
        """Writes the file under its final name and removes the partial directory."""
        self._refuse_existing()
        atomic_write(self.final, data)
        self.discard()
        return self.final

    def _refuse_existing(self) -> None:
        if self.final.is_dir():
            raise OutputExistsError(str(self.final), "is a folder", expected="a path for a new file")
        if self.final.exists() and not self._force:
            raise OutputExistsError(str(self.final), "exists already", remedy="--force replaces it")

    def _restore_replaced(self) -> None:
        return None


def refuse_existing(final: Path, *, force: bool) -> None:
    """Raises OutputExistsError for an output directory that exists, unless it may be replaced.

    Only an artifact of ours or an empty folder is ever replaced: `--force -o .` must not delete somebody's work.
    """
    if not final.exists() and not final.is_symlink():
        return
    if not force:
        raise OutputExistsError(str(final), "exists already", remedy="choose another path, or --force replaces it")
    is_ours = final.is_dir() and ((final / MANIFEST).is_file() or not any(final.iterdir()))
    if not is_ours or final.is_symlink():
        raise OutputExistsError(
            str(final),
            f"is not an artifact (it holds no {MANIFEST}), so --force does not replace it",
            remedy="choose another path",
        )
