"""The tensors whose gradients a call sums: parameters, and whatever else the forward reaches.

A forward may compute with tensors that are no parameters of the module: with a layer that is kept
in a list, with a function that holds the original of a layer, with a tensor on an attribute. Plain
torch gives them gradients. So the shards' graphs are searched for leaves that are no replica's: all
of them in the first calls of a kind, in those whose number is a power of two, and in every call of
a module that is known to have such tensors; in other calls one shard's, in turn, and the others' if
it has such a leaf.
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
from torch_spheres.training.shard_task import Shard

__all__ = ["Reached"]


class Reached:
    """What one call's shards reach.

    Args:
        pool: has looked at the module.
        closely: all graphs are searched, whatever is known.
        number: of the call, among those of its kind.
        alone: this process has the whole batch.

    Attributes:
        tensors: whose gradients are summed: the module's parameters, then the others.
    """

    def __init__(self, pool: ReplicaPool, closely: bool, number: int, alone: bool) -> None:
        self._pool, self._number, self._alone = pool, number, alone
        params = [p for p in pool.parameters if p.requires_grad]
        self._registered = len(params)
        # (One that is computed from others counts only where a graph has it: it may be a rest.)
        self._outside = [t for t in pool.outside if t.is_leaf]
        self._reached_by: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._strange: list[Tensor] = []  # leaves that are no replica's
        self._originals: list[int] = []  # of parameters that are reached past the replicas
        self.tensors: list[Tensor] = [*params, *self._outside]
        self._place = {id(t): i for i, t in enumerate(self.tensors)}
        self._searches = closely or bool(pool.outside)
        known = pool.strange_leaves()
        if known:
            self._searches = True
            # (Hooks on what is not reached are no matter.)
            self._add(leaf for leaf in known if not leaf._backward_hooks)
        self._is_open = closely  # while one shard is alone, what it reaches can still be added

    def _add(self, leaves: Iterable[Tensor]) -> None:
        for leaf in leaves:
            _refuse_hooks(leaf)
            place = self._place.get(id(leaf))
            if place is None:
                self._place[id(leaf)] = len(self.tensors)
                self._strange.append(leaf)
                self.tensors.append(leaf)
            elif place not in self._originals:
                self._originals.append(place)

    def targets(self, replica: Replica) -> list[Tensor]:
        """The leaves of a shard's graph, as `put_together` wants their gradients."""
        if len(self.tensors) == self._registered and not self._originals:
            return [mine for p, mine in replica.params if p.requires_grad]
        mine = {id(t): leaf for t, leaf in (*replica.params, *replica.outside)}
        originals = [self.tensors[i] for i in self._originals]
        return [*(mine.get(id(t), t) for t in self.tensors), *originals]

    def put_together(self, grads: Grads, inputs: Grads) -> tuple[Grads, Grads]:
        """One gradient for each of `tensors`, of those for `targets`."""
        count = len(self.tensors)
        if len(grads) > count:
            grads, more = grads[:count], grads[count:]
            for i, grad in zip(self._originals, more, strict=True):
                own = grads[i]
                grads[i] = own if grad is None else grad if own is None else own + grad
        return grads, inputs

    # ---- searching ----

    def look_at(self, shards: Sequence[Shard]) -> None:
        """After the shards' forward: finds what their graphs reach.

        Raises:
            RuntimeError: there is something whose gradient could not be given back.
        """
        if torch.is_grad_enabled() and shards:
            if not self._searches:
                one = shards[self._number % len(shards)]
                self._searches = bool(self._new([one], [ShardGraph(one.outputs)]))
            if self._searches:
                graphs = [ShardGraph(shard.outputs) for shard in shards]
                _refuse_shared_nodes(graphs)
                self._take(shards, graphs)
                for _ in range(2):  # the first shard that reaches something is not the only one
                    for k, (shard, graph) in enumerate(zip(shards, graphs, strict=True)):
                        self._aim(k, shard, graph)
        self._refuse_what_ranks_cannot()

    def look_at_one(self, k: int, shard: Shard, roots: Sequence[Tensor], count: int) -> None:
        """The same for one shard of so many, before its backward.

        While the first one is alone, tensors can be added.
        """
        if self._searches or k == self._number % count:
            graph = ShardGraph(roots)
            self._take([shard], [graph], self._is_open)
            self._aim(k, shard, graph)
        self._refuse_what_ranks_cannot()

    def _aim(self, k: int, shard: Shard, graph: ShardGraph) -> None:
        shard.params = self.targets(shard.replica)
        own = {*shard.replica.leaves, *map(id, shard.inputs)}
        for i, leaf in graph.leaves.items():
            if i not in own:  # made by this shard's forward, or reached by others too
                known, first = self._reached_by.get(i, (None, k))
                if known is None or known() is not leaf:
                    self._reached_by[i] = weakref.ref(leaf), k
                elif first != k:
                    shard.shares_leaves = True

    def close(self) -> None:
        """From now on shards run whose gradients are summed at once."""
        self._is_open = False

    def _new(
        self, shards: Sequence[Shard], graphs: Sequence[ShardGraph]
    ) -> tuple[list[Tensor], list[Tensor]] | None:
        """Leaves that are not among `tensors`: those that replicas have for others, and strange."""
        own: set[int] = set()
        for shard in shards:
            own.update(shard.replica.leaves, map(id, shard.inputs))
        outside = {id(leaf): t for s in shards for t, leaf in s.replica.outside}
        computed, strange = [], []
        for i, leaf in {i: leaf for graph in graphs for i, leaf in graph.leaves.items()}.items():
            if i in outside:  # (each replica has a leaf of its own for it)
                if id(outside[i]) not in self._place:
                    computed.append(outside[i])
            elif i not in own:
                strange.append(leaf)
        if strange:
            known = {*map(id, self._strange), *(id(self.tensors[i]) for i in self._originals)}
            strange = [t for t in strange if id(t) not in known]
        return (computed, strange) if computed or strange else None

    def _take(
        self, shards: Sequence[Shard], graphs: Sequence[ShardGraph], is_open: bool = True
    ) -> None:
        new = self._new(shards, graphs)
        if new is None:
            return
        computed, strange = new
        computed = [*{id(t): t for t in computed}.values()]
        self._pool.remember(strange)
        if not is_open:
            raise RuntimeError(
                f"a tensor of shape {tuple((computed + strange)[0].shape)} that is no parameter of "
                "the module was used in a shard's forward, or in the loss, for the first time, "
                "while other shards' gradients are summed without it; it is known from the next "
                "call on. Make it a parameter"
            )
        for tensor in computed:
            self._place[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)
        self._add(strange)

    def _refuse_what_ranks_cannot(self) -> None:
        more = [*self._outside, *self._strange, *(self.tensors[i] for i in self._originals)]
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
    """Part of a graph that two shards have was computed before them."""
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
