"""Plugins that pip installed: found by their entry points, and set aside when they cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.plugins.writing import NAME, install, write_pass
from vlmopt.cli import entry
from vlmopt.core.errors import PassError
from vlmopt.recipe import load_recipe
from vlmopt.registry import find_broken, find_passes, load_pass, producers


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed packages, on the path."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return folder


def reason() -> str:
    """Why the only plugin that cannot be used cannot; everything else must go on."""
    (broken,) = find_broken()
    assert NAME in broken.names
    assert NAME not in find_passes()
    assert "canonicalize" in find_passes()
    with pytest.raises(PassError) as caught:
        load_pass(NAME)
    assert str(caught.value) == str(broken.error)
    return str(broken.error)


def test_an_installed_plugin_is_listed_with_its_distribution(site: Path) -> None:
    file = install(site, "acme-good", requires="vlmopt>=0.1")
    info = find_passes()[NAME]
    assert (info.origin, info.file) == ("acme-good 1.2", file)
    assert find_broken() == ()


@pytest.mark.parametrize("requires", ["vlmopt>=9", "VLMopt (<0.1)", "vlmopt==3.*"])
def test_a_plugin_for_another_vlmopt_is_set_aside_before_it_is_imported(site: Path, requires: str) -> None:
    file = install(site, "acme-new", ("from __future__", "raise SystemExit\nfrom __future__"), requires=requires)
    assert reason().startswith(f"{file} (acme-new 1.2): is for vlmopt ")
    assert "and this is vlmopt 0.1.0; install a version of the plugin for this vlmopt" in reason()


@pytest.mark.parametrize("requires", ["vlmopt[extra]>=9; extra == 'dev'", "vlmopt>=0.1,<1", "other>=9", "== broken =="])
def test_what_a_plugin_requires_beside_does_not_matter(site: Path, requires: str) -> None:
    install(site, "acme-fine", requires=requires)
    assert NAME in find_passes()


def test_two_distributions_that_claim_one_name_are_both_set_aside(site: Path) -> None:
    first, second = install(site, "acme-one"), install(site, "acme-two")
    found = reason()
    assert all(f"{file} (" in found for file in (first, second))
    assert "claims the name 'drop-scaling', which" in found
    assert "rename one of them, or uninstall acme-" in found


def test_a_folder_that_claims_the_name_of_an_installed_pass_is_refused(site: Path, tmp_path: Path) -> None:
    installed, own = install(site, "acme-one"), write_pass(tmp_path / "own")
    with pytest.raises(PassError) as caught:
        load_pass(NAME, [tmp_path / "own"])
    assert str(caught.value).startswith(f"{own}: claims the name 'drop-scaling', which {installed} (acme-one 1.2) has")
    assert load_pass(NAME).name == NAME


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            f"{NAME} = acme_x.drop_scaling:Other",
            "points to 'acme_x.drop_scaling:Other'; expected acme_x.",
        ),
        (f"{NAME} = acme_x.drop_scaling", "points to 'acme_x.drop_scaling'; expected acme_x.drop_scaling:DropScaling"),
        (
            f"{NAME} = acme_x.gone:DropScaling",
            "no source file for acme_x.gone; reinstall or remove acme-x 1.2",
        ),
        (f"{NAME} = gone.drop_scaling:DropScaling", "there is no source file for gone.drop_scaling"),
        (f"{NAME} = :", "points to ':'; expected MODULE:CLASS; reinstall or remove acme-x 1.2"),
    ],
)
def test_an_entry_point_that_leads_nowhere_is_set_aside(site: Path, line: str, expected: str) -> None:
    install(site, "acme-x", entry=line)
    assert reason().startswith("entry point 'drop-scaling' of acme-x 1.2: ")
    assert expected in reason()


def test_an_entry_point_under_another_name_is_set_aside(site: Path) -> None:
    install(site, "acme-x", entry="drop-scales = acme_x.drop_scaling:DropScaling")
    (broken,) = find_broken()
    assert "is named 'drop-scaling' but registered as 'drop-scales' by acme-x 1.2" in str(broken.error)


def test_damaged_metadata_of_one_distribution_leave_the_others_alone(site: Path) -> None:
    install(site, "acme-x", entry="no entry at all")
    install(site, "acme-y")
    assert NAME in find_passes()
    (broken,) = find_broken()
    assert str(broken.error).startswith("distribution acme-x: its entry points cannot be read (")


def test_a_fact_of_a_plugin_has_its_producers_before_it_is_imported(site: Path) -> None:
    (site / "acme_facts.py").write_text(
        "import nothing\nfrom vlmopt.core.facts import register_fact\nTIDY = register_fact('acme-tidy', 'neat')\n"
    )
    change = ("    def plan", "    produces: ClassVar[frozenset[Fact]] = frozenset({TIDY})\n\n    def plan")
    install(site, "acme-x", ("from dataclasses", "from acme_facts import TIDY\nfrom dataclasses"), change)
    assert [info.name for info in producers()["acme-tidy"]] == [NAME]


def test_commands_that_do_not_name_a_broken_plugin_work(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(site, "acme-new", requires="vlmopt>=9")
    (tmp_path / "fine.yaml").write_text("model: m\npasses: [canonicalize]\n")
    assert [step.name for step in load_recipe(tmp_path / "fine.yaml").passes] == ["canonicalize"]
    (tmp_path / "not.yaml").write_text("model: m\npasses: [drop-scaling]\n")
    assert entry.run(["optimize", "--recipe", str(tmp_path / "not.yaml"), "-o", str(tmp_path / "out")]) == 1
    found = capsys.readouterr()
    assert "is for vlmopt >=9, and this is vlmopt 0.1.0" in found.err
    assert len(found.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_list_shows_what_cannot_be_used_after_the_rest(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(site, "acme-new", requires="vlmopt>=9")
    assert entry.run(["passes", "list"]) == 1
    found = capsys.readouterr()
    assert "fold-constants" in found.out
    assert NAME not in found.out
    (line,) = found.err.splitlines()
    assert line.startswith("error: cannot be used: drop-scaling: ")
    assert entry.run(["passes", "list", "--json"]) == 1
    listed = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in listed["broken"]] == [NAME]
    assert listed["broken"][0]["origin"] == "acme-new 1.2"
    assert entry.run(["passes", "show", "fold-constants", "--no-cases"]) == 0
    assert entry.run(["passes", "show", NAME]) == 1
