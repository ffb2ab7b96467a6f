"""`ReachedTensors`: whose gradients a call sums, parameters and whatever else its forward reaches.

A forward may compute with tensors that are no parameters of the module: those of a layer that is
kept in a list, of a function that holds the original of a layer, or a tensor on an attribute. Plain
torch gives them gradients, so `ShardedCall` does too: this class searches the shards' graphs for
leaves that are no replica's. It searches all graphs in the first calls of a kind, in those whose
number is a power of two, and in every call of a module that is known to have such tensors; in other
calls it searches one shard's, in turn, and all others if that one has such a leaf.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from torch_spheres.reduction.streaming_sum import Grads
from torch_spheres.training.graph_leaves import ShardGraph
from torch_spheres.training.replica import Replica
from torch_spheres.training.replica_pool import ReplicaPool
from torch_spheres.training.shard import Shard

__all__ = ["ReachedTensors"]


class ReachedTensors:
    """The tensors that one call's shards reach.

    Args:
        pool: has inspected the module.
        closely: whether all graphs are searched, whatever is known.
        number: of the call, among those of its kind.
        alone: whether this process has the whole batch.

    Attributes:
        tensors: whose gradients are summed: the module's parameters, then the others.
    """

    def __init__(self, pool: ReplicaPool, closely: bool, number: int, alone: bool) -> None:
        self._pool, self._number, self._alone = pool, number, alone
        params = [p for p in pool.parameters if p.requires_grad]
        self._registered = len(params)
        # A tensor computed from others may be left from an earlier step: a graph has to have it.
        self._on_attributes = [t for t in pool.scan.leaves if t.is_leaf]
        self._reached_by: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._unregistered: list[Tensor] = []  # leaves that are no replica's
        self._bypassed: list[int] = []  # places of parameters that are reached past the replicas
        self.tensors: list[Tensor] = [*params, *self._on_attributes]
        self._place = {id(t): i for i, t in enumerate(self.tensors)}
        self._searches = closely or bool(pool.scan.leaves)
        if known := pool.unregistered_leaves():
            self._searches = True
            # Leaves with hooks are left out until a graph reaches them, which is an error.
            self._add(leaf for leaf in known if not leaf._backward_hooks)
        self._is_open = closely  # whether tensors can still be added: one shard runs alone

    def _add(self, leaves: Iterable[Tensor]) -> None:
        for leaf in leaves:
            _refuse_hooks(leaf)
            place = self._place.get(id(leaf))
            if place is None:
                self._place[id(leaf)] = len(self.tensors)
                self._unregistered.append(leaf)
                self.tensors.append(leaf)
            elif place not in self._bypassed:
                self._bypassed.append(place)

    def targets(self, replica: Replica) -> list[Tensor]:
        """The leaves of a shard's graph, in the order in which `merge` takes their gradients."""
        if len(self.tensors) == self._registered and not self._bypassed:
            return [mine for p, mine in replica.params if p.requires_grad]
        mine = {id(t): leaf for t, leaf in (*replica.params, *replica.attribute_leaves)}
        bypassed = [self.tensors[i] for i in self._bypassed]
        return [*(mine.get(id(t), t) for t in self.tensors), *bypassed]

    def merge(self, grads: Grads, inputs: Grads) -> tuple[Grads, Grads]:
        """One gradient for each of `tensors`, from those of `targets`; `inputs` as they are."""
        count = len(self.tensors)
        if len(grads) > count:
            grads, more = grads[:count], grads[count:]
            for i, grad in zip(self._bypassed, more, strict=True):
                own = grads[i]
                grads[i] = own if grad is None else grad if own is None else own + grad
        return grads, inputs

    # ---- searching ----

    def search(self, shards: Sequence[Shard]) -> None:
        """Searches the graphs after all shards' forward.

        Raises a RuntimeError if a tensor is reached whose gradient could not be summed.
        """
        if torch.is_grad_enabled() and shards:
            if not self._searches:
                one = shards[self._number % len(shards)]
                self._searches = any(self._new_leaves([one], [ShardGraph(one.outputs)]))
            if self._searches:
                graphs = [ShardGraph(shard.outputs) for shard in shards]
                _refuse_shared_nodes(graphs)
                self._add_new(shards, graphs)
                for k, (shard, graph) in enumerate(zip(shards, graphs, strict=True)):
                    for first in self._set_targets(k, shard, graph):
                        shards[first].shares_leaves = True
        self._refuse_on_ranks()

    def search_one(self, k: int, shard: Shard, roots: Sequence[Tensor], count: int) -> None:
        """Searches the graph of shard `k` of `count` before its backward.

        Tensors can be added until `close` is called.
        """
        if self._searches or k == self._number % count:
            graph = ShardGraph(roots)
            self._add_new([shard], [graph], self._is_open)
            self._set_targets(k, shard, graph)
        self._refuse_on_ranks()

    def close(self) -> None:
        """No tensor can be added from now on: several shards' gradients are being summed."""
        self._is_open = False

    def _set_targets(self, k: int, shard: Shard, graph: ShardGraph) -> set[int]:
        """Sets whose gradients a shard computes; returns the shards with which it shares leaves."""
        shared = set()
        shard.params = self.targets(shard.replica)
        own = {*shard.replica.leaves, *map(id, shard.inputs)}
        for i, leaf in graph.leaves.items():
            if i not in own:  # made by this shard's forward, or reached by other shards too
                known, first = self._reached_by.get(i, (None, k))
                if known is None or known() is not leaf:
                    self._reached_by[i] = weakref.ref(leaf), k
                elif first != k:
                    shard.shares_leaves = True
                    shared.add(first)
        return shared

    def _new_leaves(
        self, shards: Sequence[Shard], graphs: Sequence[ShardGraph]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Leaves that are not among `tensors`: originals of replicas' leaves, unregistered ones."""
        own: set[int] = set()
        for shard in shards:
            own.update(shard.replica.leaves, map(id, shard.inputs))
        originals = {id(leaf): t for s in shards for t, leaf in s.replica.attribute_leaves}
        computed: dict[int, Tensor] = {}
        unregistered: dict[int, Tensor] = {}
        for graph in graphs:
            for i, leaf in graph.leaves.items():
                if i in originals:
                    computed[id(originals[i])] = originals[i]
                elif i not in own:
                    unregistered[i] = leaf
        if unregistered:
            known = {*map(id, self._unregistered), *(id(self.tensors[i]) for i in self._bypassed)}
            unregistered = {i: t for i, t in unregistered.items() if i not in known}
        new = [t for i, t in computed.items() if i not in self._place]
        return new, [*unregistered.values()]

    def _add_new(
        self, shards: Sequence[Shard], graphs: Sequence[ShardGraph], is_open: bool = True
    ) -> None:
        computed, unregistered = self._new_leaves(shards, graphs)
        if not computed and not unregistered:
            return
        self._pool.add_unregistered(unregistered)
        if not is_open:
            raise RuntimeError(
                f"a tensor of shape {tuple((computed + unregistered)[0].shape)} that is no "
                "parameter of the module was used in a shard's forward, or in the loss, for the "
                "first time, while other shards' gradients are summed without it; it is known from "
                "the next call on. Make it a parameter"
            )
        for tensor in computed:
            self._place[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)
        self._add(unregistered)

    def _refuse_on_ranks(self) -> None:
        bypassed = (self.tensors[i] for i in self._bypassed)
        more = [*self._on_attributes, *self._unregistered, *bypassed]
        if more and not self._alone and torch.is_grad_enabled():
            shapes = [tuple(t.shape) for t in more]
            raise RuntimeError(
                "the forward computes with tensors that require a gradient and are reached "
                f"past the module's parameters, of shapes {shapes}; in several processes they "
                "have to be parameters of registered layers (nn.ModuleList, nn.ParameterList), "
                "reached by way of self"
            )


def _refuse_hooks(leaf: Tensor) -> None:
    if leaf._backward_hooks:
        raise RuntimeError(
            f"a tensor of shape {tuple(leaf.shape)} has a hook (register_hook), and the forward "
            "reaches it past the module's own parameters, by a function or a layer that is "
            "registered nowhere: the hook would run for each shard. Register the layer, and reach "
            "it by way of self"
        )


def _refuse_shared_nodes(graphs: Sequence[ShardGraph]) -> None:
    """Raises a RuntimeError if two graphs have a node in common, which was computed before them."""
    seen: set[object] = set()
    for graph in graphs:
        if not seen.isdisjoint(graph.nodes):
            names = sorted({type(node).__name__ for node in seen & graph.nodes})
            raise RuntimeError(
                "the forward uses a tensor that was computed outside of it from something that "
                f"requires a gradient ({', '.join(names)}), and all shards' backward passes would "
                "go through that one graph. Compute it inside the forward, or pass it as an "
                "argument, or keep it on an attribute of the module"
            )
        seen |= graph.nodes
