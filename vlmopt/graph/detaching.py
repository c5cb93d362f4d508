"""Takes adapters out of a graph again: what is left is the graph without them, node for node.

An adapter lies beside the model: what is computed from its weights joins the model in sums, `x + A(x)`, and nowhere
else. So each sum whose one term depends on adapters gives way to its other term.
"""

from __future__ import annotations

import torch
from torch import fx

from vlmopt.core.errors import VlmoptError
from vlmopt.graph.canonical import drop_dead_nodes
from vlmopt.graph.marks import hand_marks_on
from vlmopt.graph.modules import ADAPTERS, is_adapter_call
from vlmopt.graph.text import operation_text

aten = torch.ops.aten


def detach_adapters(module: fx.GraphModule) -> int:
    """Takes all adapters out, in place; returns how many sums gave way.

    Raises:
        VlmoptError: something other than a sum reads what an adapter computes beside what the model does.
    """
    tainted, n = set[fx.Node](), 0
    for node in list(module.graph.nodes):
        if is_adapter_call(node) or (node.op == "get_attr" and str(node.target).startswith(f"{ADAPTERS}.")):
            tainted.add(node)
            continue
        found = [operand for operand in node.all_input_nodes if operand in tainted]
        if not found:
            continue
        others = [operand for operand in node.all_input_nodes if operand not in tainted and operand.op != "get_attr"]
        if node.target is aten.add.Tensor and len(found) == len(others) == 1:
            hand_marks_on(node, others[0])
            node.replace_all_uses_with(others[0])
            n += 1
        elif node.op == "output":
            found_text = f"an output ({found[0].name}) is a value of an adapter alone"
            raise VlmoptError(
                "detaching adapters", found_text, expected="adapters that are added to values of the model"
            )
        else:
            tainted.add(node)
    drop_dead_nodes(module)
    if left := next((node for node in module.graph.nodes if node in tainted), None):
        raise VlmoptError(
            "detaching adapters",
            f"the model reads {left.name} ({operation_text(module, left)}), which an adapter computes",
            expected="adapters that are added to values of the model",
        )
    return n
