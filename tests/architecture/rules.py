"""The rules of the house as functions from a source tree to the places that break them."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAX_LINES = 400
MAX_PASS_LINES = 150

# The higher imports the lower. Rooms of one number do not import each other.
LAYERS = {
    "core": 0,
    "graph": 1,
    "preprocess": 1,
    "registry": 1,
    "rundir": 1,
    "prompting": 2,
    "capture": 3,
    "tasks": 3,
    "profiling": 3,
    "devices": 3,
    "planning": 3,
    "rewrite": 3,
    "tuning": 3,
    "emit": 3,
    "runtime": 3,
    "verify": 3,
    "report": 3,
    "recipe": 3,
    "testing": 4,
    "workflow": 4,
    "cli": 5,
}
# Reading YAML is shared by recipes and tasks, and stays in the one room that knows YAML.
EXCEPTIONS = {"vlmopt.recipe.yaml_file": 1}
PASS_IMPORTS = ("vlmopt.core", "vlmopt.graph")
TORCH_FREE = ("core", "recipe", "report", "registry", "rundir", "cli", "runtime", "devices", "preprocess", "prompting")
HEAVY = {"torch", "transformers", "onnx", "onnxruntime", "onnxscript", "optimum", "scipy", "torch_pruning"}
_NAMES = """
blip blip2 bart beit bert chameleon clip clipseg coca deit dinov2 emu florence fuyu gemma git idefics instructblip
internvl janus kosmos lilt llama llava lxmert minicpm mistral mllama molmo ovis owlvit paligemma phi pixtral qwen qwen2
qwen3 roberta siglip siglip2 smolvlm swin vilt vit vitmae visualbert
"""
MODEL_NAMES = frozenset(_NAMES.split())
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+[0-9]*|[0-9]+")


def sources(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*.py") if "__pycache__" not in file.parts)


def upward_imports(root: Path) -> list[str]:
    """Imports inside `vlmopt/` that do not run downward, those inside functions included."""
    return [
        f"{file.relative_to(root)}:{line} imports {target}"
        for file in sources(root / "vlmopt")
        for line, target in _imports(root, file)
        if target.split(".")[0] == "vlmopt" and not _may_import(_module(root, file), target)
    ]


def forbidden_pass_imports(root: Path) -> list[str]:
    """What a pass imports of ours beside core and graph."""
    return [
        f"{file.relative_to(root)}:{line} imports {target}"
        for file in sources(root / "passes")
        for line, target in _imports(root, file)
        if target.split(".")[0] in ("vlmopt", "vlmopt_passes", "passes")
        and not any(target == allowed or target.startswith(f"{allowed}.") for allowed in PASS_IMPORTS)
    ]


def heavy_imports_at_start(root: Path) -> list[str]:
    """Module-level imports of heavy libraries in the rooms that the command line starts with."""
    return [
        f"{file.relative_to(root)}:{line} imports {target}"
        for file in sources(root / "vlmopt")
        if _room(_module(root, file)) in (*TORCH_FREE, "")
        for line, target in _imports(root, file, at_module_level=True)
        if target.split(".")[0] in HEAVY
    ]


def oversized_files(root: Path) -> list[str]:
    """Files that are too long to be read."""
    limits = [(file, MAX_LINES) for name in ("vlmopt", "tests", "examples") for file in sources(root / name)]
    limits += [(file, MAX_PASS_LINES) for file in sources(root / "passes")]
    lengths = [(file, limit, len(file.read_text(encoding="utf-8").splitlines())) for file, limit in limits]
    return [f"{file.relative_to(root)}: {n} lines, allowed {limit}" for file, limit, n in lengths if n > limit]


def model_names(root: Path) -> list[str]:
    """Names of models where code must know structure only."""
    folders = (root / "passes", root / "vlmopt" / "graph", root / "vlmopt" / "planning")
    return [
        f"{file.relative_to(root)}:{line} names {word}"
        for folder in folders
        for file in sources(folder)
        for line, word in _named_models(file)
    ]


def _named_models(file: Path) -> Iterator[tuple[int, str]]:
    tokens = list(tokenize.generate_tokens(io.StringIO(file.read_text(encoding="utf-8")).readline))
    for index, token in enumerate(tokens):
        is_attribute = index > 0 and tokens[index - 1].string == "."
        if token.type == tokenize.NAME and (
            token.string.startswith("clip_grad") or (is_attribute and token.string == "clip")
        ):
            continue  # to clip is also a verb of torch
        for word in _WORD.findall(token.string):
            if word.lower() in MODEL_NAMES:
                yield token.start[0], word


def _may_import(importer: str, target: str) -> bool:
    source, goal = _room(importer), _room(target)
    if source == goal:
        return True
    if source == "":  # vlmopt/__init__.py opens the front door of the runtime
        return goal == "runtime"
    if goal == "":
        return True
    return _layer(importer) > _layer(target)


def _layer(module: str) -> int:
    for exception, layer in EXCEPTIONS.items():
        if module == exception or module.startswith(f"{exception}."):
            return layer
    room = _room(module)
    if room not in LAYERS:
        raise AssertionError(f"{module}: the room {room!r} is not in the table of layers")
    return LAYERS[room]


def _room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] not in ("__version__", "load") else ""


def _module(root: Path, file: Path) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(root: Path, file: Path, *, at_module_level: bool = False) -> Iterator[tuple[int, str]]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    package = _module(root, file).split(".")
    if file.name != "__init__.py":
        package = package[:-1]
    for node in _running(tree) if at_module_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def _running(node: ast.AST) -> Iterator[ast.AST]:
    """What runs on import: not the bodies of functions, and not what only type checkers see."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _running(child)
