"""Golden texts: every case of a pass before and after, one file each, compared both ways."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from vlmopt.core.errors import OutputExistsError
from vlmopt.rewrite.pipeline import program_text
from vlmopt.rundir import atomic_write
from vlmopt.testing.trial import Subject, Trial

UPDATE_OPTION = "--vlmopt-update-golden"


def golden_path(folder: Path, pass_name: str, case_name: str) -> Path:
    """Where the text of a case lies: `FOLDER/pass/case.txt`."""
    slug = re.sub(r"[^a-z0-9]+", "-", case_name.lower()).strip("-")
    return folder / pass_name / f"{slug or 'case'}.txt"


def golden_text(trial: Trial) -> str:
    """What the file of a case holds: every component before the pass and after it."""
    before, after = program_text(trial.attempt.before), trial.attempt.texts
    head = f"pass {trial.subject.name}, case {trial.case.name}\n"
    return f"{head}\n--- before\n{_joined(before.values())}\n--- after\n{_joined(after.values())}"


def golden_paths(subject: Subject, folder: Path) -> dict[Path, list[str]]:
    """The cases by the file that they belong to; two cases of one file are a fault."""
    found: dict[Path, list[str]] = {}
    for trial in subject.trials:
        found.setdefault(golden_path(folder, subject.name, trial.case.name), []).append(trial.case.name)
    return found


def orphaned_golden_texts(subject: Subject, folder: Path) -> list[Path]:
    """Files of the pass that belong to no case."""
    return sorted(set((folder / subject.name).glob("*")) - golden_paths(subject, folder).keys())


def update_golden(subject: Subject, folder: Path) -> list[Path]:
    """Writes the texts that are missing or differ and removes those without a case; returns what it touched.

    Raises:
        OutputExistsError: the environment variable CI is set: there texts are compared and never written.
    """
    refuse_updates_in_ci()
    touched = []
    for trial in subject.trials:
        path = golden_path(folder, subject.name, trial.case.name)
        text = golden_text(trial)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, text)
            touched.append(path)
    for path in orphaned_golden_texts(subject, folder):
        path.unlink()
        touched.append(path)
    return touched


def refuse_updates_in_ci() -> None:
    if os.environ.get("CI", "").lower() not in ("", "0", "false"):
        raise OutputExistsError(
            "golden texts", "are not written where CI is set", remedy="update them on your machine and commit them"
        )


def _joined(texts: Iterable[str]) -> str:
    return "\n".join(texts)
