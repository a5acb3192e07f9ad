"""Pools of processes, on this machine or on a Ray cluster."""

import contextlib
from collections.abc import Iterator

import joblib

from vitgal.engines.connection import ClusterError, connected, import_ray, last_line


@contextlib.contextmanager
def parallel(
    engine: str, address: str | None, *, workers: int | None, tasks: int
) -> Iterator[joblib.Parallel]:
    """Yields a joblib pool that returns results as they are done, in any order.

    Args:
        engine: "local" or "ray".
        address: Of the Ray cluster, as for `connected`.
        workers: Processes, at most one for each CPU of a cluster; None: one for each CPU.
        tasks: The number of tasks; the pool has no more processes than that.

    Raises:
        ClusterError: The cluster failed.
    """
    if engine == "local":
        processes = min(workers or joblib.cpu_count(), max(1, tasks))
        yield joblib.Parallel(n_jobs=processes, backend="loky", return_as="generator_unordered")
        return
    with connected(address):
        ray = import_ray()
        _register_backend()
        cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
        processes = min(workers or cpus, cpus, max(1, tasks))
        # A pool's processes reserve no CPUs: without SPREAD Ray would start all on one node.
        options = {"scheduling_strategy": "SPREAD"}
        try:
            with joblib.parallel_config(backend="ray", ray_remote_args=options):
                yield joblib.Parallel(n_jobs=processes, return_as="generator_unordered")
        except ray.exceptions.RayError as error:
            raise ClusterError(
                f"the Ray cluster failed: {last_line(error)}; finished work is kept, run the same "
                "command again to continue"
            ) from None


def _register_backend() -> None:
    """Registers Ray's backend with joblib; that of `ray.util.joblib` returns no generators."""
    from ray.util.joblib.ray_backend import RayBackend

    class UnorderedRayBackend(RayBackend):
        supports_return_generator = True

    joblib.register_parallel_backend("ray", UnorderedRayBackend)
