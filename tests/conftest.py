"""Refuses to run on the source folder, whose package has no built extension; shared spheres."""

import os
import signal

import effort
import fork_server
import pytest
from hypothesis import settings

# Threads of OpenMP spin for a while before they sleep. Beside the tests' other processes, which
# need the cores meanwhile, that takes twice the time. (It is read when torch is imported.)
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

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


# The same examples in every run: what fails here fails everywhere. `--long` draws others each time.
settings.register_profile("short", deadline=None, derandomize=True)
settings.register_profile("long", deadline=None, print_blob=True)


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="soak: many more rounds and examples")


def pytest_configure(config):
    is_long = config.getoption("long")
    settings.load_profile("long" if is_long else "short")
    if is_long:
        effort.take_long()


def pytest_collection_modifyitems(config, items):
    if not config.getoption("long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="needs --long"))


@pytest.fixture(scope="module")
def spheres():
    """Running spheres that the tests of a file share and leave as they are."""
    from torch_spheres import KissingSpheres

    with KissingSpheres(levels=2, concurrency=3) as running:
        yield running


@pytest.fixture
def no_comparison(monkeypatch):
    """The bare module is not called to be compared with: for tests that count calls."""
    from torch_spheres.training import forward_backward, row_check

    monkeypatch.setattr(row_check, "_compare", lambda _call, _ranges, unknown, _outputs: unknown)
    monkeypatch.setattr(forward_backward, "check_loss", lambda *_: None)


@pytest.fixture(autouse=True)
def no_process_is_left():
    """Every process that a test has started has ended with it, or is ended and the test failed."""
    yield
    left = fork_server.left_behind()
    assert not left, f"still running: {left}"
