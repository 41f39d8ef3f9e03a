"""One Ray for the modules that need it, which run one after the other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.ray_cluster import local_ray


@pytest.fixture(scope="package")
def cluster() -> Iterator[None]:
    with local_ray():
        yield
