"""`Delegating`: the base of `SphereParallel`, a wrapper that has its inner module's names."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from torch_spheres import _compat

__all__ = ["Delegating"]


class Delegating(nn.Module):
    """A wrapper that delegates everything to the inner module except calls and their hooks.

    The wrapper shares the inner module's registries (parameters, buffers, modules, state-dict
    hooks) and calls torch's methods on the inner module, which may have overridden them. So names
    are the inner module's, and ``modules()`` lists the inner module in place of the wrapper.
    """

    module: nn.Module
    """The inner module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        own = vars(self)
        own["module"] = module
        del own["training"]
        self._share()

    def _share(self) -> None:
        inner = vars(self.module)
        vars(self).update({name: inner[name] for name in _compat.SHARED_REGISTRIES})

    def __getattr__(self, name: str) -> Any:
        module = self.__dict__.get("module")
        if module is None:  # while it is being unpickled
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "module":
            raise AttributeError(
                f"the module of a {type(self).__name__} cannot be replaced; make another one"
            )
        if name == "__class__":  # torch's parametrizations do that
            raise TypeError(
                f"the class of a {type(self).__name__} cannot be changed (to {value.__name__}); "
                "give its .module to what does that, such as register_parametrization"
            )
        if self._has_own(name):
            object.__setattr__(self, name, value)
        else:
            setattr(self.module, name, value)

    def __delattr__(self, name: str) -> None:
        if self._has_own(name):
            object.__delattr__(self, name)
        else:
            delattr(self.module, name)

    def _has_own(self, name: str) -> bool:
        return name in vars(self) or (hasattr(type(self), name) and name not in _DELEGATED)

    # Containers such as nn.Sequential have these, which Python looks up on the class.

    def __len__(self) -> int:
        return len(self.module)  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        return bool(self.module)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.module)  # type: ignore[call-overload, no-any-return]

    def __getitem__(self, key: Any) -> Any:
        return self.module[key]  # type: ignore[index]

    def __contains__(self, value: Any) -> bool:
        return value in self.module  # type: ignore[operator]

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *dir(self.module)})

    def __repr__(self) -> str:
        inner = repr(self.module).replace("\n", "\n  ")
        return f"{type(self).__name__}(\n  (module): {inner}\n)"

    def __getstate__(self) -> dict[str, Any]:
        left_out = (*_compat.SHARED_REGISTRIES, *_compat.COMPILED)
        return {k: v for k, v in vars(self).items() if k not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._share()


# Methods that torch calls on the parts of a larger module, beside the public ones.
_PRIVATE = ("_apply", "_load_from_state_dict")
_ABOUT_CALLS = ("forward", "compile", "register_forward_pre_hook", "register_forward_hook",
                "register_backward_hook", "register_full_backward_hook",
                "register_full_backward_pre_hook")  # fmt: skip
_DELEGATED = {
    name
    for name, method in vars(nn.Module).items()
    if callable(method)
    and name not in _ABOUT_CALLS
    and (name in _PRIVATE or not name.startswith("_"))
}


def _delegated(method: Callable[..., Any]) -> Callable[..., Any]:
    name = method.__name__

    @functools.wraps(method)
    def call(self: Delegating, *args: Any, **kwargs: Any) -> Any:
        result = getattr(self.module, name)(*args, **kwargs)
        return self if result is self.module else result  # `model.to(...)` is the model

    return call


for _name in _DELEGATED:
    setattr(Delegating, _name, _delegated(getattr(nn.Module, _name)))
