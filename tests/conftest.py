"""Refuses to run on the source folder, whose package has no built extension."""

import pytest

try:
    import torch_spheres._core  # noqa: F401
except ModuleNotFoundError as error:
    if error.name == "torch_spheres._core":
        pytest.exit(
            "torch_spheres was imported from the source folder, which has no compiled extension: "
            "run `pytest` rather than `python -m pytest`, after `pip install .`",
            returncode=2,
        )
    raise
