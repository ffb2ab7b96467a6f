"""The package's own exceptions."""

from torch_spheres._core import StoppedError

__all__ = ["StoppedError"]
