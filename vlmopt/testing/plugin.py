"""pytest plugin: runs the checks of passes beside the tests that are there. Importing it loads no torch.

`pytest --vlmopt-pass drop-scaling` or `--vlmopt-pass FILE.py` adds the checks of a pass, `--vlmopt-pass-dir DIR` those
of every pass in a folder; the ini options `vlmopt_passes`, `vlmopt_pass_dirs` and `vlmopt_golden` say it for good.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmopt.core.errors import VlmoptError
from vlmopt.testing.contract import ContractItem, contract_items, judge, touched_key

NODE = "vlmopt-passes"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vlmopt", "checks of vlmopt passes")
    group.addoption(
        "--vlmopt-pass", action="append", default=[], metavar="NAME|FILE", help="Check this pass; may be repeated."
    )
    group.addoption(
        "--vlmopt-pass-dir",
        action="append",
        default=[],
        metavar="DIR",
        help="Check every pass in this folder; may be repeated.",
    )
    group.addoption("--vlmopt-golden", metavar="DIR", help="Folder of the golden texts of these passes.")
    group.addoption(
        "--vlmopt-update-golden", action="store_true", help="Write the golden texts anew; refused where CI is set."
    )
    parser.addini("vlmopt_passes", "Passes to check, by name or file.", type="linelist", default=[])
    parser.addini("vlmopt_pass_dirs", "Folders all passes of which to check.", type="paths", default=[])
    parser.addini("vlmopt_golden", "Folder of the golden texts of these passes.")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--vlmopt-update-golden"):
        from vlmopt.testing.golden import refuse_updates_in_ci

        try:
            refuse_updates_in_ci()
        except VlmoptError as error:
            raise pytest.UsageError(f"--vlmopt-update-golden: {error.one_line()}") from error


@pytest.hookimpl(tryfirst=True)  # so that -k and -m choose among these items as well
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    folders = _folders(config)
    names = [_resolved(name, config.invocation_params.dir) for name in config.getoption("--vlmopt-pass")]
    names += [_resolved(name, config.rootpath) for name in config.getini("vlmopt_passes")]
    names += [name for folder in folders for name in _passes_in(folder)]
    if names:
        found = contract_items(list(dict.fromkeys(names)), pass_dirs=folders, golden=_golden(config))
        node = _Passes.from_parent(session, name=NODE, nodeid=NODE, items=found)
        items.extend(node.collect())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for path in config.stash.get(touched_key(), []):
        terminalreporter.write_line(f"golden text {'written' if path.exists() else 'removed'}: {path}")


class _Passes(pytest.Collector):
    """Stands above the checks of all passes."""

    def __init__(self, *, items: list[ContractItem], **words: object) -> None:
        super().__init__(**words)  # type: ignore[arg-type]
        self._items = items

    def collect(self) -> list[pytest.Item]:
        return [_Check.from_parent(self, name="::".join(item.words), item=item) for item in self._items]


class _Check(pytest.Item):
    """One check of one pass."""

    def __init__(self, *, item: ContractItem, **words: object) -> None:
        super().__init__(**words)  # type: ignore[arg-type]
        self._item = item

    def runtest(self) -> None:
        judge(self._item, self.config)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        return self.path, None, ": ".join(self._item.words)


def _folders(config: pytest.Config) -> list[Path]:
    given = [config.invocation_params.dir / folder for folder in config.getoption("--vlmopt-pass-dir")]
    folders = [*given, *config.getini("vlmopt_pass_dirs")]
    for folder in folders:
        if not folder.is_dir():
            raise pytest.UsageError(f"--vlmopt-pass-dir {folder}: is no folder")
    return folders


def _passes_in(folder: Path) -> list[str]:
    """Files of a folder that hold passes; those that cannot be used are named as well, and fail."""
    from vlmopt.registry import survey

    found = survey([folder])
    files = [info.file for info in found.passes.values()] + [entry.file for entry in found.broken]
    return sorted(str(file) for file in files if file is not None and file.parent == folder.resolve())


def _resolved(name: str, start: Path) -> str:
    return str(start / name) if name.endswith(".py") else name


def _golden(config: pytest.Config) -> Path | None:
    option: str | None = config.getoption("--vlmopt-golden")
    if option:
        return config.invocation_params.dir / option
    ini: str = config.getini("vlmopt_golden")
    return config.rootpath / ini if ini else None
