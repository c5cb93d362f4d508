"""What a pass may return from `plan`, checked before anybody reads it."""

from __future__ import annotations

from collections.abc import Iterable

from vlmopt.core.contract import Plan, Refusal, Site
from vlmopt.core.cost import Cost
from vlmopt.core.errors import PassError


def check_plan(plan: object, place: str, *, components: Iterable[str]) -> None:
    """Raises PassError for what is no plan: other types, unknown components, two sites of one name."""
    if not isinstance(plan, Plan):
        raise PassError(place, f"returned {kind_of(plan)}", expected="a Plan")
    known = tuple(components)
    _check_entries(plan.sites, Site, f"{place}: sites", known)
    _check_entries(plan.refusals, Refusal, f"{place}: refusals", known)
    names = [site.name for site in plan.sites]
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if twice is not None:
        raise PassError(place, f"plans two sites named {twice}", expected="names that are unique within the plan")
    for site in plan.sites:
        if not (isinstance(site.target, tuple) and all(isinstance(name, str) for name in site.target)):
            found = f"site {site.name} has the target {site.target!r}"
            raise PassError(place, found, expected="a tuple of names, since the program is cloned before `apply`")
        if not isinstance(site.saving, Cost):
            raise PassError(place, f"site {site.name} has the saving {site.saving!r}", expected="a Cost")


def _check_entries(entries: object, kind: type[Site] | type[Refusal], place: str, components: tuple[str, ...]) -> None:
    if not isinstance(entries, tuple):
        raise PassError(place, f"are {kind_of(entries)}", expected=f"a tuple of {kind.__name__}")
    for entry in entries:
        if not isinstance(entry, kind):
            raise PassError(place, f"hold {kind_of(entry)}", expected=kind.__name__)
        text = entry.reason if isinstance(entry, Refusal) else entry.summary
        if not (isinstance(entry.name, str) and entry.name and isinstance(text, str)):
            raise PassError(place, f"hold {entry!r}", expected="a name, and texts that are text")
        if isinstance(entry, Refusal) and not entry.reason:
            raise PassError(place, f"{entry.name} gives no reason", expected="why the candidate is left alone")
        if entry.component not in components:
            found = f"{entry.name} is in the component {entry.component!r}"
            raise PassError(place, found, expected=f"one of {', '.join(components)}")


def kind_of(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
