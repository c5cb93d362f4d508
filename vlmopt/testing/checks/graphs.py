"""Does the pass leave graphs that are sound, weights as they were, and a signature that is kept or declared?"""

from __future__ import annotations

import torch
from torch import fx

from vlmopt.core.program import Program
from vlmopt.graph.modules import get_at
from vlmopt.rewrite.snapshot import aliases_of, described
from vlmopt.testing.attempt import STEP
from vlmopt.testing.checks.check import PLAN, RESULT, CaseCheck
from vlmopt.testing.inputs import BATCH, shape_at, sizes_of
from vlmopt.testing.numbers import outputs_of
from vlmopt.testing.shapes import metadata_key, stale_metadata
from vlmopt.testing.trial import Finding, Inapplicable, Outcome, Trial


def leaves_sound_graphs(trial: Trial) -> Outcome:
    broken = trial.attempt.broken
    return Finding(f"it left a program that cannot be run: {broken}", expected="sound graphs") if broken else None


def writes_no_weight(trial: Trial) -> Outcome:
    for stored in trial.attempt.snapshot.tensors:
        if not stored.is_unchanged:
            expected = "a new tensor, since weights are shared with the program before"
            return Finding(f"wrote the tensor {stored.path} in place", expected=expected)
    return None


def edits_no_shared_module(trial: Trial) -> Outcome:
    for leaf in trial.attempt.snapshot.leaves:
        if not leaf.is_unchanged:
            expected = "a new module, since leaf modules are shared with the program before"
            return Finding(f"changed the module {leaf.path} in place", expected=expected)
    return None


def keeps_the_signature(trial: Trial) -> Outcome:
    if trial.pass_.changes_signature:
        return Inapplicable("the pass declares that it changes the signature")
    found, snapshot = trial.attempt.program, trial.attempt.snapshot
    signatures = {name: (part.inputs, part.outputs) for name, part in found.components.items()}
    names = sorted(signatures.keys() ^ snapshot.signatures.keys())
    names += [name for name in signatures if signatures[name] != snapshot.signatures.get(name)]
    if names:
        return Finding(f"changed inputs or outputs of {names[0]}", expected="changes_signature = True")
    now = described(found)
    other = [what for what, value in snapshot.described.items() if now[what] != value]
    return Finding(f"changed the program's {other[0]}", expected="changes_signature = True") if other else None


def adds_no_alias(trial: Trial) -> Outcome:
    for name, component in trial.attempt.program.components.items():
        new = aliases_of(component.graph) - trial.attempt.snapshot.aliases.get(name, frozenset())
        if new:
            return Finding(f"an output of {name} is {min(new)}", expected="outputs that alias nothing")
    return None


def has_fresh_metadata(trial: Trial) -> Outcome:
    program, known = trial.attempt.program, trial.subject.memory.stale
    for component in program.components.values():
        key = (metadata_key(component), tuple(program.dims.items()))
        if key not in known:
            known[key] = stale_metadata(component, program.dims)
        if stale := known[key]:
            remedy = "vlmopt.graph.build makes nodes that know their shape"
            return Finding(stale, expected='meta["val"] with the shape that is computed', remedy=remedy)
    return None


def stamps_what_it_made(trial: Trial) -> Outcome:
    """New nodes name their maker and old ones keep theirs, so that `--why` can tell who made what."""
    before, after = trial.attempt.before, trial.attempt.program
    for name, component in after.components.items():
        old = _nodes(before, name)
        for node in component.graph.graph.nodes:
            known = old.get(node.name)
            maker, wanted = node.meta.get("made_by"), (STEP, trial.pass_.name)
            if known is None and maker != wanted:
                return Finding(f"the new node {node.name} names {maker} as its maker", expected=f"{wanted}")
            if known is not None and maker != known.meta.get("made_by"):
                return Finding(f"the old node {node.name} names {maker} as its maker", expected="the maker it had")
            if known is not None and _operation(before, name, known) != _operation(after, name, node):
                expected = "a name of its own for a new node"
                return Finding(f"the node {node.name} is another operation than before", expected=expected)
    return None


def _nodes(program: Program, component: str) -> dict[str, fx.Node]:
    part = program.components.get(component)
    return {} if part is None else {node.name: node for node in part.graph.graph.nodes}


def _operation(program: Program, component: str, node: fx.Node) -> object:
    """What a node does; where its tensors lie may change."""
    if node.op == "call_module":
        return type(get_at(program.components[component].graph, str(node.target)))
    return (node.op, node.target) if node.op in ("call_function", "call_method") else node.op


def returns_what_its_specs_say(trial: Trial) -> Outcome:
    program, feeds = trial.attempt.program, trial.feeds["example"]
    found, sizes = outputs_of(program, feeds), sizes_of(program.dims, batch=BATCH)
    for name, component in program.components.items():
        for spec in component.outputs:
            value = found[f"{name}/{spec.name}"]
            if value.dtype != getattr(torch, spec.dtype):
                return Finding(
                    f"{name} returns {spec.name} as {value.dtype}", expected=f"{spec.dtype}, as its spec says"
                )
            is_fixed = name in program.fixed_inputs  # its batch is that of the fixed inputs
            if not is_fixed and tuple(value.shape) != shape_at(spec, sizes):
                said = tuple(value.shape)
                return Finding(
                    f"{name} returns {spec.name} of shape {said}", expected=f"{spec.shape}, as its spec says"
                )
    return None


CHECKS = (
    CaseCheck(
        "leaves-sound-graphs",
        "graphs pass fx's lint, and take and return as many values as their specs name",
        leaves_sound_graphs,
        PLAN,
        is_general=True,
    ),
    CaseCheck("writes-no-weight", "no tensor is written in place", writes_no_weight, PLAN, is_general=True),
    CaseCheck(
        "edits-no-shared-module", "no leaf module gets other settings or tensors", edits_no_shared_module, PLAN,
        is_general=True,
    ),
    CaseCheck(
        "keeps-the-signature",
        "inputs, outputs and what the program says of itself stay, unless the pass declares it",
        keeps_the_signature,
        RESULT,
        is_general=True,
    ),
    CaseCheck("adds-no-alias", "no output becomes an input or another output", adds_no_alias, RESULT, is_general=True),
    CaseCheck(
        "has-fresh-metadata",
        "shape and dtype of every node are what is computed, dynamic dimensions included",
        has_fresh_metadata,
        RESULT,
        is_general=True,
    ),
    CaseCheck(
        "stamps-what-it-made", "new nodes name the pass as their maker, old ones stay whose they were",
        stamps_what_it_made, RESULT, is_general=True,
    ),
    CaseCheck(
        "returns-what-its-specs-say", "outputs have the dtype and the shape of their specs", returns_what_its_specs_say,
        RESULT, is_general=True,
    ),
)  # fmt: skip
