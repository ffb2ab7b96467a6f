"""`ShardGraph`: the leaves and nodes of a shard's autograd graph.

Used by reached_tensors.py, and by shard.py for reentrant checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

__all__ = ["ShardGraph"]


class ShardGraph:
    """The graph behind some tensors.

    Attributes:
        leaves: by id, the tensors whose ``.grad`` a backward pass would add to.
        nodes: all other nodes.
    """

    def __init__(self, roots: Iterable[Any]) -> None:
        self.leaves: dict[int, Tensor] = {}
        self.nodes: set[Any] = set()
        stack: list[Any] = []
        for root in roots:
            if not isinstance(root, Tensor) or not root.requires_grad:
                continue
            if root.grad_fn is None:
                self.leaves[id(root)] = root
            else:
                stack.append(root.grad_fn)
        while stack:
            node = stack.pop()
            if type(node).__name__ == "AccumulateGrad":
                self.leaves[id(node.variable)] = node.variable
            elif node not in self.nodes:
                self.nodes.add(node)
                stack += [following for following, _ in node.next_functions if following]
