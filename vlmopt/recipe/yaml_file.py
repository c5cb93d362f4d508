"""Reading and writing YAML so that what is written is what is read.

PyYAML follows YAML 1.1, where `no` is false, `1e-3` is a string, `010` is eight and `1:30` is ninety. Answer lists hold
`yes` and `no`, and recipes hold `1e-3`, so scalars resolve here by the core schema of YAML 1.2 instead.
"""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from vlmopt.core.errors import RecipeError, VlmoptError

_CORE_SCHEMA = (  # tag, pattern, first characters; source: YAML 1.2.2, section 10.3.2
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
)


class _Loader(yaml.SafeLoader):
    """The safe loader with the scalars of YAML 1.2 and without duplicate keys."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            if isinstance(key, Hashable):
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """The safe dumper, which quotes a string that YAML 1.1 or 1.2 would read as something else."""

    yaml_implicit_resolvers = {first: list(rules) for first, rules in yaml.SafeDumper.yaml_implicit_resolvers.items()}

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)  # list items are indented below their key, as people write them


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    return int(text, 0) if text.startswith(("0o", "0x")) else int(text, 10)


for _tag, _pattern, _first in _CORE_SCHEMA:
    _expression = re.compile(f"^(?:{_pattern})$")
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _expression, _first)
    if _tag in ("int", "float"):
        _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _expression, _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def read_yaml(path: str | Path, *, error: type[VlmoptError] = RecipeError) -> dict[str, Any]:
    """The mapping that a YAML file holds; an empty file is an empty mapping.

    Raises:
        error: the file cannot be read, is no YAML (with its line), gives a key twice, or holds no mapping of text keys.
    """
    path = Path(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as problem:
        raise error(str(path), f"cannot be read ({problem.strerror or problem})", expected="a YAML file") from problem
    except UnicodeDecodeError as problem:
        raise error(str(path), "is not text in UTF-8", expected="a YAML file") from problem
    except (yaml.YAMLError, ValueError) as problem:
        raise error(_place(path, problem), _cause(problem), expected="YAML") from problem
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise error(str(path), f"holds a {type(content).__name__}", expected="`key: value` lines")
    strange = [key for key in content if not isinstance(key, str)]
    if strange:
        raise error(str(path), f"the key {strange[0]!r} is no text", expected="keys that are words")
    return content


def _place(path: Path, problem: Exception) -> str:
    mark = getattr(problem, "problem_mark", None)
    return f"{path}, line {mark.line + 1}" if mark is not None else str(path)


def _cause(problem: Exception) -> str:
    return str(getattr(problem, "problem", None) or problem)


def write_yaml(path: str | Path, content: Mapping[str, Any], *, error: type[VlmoptError] = RecipeError) -> None:
    """Writes plain data (mappings, lists, text, numbers, booleans, None) in its own order, all of it or nothing.

    Raises:
        error: the content is not plain data, or the file cannot be written.
    """
    path = Path(path)
    try:
        text = yaml.dump(dict(content), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    except yaml.YAMLError as problem:
        raise error(str(path), f"cannot hold {_cause(problem)}", expected="plain data") from problem
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as problem:
        temporary.unlink(missing_ok=True)
        raise error(str(path), f"cannot be written ({problem.strerror or problem})") from problem
