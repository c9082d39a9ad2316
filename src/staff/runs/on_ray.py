"""Workers as Ray's actors: Ray places and starts them, on its own machines; what they do is worker.py's.

They take shards through the run's folder as others do, which must lie on a file system that all machines
see. So one way of telling faults holds for every engine, and a shard costs no message of Ray's.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from staff.runs.crew import ANEW

logger = logging.getLogger(__name__)

STARTS = 3  # tries


def start_actor(address: str | None, path: Path, name: str, rank: int, count: int, threads: int) -> Actor:
    """Start a worker; a cluster is joined, or started on this machine alone, at the first.

    Raises:
        ValueError: Ray is not installed, or there is no such cluster.
    """
    if address is None:  # Ray on this machine alone: it is to listen where no other can reach it
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # and to tell nobody
        os.environ.setdefault("RAY_worker_niceness", "0")  # its 15 waits for a core beside anything else
    try:
        import ray
    except ImportError:
        raise ValueError("--engine ray needs Ray: pip install 'staff-coreset[ray]'") from None
    if not ray.is_initialized():
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
        if address is None:  # nothing of it can be reached from elsewhere
            here = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
            start_here(ray.init, **quiet, **here, num_cpus=count * threads)
        else:
            try:
                ray.init(address, **quiet)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise ValueError(f"--ray-address {address}: {error}") from error
    return Actor(str(path.resolve()), name, rank, count, threads)


def start_here(init: Callable[..., object], **how: Any) -> None:
    """Have Ray start on this machine, again where it is too slow: its raylet ends if its agents, two Python
    processes, are not there within 15 seconds, whatever it is told.

    Raises:
        ValueError: it was too slow in every try.
    """
    for left in reversed(range(STARTS)):
        try:
            init(**how)
            return
        except Exception as error:  # Ray has no other word for it
            if not left:
                cure = "free some of its cores, or take --engine local"
                raise ValueError(f"Ray did not start in {STARTS} tries: {error} {cure}") from error
            logger.warning("Ray did not start on this machine; it is tried again: %s", error)


class Actor:
    """A worker that Ray runs; see `crew.Process`."""

    def __init__(self, path: str, name: str, rank: int, count: int, threads: int):
        import ray

        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        environment = {"RANK": str(rank), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": str(threads)}
        remote: Any = ray.remote(num_cpus=threads, num_gpus=gpus, max_restarts=0)(_Works)
        self._actor: Any = remote.options(runtime_env={"env_vars": environment}).remote()
        self._ends = self._actor.work.remote(path, name)

    def poll(self) -> int | None:
        """How it ended, None while it lives or waits for a place."""
        import ray

        if not ray.wait([self._ends], timeout=0)[0]:
            return None
        try:
            return ray.get(self._ends)
        except ray.exceptions.RayError:  # the actor's process is gone
            return -signal.SIGKILL

    def kill(self) -> None:
        import ray

        ray.kill(self._actor, no_restart=True)


class _Works:
    """What Ray makes an actor of."""

    def work(self, path: str, name: str) -> int:
        from staff.runs import pieces, worker

        try:
            worker.work(Path(path), pieces.OPENERS, name)
            return 0
        except SystemExit:
            return ANEW
        except ValueError:
            return 2  # its sign says why
