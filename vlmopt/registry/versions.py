"""Which vlmopt a pass was written for: `needs_vlmopt` in its class, and what its distribution requires."""

from __future__ import annotations

from collections.abc import Sequence

import vlmopt
from vlmopt.core.errors import PassError


def check_needs(place: str, needs: str) -> None:
    """Raises PassError unless this vlmopt is among the versions that a pass needs ("" is any)."""
    if not needs:
        return
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    try:
        wanted = SpecifierSet(needs)
    except InvalidSpecifier as error:
        raise PassError(place, f"needs_vlmopt is {needs!r}", expected='versions such as ">=0.1,<1"') from error
    if not wanted.contains(vlmopt.__version__, prereleases=True):
        raise _other_version(place, needs)


def check_requirements(place: str, requirements: Sequence[str]) -> None:
    """Raises PassError when a distribution requires another vlmopt ("vlmopt>=0.1,<1" among its requirements)."""
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.utils import canonicalize_name

    for text in requirements:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue  # pip's business; only what it asks of vlmopt is ours
        if canonicalize_name(requirement.name) != "vlmopt":
            continue
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if not requirement.specifier.contains(vlmopt.__version__, prereleases=True):
            raise _other_version(place, str(requirement.specifier))


def _other_version(place: str, needs: str) -> PassError:
    return PassError(
        place,
        f"is for vlmopt {needs}, and this is vlmopt {vlmopt.__version__}",
        remedy="install a version of the plugin for this vlmopt, or that vlmopt",
    )
