"""One thread of BLAS: pytest-xdist runs a worker on each core, and small matrices gain nothing from more."""

import pytest
from threadpoolctl import threadpool_limits


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    with threadpool_limits(1):
        yield
