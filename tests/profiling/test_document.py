"""The profile file: read back as written, refused where it does not belong, compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmopt.core.errors import ProfileError
from vlmopt.profiling.document import (
    Profile,
    ProfileCost,
    ProfiledModel,
    ProfiledScore,
    ProfiledTask,
    check_profile,
    diff_profiles,
    profile_as_dict,
    read_profile,
    spearman,
)

KIND = "image-classification"


def score(name: str, value: float, stderr: float | None = 0.1, scope: str = "branch") -> ProfiledScore:
    return ProfiledScore(
        component="model",
        name=name,
        scope=scope,  # type: ignore[arg-type]
        kind="ffn",
        layer=0,
        branches=(name,),
        params=10,
        macs=20,
        score=value,
        stderr=stderr,
    )


def profile(*scores: ProfiledScore, task: str = "style", model: str = "m" * 64) -> Profile:
    return Profile(
        vlmopt="0.1",
        created="2030-01-01T00:00:00+00:00",
        model=ProfiledModel(path="models/x", model_type="clip", architecture="CLIPModel", fingerprint=model),
        task=ProfiledTask(name=task, kind=KIND, fingerprint=task * 8, n_items=12),
        estimator="leave-one-out",
        scoring="refit",
        unit="loss",
        seed=0,
        dtype="float32",
        versions={"torch": "2"},
        cost=ProfileCost(forward_passes=3.5, seconds=0.1),
        reference_loss=0.7,
        scores=scores,
    )


def test_a_profile_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    written = profile(score("a", 0.1 + 0.2), score("b", -1e-17, None), score("l", 3.0, scope="layer"))
    path = tmp_path / "p.json"
    path.write_text(written.to_json(), encoding="utf-8")
    assert read_profile(path) == written
    assert read_profile(path).importance() == {"model/a": 0.1 + 0.2, "model/b": -1e-17, "model/l": 3.0}
    assert Profile.model_validate(profile_as_dict(written), strict=False) == written


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; make one with `vlmopt profile"),
        (b"\xff\xfe\x00", "is not a profile"),
        (b"[1, 2]", "is not a profile"),
        (b'{"scores": []}', "is not a profile (vlmopt: Field required)"),
        (profile().to_json().replace('"seed"', '"sead"').encode(), "is not a profile (seed: Field required)"),
        (profile().to_json().replace('"schema_version": 1', '"schema_version": 2').encode(), "schema_version"),
    ],
)
def test_what_is_no_profile_is_refused_in_one_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "p.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ProfileError) as caught:
        read_profile(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_profile(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="cannot be read"):
        read_profile(tmp_path)


def test_a_profile_of_another_model_or_other_data_is_refused() -> None:
    found = profile(task="style")
    check_profile(found, place="p.json", model="m" * 64, task="style" * 8, kind=KIND)
    with pytest.raises(ProfileError, match="p.json: was measured on another model"):
        check_profile(found, place="p.json", model="n" * 64, task="style" * 8, kind=KIND)
    with pytest.raises(ProfileError, match="p.json: was measured on another task data"):
        check_profile(found, place="p.json", model="m" * 64, task="other" * 8, kind=KIND)
    with pytest.raises(ProfileError, match="p.json: was measured for a task of kind image-classification"):
        check_profile(found, place="p.json", model="m" * 64, task="style" * 8, kind="image-text-retrieval")


def diff(a: Profile, b: Profile) -> dict[str, object]:
    return diff_profiles(a.model_dump(mode="json"), b.model_dump(mode="json"))


def test_the_branches_where_two_tasks_differ_most_come_first() -> None:
    a = profile(score("a", 1.0, 0.3), score("b", 0.5, 0.1), score("c", 0.2, None), score("only a", 9.0))
    b = profile(score("a", 0.0, 0.4), score("b", 0.5, 0.1), score("c", 0.9, None), task="meaning")
    found = diff(a, b)
    rows = found["rows"]
    assert isinstance(rows, list)
    assert [(row["name"], row["difference"]) for row in rows] == [
        ("a", 1.0),
        ("c", pytest.approx(-0.7)),
        ("b", 0.0),
    ]
    assert rows[0]["z"] == pytest.approx(2.0)
    assert rows[1]["z"] is None
    assert found["same_model"] is True
    assert found["spearman"] == pytest.approx(-1.0)
    assert diff(a, profile(score("a", 0.0), model="n" * 64))["same_model"] is False


def test_profiles_that_share_nothing_cannot_be_compared() -> None:
    with pytest.raises(ProfileError, match="share no branch"):
        diff(profile(score("a", 1.0)), profile(score("b", 1.0)))


@pytest.mark.parametrize(
    ("a", "b", "wanted"),
    [
        ([1, 2, 3], [10, 20, 30], 1.0),
        ([1, 2, 3], [3, 2, 1], -1.0),
        ([1, 2, 3, 4], [1, 3, 2, 4], 0.8),
        ([1, 2], [1, 2], None),
        ([1, 1, 1], [1, 2, 3], None),
    ],
)
def test_rank_agreement_of_known_rankings(a: list[float], b: list[float], wanted: float | None) -> None:
    assert spearman(a, b) == (None if wanted is None else pytest.approx(wanted))
