"""`spheres_of`: running spheres of several concurrencies, for tests that run on each."""

from __future__ import annotations

import pytest

import torch_spheres as ts


def spheres_of(*concurrencies, ids=None):
    """A fixture for `spheres`, which the tests of a file share and leave as they are."""

    @pytest.fixture(params=concurrencies, ids=ids, scope="module")
    def spheres(request):
        with ts.KissingSpheres(concurrency=request.param) as running:
            yield running

    return spheres
