"""What a running shard has of its own: everything of the module but the weights."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Buffer", "Replica", "caller_context"]


class Replica:
    """A copy of the module whose parameters are leaves of their own on the same storage."""

    def __init__(self, module: nn.Module) -> None:
        memo: dict[int, Any] = {
            id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad)
            for p in module.parameters()
        }
        self.module = copy.deepcopy(module, memo)
        self.params = list(zip(module.parameters(), self.module.parameters(), strict=True))
        self.modules = list(zip(module.modules(), self.module.modules(), strict=True))

    def follow(self, module: nn.Module) -> None:
        """Takes over what may have changed since the last step; rebuilds if that is not enough."""
        current = list(module.parameters())
        same = len(current) == len(self.params) and all(
            p is mine[0] and p.data_ptr() == mine[1].data_ptr() and p.dtype == mine[1].dtype
            for p, mine in zip(current, self.params, strict=True)
        )
        if not same:
            self.__init__(module)  # type: ignore[misc]
            return
        for original, mine in self.params:
            mine.requires_grad_(original.requires_grad)
        for source, copied in self.modules:
            copied.training = source.training

    def take_buffers(self) -> list[Buffer]:
        """Gives the copy buffers of its own with the values of the original's."""
        taken = []
        for source, copied in self.modules:
            for name, value in source._buffers.items():
                if value is None:
                    copied._buffers[name] = None
                    continue
                # A new tensor for every shard: the last one's may be saved in a graph.
                copied._buffers[name] = value.detach().clone()
                taken.append(Buffer(source, copied, name, value.detach()))
        return taken


@dataclass
class Buffer:
    """One shard's own tensor for one of the module's buffers."""

    source: nn.Module
    copied: nn.Module
    name: str
    given: Tensor  # the original's own, which nobody writes while shards run

    def changed_value(self) -> Tensor | None:
        """What the shard left in it, or None if it left it alone."""
        # By value: batch_norm writes its statistics without raising the tensor's version.
        now = self.copied._buffers[self.name]
        return None if now is None or torch.equal(now, self.given) else now.detach()


def caller_context() -> Any:
    """What the calling thread has set, to be set on the spheres: grad mode and autocast."""
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    autocast = {
        device: torch.get_autocast_dtype(device)
        for device in ("cpu", "cuda")
        if torch.is_autocast_enabled(device)
    }

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(inference))
            stack.enter_context(torch.set_grad_enabled(grad))
            for device, dtype in autocast.items():
                # The cache of cast weights is one per process: threads would clear each other's.
                stack.enter_context(torch.autocast(device, dtype, cache_enabled=False))
            yield

    return context
