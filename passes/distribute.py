"""Products of sums of weights as sums of products: ``(W1 - c * W2) @ v`` is two attentions over the same values.

Each is one softmax and can be lifted alone. Where one of them can't, or none is replaced, the product is put back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from attncomp.passes.contraction import is_contraction
from attncomp.passes.nodes import argument, name_of, value_of

_UNARY = frozenset(
    ("clone", "contiguous", "alias", "_to_copy", "to", "transpose", "mT", "permute", "unsqueeze", "expand")
)
_TERM = _UNARY | {
    "view",
    "reshape",
    "select",
    "slice",
    "getitem",
    "chunk",
    "split",
    "unbind",
    "mul",
    "div",
    "neg",
    "dropout",
}
_SOFTMAX = ("softmax", "_softmax", "_safe_softmax", "special_softmax")
DISTRIBUTED = "attncomp_distributed"
"""The name in a node's meta of what was made of it; the node itself is then no longer used."""


@dataclass(frozen=True)
class Distributed:
    """A product that was taken apart: `total` stands for `whole` and adds or subtracts the two `parts`."""

    whole: Node
    parts: tuple[Node, Node]
    total: Node

    def undo(self, graph: GraphModule) -> None:
        self.total.replace_all_uses_with(self.whole)
        graph.graph.erase_node(self.total)
        del self.whole.meta[DISTRIBUTED]
        for part in self.parts:
            if not part.users and DISTRIBUTED not in part.meta:
                graph.graph.erase_node(part)


def distribute(graph: GraphModule) -> list[Distributed]:
    """Take every product apart whose weights are a sum of terms with a softmax each."""
    found: list[Distributed] = []
    queue = [n for n in graph.graph.nodes if is_contraction(n)]
    while queue:
        node = queue.pop(0)
        made = _taken_apart(graph, node)
        if made is not None:
            found.append(made)
            queue.extend(made.parts)
    return found


def put_back(graph: GraphModule) -> None:
    """Undo those of which no part was replaced."""
    while True:
        made = (n.meta.get(DISTRIBUTED) for n in list(graph.graph.nodes))
        left = [d for d in made if d is not None and tuple(d.total.all_input_nodes) == d.parts]
        if not left:
            return
        for d in left:
            d.undo(graph)


def _taken_apart(graph: GraphModule, node: Node) -> Distributed | None:
    for operand in node.all_input_nodes:
        chain = _chain(operand)
        if chain is None:
            continue
        total = chain[-1]
        terms = total.args[:2]
        if not all(isinstance(t, Node) and _has_softmax(t) for t in terms):
            continue
        with graph.graph.inserting_before(node):
            parts = tuple(_with_term(graph, node, chain, term) for term in terms if isinstance(term, Node))
            assert callable(total.target)
            joined = graph.graph.call_function(total.target, parts)
        joined.meta = dict(node.meta)
        assert len(parts) == 2
        made = Distributed(node, (parts[0], parts[1]), joined)
        node.replace_all_uses_with(joined)
        node.meta[DISTRIBUTED] = made
        return made
    return None


def _chain(operand: Node) -> list[Node] | None:
    """The nodes from an operand down to a sum of two tensors of its shape, each read by the next alone; else None."""
    chain = [operand]
    while True:
        node = chain[-1]
        if len(node.users) != 1:
            return None
        if name_of(node) in ("add", "sub") and argument(node, 2, "alpha", 1) == 1:
            terms = node.args[:2]
            same = all(
                isinstance(t, Node)
                and isinstance(value_of(t), torch.Tensor)
                and value_of(t).shape == value_of(node).shape
                and value_of(t).dtype == value_of(node).dtype
                for t in terms
            )
            return chain if same and terms[0] is not terms[1] else None
        if name_of(node) not in _UNARY or len(node.all_input_nodes) != 1:
            return None
        chain.append(node.all_input_nodes[0])


def _has_softmax(term: Node) -> bool:
    """Whether a term is one softmax, rearranged and scaled."""
    queue, seen = [term], 0
    while queue and seen < 16:
        node = queue.pop()
        seen += 1
        if name_of(node) in _SOFTMAX:
            return True
        if name_of(node) in _TERM:
            queue.extend(node.all_input_nodes)
    return False


def _with_term(graph: GraphModule, node: Node, chain: list[Node], term: Node) -> Node:
    """A copy of `node` that reads one term in place of the sum at the chain's end."""
    below = term
    for link in reversed(chain[:-1]):
        copied = graph.graph.node_copy(link)
        copied.replace_input_with(link.all_input_nodes[0], below)
        below = copied
    copied = graph.graph.node_copy(node)
    copied.replace_input_with(chain[0], below)
    return copied
