from __future__ import annotations

from pathlib import Path

import pytest

from tests.architecture import rules


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def test_imports_run_downward() -> None:
    assert rules.upward_imports(rules.ROOT) == []


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("vlmopt/core/cost.py", "import vlmopt.graph\n"),
        ("vlmopt/graph/branches.py", "from vlmopt import capture\n"),
        ("vlmopt/capture/dual.py", "from ..tasks import folder\n"),
        ("vlmopt/emit/onnx.py", "def f():\n    from vlmopt.verify import parity\n"),
        ("vlmopt/tasks/folder.py", "from vlmopt.recipe.schema import Recipe\n"),
        ("vlmopt/workflow.py", "from vlmopt.cli.display import show\n"),
        ("vlmopt/registry/listing.py", "from vlmopt.graph import text\n"),
    ],
)
def test_an_import_that_runs_upward_or_sideways_is_found(tmp_path: Path, file: str, text: str) -> None:
    found = rules.upward_imports(plant(tmp_path, {file: text}))
    assert len(found) == 1
    assert found[0].startswith(file)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("vlmopt/cli/entry.py", "from vlmopt import __version__\nfrom vlmopt.workflow import optimize\n"),
        (
            "vlmopt/capture/dual.py",
            "from .export import f\nfrom ..graph import raising\nimport vlmopt.core\n",
        ),
        ("vlmopt/tasks/folder.py", "from vlmopt.recipe.yaml_file import read_yaml\n"),
    ],
)
def test_an_import_that_runs_downward_is_not_found(tmp_path: Path, file: str, text: str) -> None:
    assert rules.upward_imports(plant(tmp_path, {file: text})) == []


def test_a_room_outside_the_table_of_layers_is_refused(tmp_path: Path) -> None:
    tree = plant(tmp_path, {"vlmopt/garage/car.py": "from vlmopt.core import cost\n"})
    with pytest.raises(AssertionError, match="'garage' is not in the table"):
        rules.upward_imports(tree)


def test_passes_import_core_and_graph_only() -> None:
    assert rules.forbidden_pass_imports(rules.ROOT) == []


@pytest.mark.parametrize("text", ["from vlmopt.tasks import folder\n", "import vlmopt_passes.canonicalize\n"])
def test_a_pass_that_imports_more_is_found(tmp_path: Path, text: str) -> None:
    tree = plant(tmp_path, {"passes/skip_x.py": f"from vlmopt.core.cost import Cost\n{text}"})
    assert [place.partition(" ")[0] for place in rules.forbidden_pass_imports(tree)] == ["passes/skip_x.py:2"]


def test_files_are_short_enough_to_be_read() -> None:
    assert rules.oversized_files(rules.ROOT) == []


def test_a_file_that_is_too_long_is_found(tmp_path: Path) -> None:
    tree = plant(
        tmp_path,
        {
            "vlmopt/a.py": "x = 1\n" * 401,
            "vlmopt/b.py": "x = 1\n" * 400,
            "passes/c.py": "x = 1\n" * 151,
            "passes/d.py": "x = 1\n" * 150,
        },
    )
    assert rules.oversized_files(tree) == ["vlmopt/a.py: 401 lines, allowed 400", "passes/c.py: 151 lines, allowed 150"]


def test_passes_graph_and_planning_name_no_model() -> None:
    assert rules.model_names(rules.ROOT) == []


@pytest.mark.parametrize(
    "text",
    [
        "# as in CLIP\n",
        "name = 'vision_model.siglip'\n",
        "def cut_llava_head(): ...\n",
        "class QwenBlock: ...\n",
        "is_vilt = 1\n",
    ],
)
def test_a_model_name_is_found(tmp_path: Path, text: str) -> None:
    for folder in ("passes", "vlmopt/graph", "vlmopt/planning"):
        plant(tmp_path, {f"{folder}/a.py": text})
    assert len(rules.model_names(tmp_path)) == 3


def test_the_verb_to_clip_is_no_model_name(tmp_path: Path) -> None:
    text = "import torch\ny = x.clip(0, 1)\ntorch.nn.utils.clip_grad_norm_(p, 1.0)\nclipped = torch.clamp(x)\n"
    assert rules.model_names(plant(tmp_path, {"passes/a.py": text})) == []
