"""The profile file: scores with standard errors and everything that says what they are worth. No torch here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from vlmopt.core.errors import ProfileError

SCHEMA: Literal[1] = 1


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ProfiledModel(_Strict):
    path: str
    model_type: str
    architecture: str
    fingerprint: str


class ProfiledTask(_Strict):
    name: str
    kind: str
    fingerprint: str
    n_items: int


class ProfiledScore(_Strict):
    """Score of one branch or layer. `score` is in the profile's unit; higher means needed more.

    `drop_points` is the drop of the task's metric without it, where the estimator measures one; `latency_us` is what it
    adds to one call of its component, where that was measured.
    """

    component: str
    name: str
    scope: Literal["branch", "layer"]
    kind: str
    layer: int
    branches: tuple[str, ...]
    params: int
    macs: int
    score: float
    stderr: float | None
    drop_points: float | None = None
    drop_stderr: float | None = None
    latency_us: float | None = None


class ProfiledInteraction(_Strict):
    """What two branches (`component/branch`) cost together beyond the sum of both, in the profile's unit."""

    first: str
    second: str
    score: float


class ProfiledSubset(_Strict):
    """One evaluation: the branches (`component/branch`) that were skipped, and the loss without them."""

    skipped: tuple[str, ...]
    loss: float
    batch: int


class ProfiledTotal(_Strict):
    """What the whole of a component costs, head included."""

    component: str
    params: int
    params_bytes: int
    macs: int
    latency_us: float | None = None


class ProfileStability(_Strict):
    """How far the ranking can be trusted.

    `ranks` holds for every site name the 5 % and 95 % quantile of its rank (0: needed least) over bootstrap resamples
    of the items; `agreement` the Spearman correlation with the profile's own scores under a named disturbance.
    """

    n_resamples: int
    ranks: dict[str, tuple[float, float]]
    agreement: dict[str, float | None]


class ProfileCost(_Strict):
    forward_passes: float  # full passes of one sample through the program
    seconds: float


class Profile(_Strict):
    """Importance of every branch and layer of one model for one task."""

    schema_version: Literal[1] = SCHEMA
    vlmopt: str
    created: str
    model: ProfiledModel
    task: ProfiledTask
    estimator: str
    scoring: str
    unit: str
    seed: int
    dtype: str
    measured_in: str | None = None  # the precision of products, where it is not the dtype
    versions: dict[str, str]
    cost: ProfileCost
    reference_loss: float | None
    scores: tuple[ProfiledScore, ...]
    interactions: tuple[ProfiledInteraction, ...] = ()
    subsets: tuple[ProfiledSubset, ...] = ()
    totals: tuple[ProfiledTotal, ...] = ()
    stability: ProfileStability | None = None

    def to_json(self) -> str:
        return self.model_dump_json(indent=1) + "\n"

    def importance(self) -> dict[str, float]:
        """Score by site name: `component/branch` for branches, `component/layer` for layers."""
        return {f"{s.component}/{s.name}": s.score for s in self.scores}


def read_profile(path: Path) -> Profile:
    """The profile in a file.

    Raises:
        ProfileError: there is none, or it is not a profile of this version.
    """
    try:
        return Profile.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ProfileError(
            str(path), "no such file", remedy="make one with `vlmopt profile -m MODEL -t TASK -o FILE`"
        ) from error
    except OSError as error:
        raise ProfileError(str(path), f"cannot be read ({(error.strerror or str(error)).lower()})") from error
    except (ValidationError, UnicodeDecodeError) as error:
        found = "is not a profile"
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            found += f" ({'.'.join(str(part) for part in first['loc']) or 'file'}: {first['msg']})"
        raise ProfileError(str(path), found, expected="a file written by `vlmopt profile`") from error


def check_profile(profile: Profile, *, place: str, model: str, task: str, kind: str) -> None:
    """Refuses a profile of another model, of other data or of another question to the same data.

    Raises:
        ProfileError: a fingerprint or the kind of the task differs.
    """
    if profile.task.kind != kind:
        raise ProfileError(place, f"was measured for a task of kind {profile.task.kind}", expected=kind)
    for what, found, wanted in (
        ("model", profile.model.fingerprint, model),
        ("task data", profile.task.fingerprint, task),
    ):
        if found != wanted:
            raise ProfileError(
                place,
                f"was measured on another {what} (fingerprint {found[:12]})",
                expected=wanted[:12],
                remedy="profile this model on this task, or leave the profile out",
            )


def diff_profiles(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Where two tasks differ: every branch and layer that both profiles score, the most different first.

    `z` is the difference over its standard error; `spearman` is the rank agreement over all branches.
    """
    first, second = ({(s["component"], s["scope"], s["name"]): s for s in p["scores"]} for p in (a, b))
    shared = [key for key in first if key in second]
    if not shared:
        raise ProfileError("profile diff", "the profiles share no branch", expected="two profiles of one model")
    rows = [_diff_row(key, first[key], second[key]) for key in shared]
    rows.sort(key=lambda row: -abs(row["z"] if row["z"] is not None else row["difference"]))
    branches = [key for key in shared if key[1] == "branch"]
    return {
        "a": {"task": a["task"]["name"], "estimator": a["estimator"], "scoring": a["scoring"]},
        "b": {"task": b["task"]["name"], "estimator": b["estimator"], "scoring": b["scoring"]},
        "same_model": a["model"]["fingerprint"] == b["model"]["fingerprint"],
        "spearman": spearman([first[k]["score"] for k in branches], [second[k]["score"] for k in branches]),
        "rows": rows,
    }


def _diff_row(key: tuple[str, str, str], a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    spread = math.hypot(a["stderr"] or 0.0, b["stderr"] or 0.0)
    difference = a["score"] - b["score"]
    return {
        "component": key[0],
        "scope": key[1],
        "name": key[2],
        "a": a["score"],
        "b": b["score"],
        "difference": difference,
        "z": difference / spread if spread > 0 else None,
    }


def spearman(a: list[float], b: list[float]) -> float | None:
    """Rank correlation; None for fewer than three values or constant ones."""
    from scipy.stats import spearmanr

    if len(a) < 3 or len(set(a)) == 1 or len(set(b)) == 1:
        return None
    return float(spearmanr(a, b).statistic)


def profile_as_dict(profile: Profile) -> dict[str, Any]:
    return dict(json.loads(profile.model_dump_json()))
