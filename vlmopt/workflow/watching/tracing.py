"""The history of every node and branch of a run: who made it, from what, who removed it, who refused it and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from vlmopt.core.contract import Pass, Plan, Refusal, Site
from vlmopt.core.program import Program
from vlmopt.graph.patterns import is_match
from vlmopt.rewrite.pipeline import Observer, StepResult
from vlmopt.workflow.watching.covering import covered, covers_of, named_lines

CAPTURE = "capture"
MOST_SHOWN = 20
# What becomes of a site: left means by the planner or by --limit, not reached that the pass failed before.
APPLIED, GONE, LEFT, PENDING = "applied", "died with an earlier site", "left", "not reached"


@dataclass
class NodeStory:
    """One node: its line, the nodes it reads, its maker and its end (each "capture" or step, pass and site).

    `target` is the path of the module or tensor that it uses, `module` the one that it was captured in.
    """

    line: str
    reads: tuple[str, ...]
    target: str
    module: str
    made_by: str
    removed_by: str = ""


@dataclass
class Candidacy:
    """One site or refusal, with the nodes that it covers."""

    step: int
    pass_name: str
    name: str
    nodes: frozenset[str]  # component/node
    reason: str = ""  # of a refusal
    outcome: str = ""  # of a site


@dataclass
class Trace(Observer):
    """Remembers what happened to every node, and answers for the names and patterns that were asked about.

    Args:
        patterns: names or patterns of nodes, branches, layers, sites or components, with or without `COMPONENT/`.
        write: told at once when a pattern matches nothing of the captured program.
    """

    patterns: tuple[str, ...]
    write: Callable[[str], None]
    nodes: dict[str, NodeStory] = field(default_factory=dict)
    groups: dict[str, frozenset[str]] = field(default_factory=dict)  # branch, layer or component -> its nodes
    candidacies: list[Candidacy] = field(default_factory=list)
    _pending: dict[str, Candidacy] = field(default_factory=dict)
    _has_begun: bool = False

    def before(self, step: int, pass_: Pass, program: Program) -> None:
        self._take(program, f"between the steps {step - 1} and {step}" if self._has_begun else CAPTURE)
        covers = covers_of(program)
        for name, cover in covers.items():
            self._group(name, name, cover.node_names)
            for branch in cover.branches:
                for own in (branch.name, branch.layer_name):
                    self._group(f"{name}/{own}", name, cover.nodes([own]))
        if not self._has_begun:
            self._has_begun = True
            for pattern in self.unknown():
                self.write(
                    f"--why {pattern}: nothing of the captured program has that name so far{self.meant(pattern)}"
                )

    def planned(self, step: int, pass_: Pass, program: Program, plan: Plan) -> None:
        covers = covers_of(program)
        self._pending = {}
        candidates: tuple[Site | Refusal, ...] = (*plan.sites, *plan.refusals)
        for candidate in candidates:
            nodes = frozenset(f"{candidate.component}/{node}" for node in covered(covers, candidate))
            known = Candidacy(step, pass_.name, candidate.name, nodes)
            if isinstance(candidate, Refusal):
                known.reason = candidate.reason
            else:
                known.outcome = PENDING
                self._pending[candidate.name] = known
            self.candidacies.append(known)

    def applied(self, step: int, pass_: Pass, program: Program, site: Site) -> None:
        self._take(program, f"step {step} {pass_.name}, site {site.name}")
        self._pending[site.name].outcome = APPLIED

    def after(self, result: StepResult) -> None:
        for sites, outcome in ((result.gone, GONE), (result.left, LEFT)):
            for site in sites:
                self._pending[site.name].outcome = outcome

    def unknown(self) -> list[str]:
        """The patterns that have matched nothing until now."""
        return [pattern for pattern in self.patterns if not self._matches(pattern)]

    def meant(self, pattern: str) -> str:
        """ "; did you mean 'x'?" with the closest name, as far as there is one."""
        names = [*self._names(), *(story.target for story in self.nodes.values() if story.target)]
        close = get_close_matches(pattern, [*names, *(name.partition("/")[2] for name in names)], n=1)
        return f"; did you mean {close[0]!r}?" if close else ""

    def answers(self) -> list[dict[str, Any]]:
        """For every name that is asked about what is known of it, as plain data."""
        found = [
            {
                "pattern": pattern,
                "n_matches": len(names),
                "matches": [self._answer(name) for name in names[:MOST_SHOWN]],
            }
            for pattern in self.patterns
            for names in (self._matches(pattern),)
        ]
        return [{**row, "hint": "" if row["n_matches"] else self.meant(str(row["pattern"]))[2:]} for row in found]

    def _take(self, program: Program, event: str) -> None:
        """Notes what is new and what is gone."""
        alive: set[str] = set()
        for name, component in program.components.items():
            lines = named_lines(component)
            for node in component.graph.graph.nodes:
                key = f"{name}/{node.name}"
                alive.add(key)
                story = self.nodes.get(key)
                if node.op != "output" and (story is None or story.removed_by):
                    reads = tuple(f"{name}/{operand.name}" for operand in node.all_input_nodes)
                    module = _module_of(node.meta.get("nn_module_stack"))
                    target = f"{name}/{node.target}" if node.op in ("call_module", "get_attr") else ""
                    self.nodes[key] = NodeStory(lines[node.name], reads, target, module, event)
        for key, story in self.nodes.items():
            if key not in alive and not story.removed_by:
                story.removed_by = event

    def _group(self, name: str, component: str, nodes: frozenset[str]) -> None:
        self.groups.setdefault(name, frozenset(f"{component}/{node}" for node in nodes))

    def _names(self) -> list[str]:
        return [*dict.fromkeys((*self.groups, *(c.name for c in self.candidacies), *self.nodes))]

    def _matches(self, pattern: str) -> list[str]:
        return [name for name in self._names() if is_match(name, [pattern]) or self._uses(name, pattern)]

    def _uses(self, name: str, pattern: str) -> bool:
        """Whether a node uses the module or tensor that the pattern names, as the text of graphs spells it."""
        return name in self.nodes and is_match(self.nodes[name].target, [pattern])

    def _answer(self, name: str) -> dict[str, Any]:
        nodes = frozenset({name}) if name in self.nodes else self.groups.get(name, frozenset())
        about = [c for c in self.candidacies if c.name == name or c.nodes & nodes]
        answer: dict[str, Any] = {"name": name}
        if name in self.nodes:
            answer |= _about_node(self.nodes[name])
        elif nodes:
            removers = sorted({story for node in nodes if (story := self.nodes[node].removed_by)})
            n_left = sum(not self.nodes[node].removed_by for node in nodes)
            answer |= {"kind": "group", "n_nodes": len(nodes), "n_left": n_left, "removed_by": removers}
        else:
            answer |= {"kind": "candidate"}
        sites = [c for c in about if c.outcome]
        refusals = [c for c in about if c.reason]
        return {
            **answer,
            "sites": [_row(c, outcome=c.outcome) for c in sites],
            "refusals": [_row(c, reason=c.reason) for c in refusals],
        }


def _about_node(story: NodeStory) -> dict[str, Any]:
    removed = [story.removed_by] if story.removed_by else []
    facts = {"text": story.line, "reads": list(story.reads), "module": story.module}
    return {"kind": "node", **facts, "made_by": story.made_by, "removed_by": removed}


def _row(candidacy: Candidacy, **more: str) -> dict[str, Any]:
    return {"step": candidacy.step, "pass": candidacy.pass_name, "name": candidacy.name, **more}


def _module_of(stack: object) -> str:
    """The path of the innermost module that the node was captured in."""
    if not isinstance(stack, dict) or not stack:
        return ""
    innermost = list(stack.values())[-1]
    return str(innermost[0]) if isinstance(innermost, tuple) else ""


def why_lines(answers: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The answers for a person, a few lines a name."""
    for answer in answers:
        if not answer["matches"]:
            yield f"{answer['pattern']}: nothing has that name" + (f"; {answer['hint']}" if answer["hint"] else "")
        for match in answer["matches"]:
            yield from _match_lines(match)
        if answer["n_matches"] > len(answer["matches"]):
            yield f"... and {answer['n_matches'] - len(answer['matches'])} more names match {answer['pattern']}"


def _match_lines(match: dict[str, Any]) -> Iterator[str]:
    if match["kind"] == "node":
        yield f"{match['name']} {match['text'].partition(': ')[2]}"
        where = f" (module {match['module']})" if match["module"] else ""
        yield f"  made by {match['made_by']}{where}"
        yield f"  reads {', '.join(match['reads']) or 'nothing'}"
    elif match["kind"] == "group":
        yield f"{match['name']} ({match['n_nodes']} nodes, {match['n_left']} left)"
    else:
        yield match["name"]
    for event in match.get("removed_by", []):
        yield f"  removed by {event}"
    for row in match["sites"]:
        yield f"  site {row['name']} of step {row['step']} {row['pass']}: {row['outcome']}"
    for row in match["refusals"]:
        yield f"  refused by step {row['step']} {row['pass']}: {row['name']}: {row['reason']}"
    if not match["sites"] and not match["refusals"] and not match.get("removed_by"):
        yield "  no pass planned anything here"
