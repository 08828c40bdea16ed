"""Fixtures of the tests that submit jobs, each on the `cluster` of its module."""

from collections.abc import Iterator

import pytest

from slurm.cluster import Cluster


@pytest.fixture
def quiet_cluster(cluster: Cluster) -> Iterator[None]:
    """Leave no job and no dead node for the next test."""
    yield
    cluster.tidy()


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> str:
    """Return the weights' SHA-256 of an undisturbed run on one node."""
    return cluster.finish(cluster.submit("undisturbed"), "undisturbed")["weights_sha256"]
