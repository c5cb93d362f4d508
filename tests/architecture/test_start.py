"""The command line starts without the libraries that cost seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture import rules
from tests.architecture.test_house import plant

LOADED_AFTER = """
import sys
sys.path.insert(0, {root!r})
from vlmopt.cli import main
try:
    main({args!r})
except SystemExit:
    pass
print("HEAVY:" + ",".join(sorted(set(sys.modules) & set({heavy!r}))))
"""


def heavy_modules_after(root: Path, args: list[str]) -> str:
    """Heavy libraries that a fresh process has loaded after running the command line of this tree."""
    script = LOADED_AFTER.format(root=str(root), args=args, heavy=sorted(rules.HEAVY | {"numpy", "PIL"}))
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout.rpartition("HEAVY:")[2].strip()


@pytest.mark.parametrize(
    "args",
    [["--help"], ["passes", "list"], ["passes", "list", "--json"], ["optimize", "--help"], ["profile", "--help"]],
    ids=" ".join,
)
def test_help_and_listings_load_no_heavy_library(args: list[str]) -> None:
    assert heavy_modules_after(rules.ROOT, args) == ""


def test_a_command_line_that_loads_a_heavy_library_is_found(tmp_path: Path) -> None:
    plant(tmp_path, {"vlmopt/__init__.py": "", "vlmopt/cli/__init__.py": "import PIL\ndef main(args): pass\n"})
    assert heavy_modules_after(tmp_path, ["--help"]) == "PIL"


def test_rooms_that_start_the_command_line_import_no_heavy_library_at_module_level() -> None:
    assert rules.heavy_imports_at_start(rules.ROOT) == []


def test_a_heavy_import_at_module_level_is_found(tmp_path: Path) -> None:
    tree = plant(
        tmp_path,
        {
            "vlmopt/report/tables.py": "import torch.nn\n",
            "vlmopt/runtime/session.py": "try:\n    from onnxruntime import X\nexcept ImportError:\n    pass\n",
            "vlmopt/core/program.py": "if TYPE_CHECKING:\n    from torch import Tensor\n\ndef f():\n    import torch\n",
            "vlmopt/graph/regions.py": "import torch\n",
        },
    )
    assert rules.heavy_imports_at_start(tree) == [
        "vlmopt/report/tables.py:1 imports torch.nn",
        "vlmopt/runtime/session.py:2 imports onnxruntime.X",
    ]
