"""Refuses to run on the source folder, whose package has no built extension; shared spheres."""

import signal

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background, by a shell that keeps Ctrl-C away from it: the processes that tests
    # start would inherit that, and it is what many of them are about.
    signal.signal(signal.SIGINT, signal.default_int_handler)

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


@pytest.fixture(scope="module")
def spheres():
    """Running spheres that the tests of a file share and leave as they are."""
    from torch_spheres import KissingSpheres

    with KissingSpheres(levels=2, concurrency=3) as running:
        yield running
