"""Draws a model into a file: its branches, or every operation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmopt.core.errors import OutputExistsError, ProfileError, VlmoptError
from vlmopt.core.program import Component, Program
from vlmopt.graph.picture import node_drawing
from vlmopt.profiling.document import Profile, ProfiledScore, read_profile
from vlmopt.report.branch_picture import BranchRow, branch_file
from vlmopt.report.drawing import drawings_dot, drawings_page, drawings_svg
from vlmopt.rundir import atomic_write, disk_errors

FORMS = {".html": "html", ".svg": "svg", ".dot": "dot"}
LEVELS = ("branch", "node")


@dataclass(frozen=True)
class Picture:
    """What to draw, and where to. The ending of `path` says the format; `component` is None for all of them."""

    path: Path
    level: str = "branch"
    component: str | None = None
    profile: Path | None = None
    force: bool = False


def check_picture(picture: Picture) -> None:
    """Refuses what can be refused before the model is captured.

    Raises:
        VlmoptError: the ending is unknown, or a profile is given for a picture that shows no importance.
        OutputExistsError: the file is there already.
        ProfileError: the profile cannot be read.
    """
    place = str(picture.path)
    if picture.path.suffix.lower() not in FORMS:
        raise VlmoptError(place, "its ending says no format for a picture", expected=" or ".join(FORMS))
    if picture.path.is_dir():
        raise OutputExistsError(place, "is a folder", expected="a path for a file")
    if picture.path.exists() and not picture.force:
        raise OutputExistsError(place, "exists already", remedy="choose another path, or --force replaces it")
    if picture.profile is not None:
        if picture.level != "branch":
            remedy = "leave out --profile, or draw --level branch"
            raise VlmoptError("--profile", f"colours branches, and --level is {picture.level}", remedy=remedy)
        read_profile(picture.profile)


def write_picture(
    program: Program, rows: Mapping[str, list[dict[str, Any]]], picture: Picture, *, has_weights: bool
) -> None:
    """Draws the program; `rows` are its branches by component. Without weights the profile's cannot be compared.

    Raises:
        VlmoptError: the component is not there, or the file cannot be written.
        ProfileError: the profile is of another model.
    """
    chosen = _chosen(program, picture.component)
    form = FORMS[picture.path.suffix.lower()]
    name = program.source.path
    if picture.level == "branch":
        profile = None if picture.profile is None else read_profile(picture.profile)
        if profile is not None:
            _check_profile(profile, program, rows, place=str(picture.profile), has_weights=has_weights)
        scores = {(s.component, s.name): s for s in profile.scores if s.scope == "branch"} if profile else {}
        title = f"{name}: branches" + (f" for {profile.task.name}" if profile else "")
        parts = {name: [_row(row, scores.get((name, row["name"]))) for row in rows[name]] for name in chosen}
        text = branch_file(title, parts, form=form, unit=profile.unit if profile else "")
    else:
        text = _node_file(f"{name}: operations", chosen, program, form)
    with disk_errors(picture.path.parent):
        picture.path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(picture.path, text)


def _node_file(title: str, chosen: Mapping[str, Component], program: Program, form: str) -> str:
    drawings = [node_drawing(component, program.dims) for component in chosen.values()]
    if form == "dot":
        return drawings_dot(title, drawings)
    return drawings_svg(drawings) if form == "svg" else drawings_page(title, drawings)


def _chosen(program: Program, name: str | None) -> dict[str, Component]:
    if name is None:
        return dict(program.components)
    if name not in program.components:
        raise VlmoptError("--component", f"the model has no {name!r}", expected=" or ".join(program.components))
    return {name: program.components[name]}


def _check_profile(
    profile: Profile, program: Program, rows: Mapping[str, list[dict[str, Any]]], *, place: str, has_weights: bool
) -> None:
    found, source = "", program.source
    known = {(part, row["name"]) for part, listed in rows.items() for row in listed}
    unknown = [s.name for s in profile.scores if s.scope == "branch" and (s.component, s.name) not in known]
    if profile.model.architecture != source.architecture:
        found = f"was measured on a {profile.model.architecture}, and this is a {source.architecture}"
    elif has_weights and profile.model.fingerprint != source.fingerprint:
        found = "was measured on other weights"
    elif unknown:
        found = f"scores the branch {unknown[0]!r}, which is not here"
    if found:
        raise ProfileError(place, found, remedy="profile this model, or leave the profile out")


def _row(row: Mapping[str, Any], score: ProfiledScore | None) -> BranchRow:
    return BranchRow(
        row["name"],
        row["kind"],
        row["layer"],
        row["params"],
        row["macs"],
        None if score is None else score.score,
        None if score is None else score.stderr,
    )
