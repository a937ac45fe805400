"""Who does the same work on many items: this process, or actors of Ray on many cores, GPUs or machines.

`Work` says once what is to be set up (a model with its sessions) and gives a function of one item. Results come back in
the order of the items, whoever computes them, a few at a time: nothing is held but what is under way.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

from onnxcam.engines.session import Settings
from onnxcam.errors import ModelError, OnnxcamError, UsageError

Item = TypeVar("Item")
Result = TypeVar("Result")
_Item = TypeVar("_Item", contravariant=True)
_Result = TypeVar("_Result", covariant=True)

POOLS = ("local", "ray")


class Work(Protocol[_Item, _Result]):
    """Something to be done with each of many items; it is sent to every actor and so must be picklable."""

    def begin(self) -> Callable[[_Item], _Result]:
        """Set up what all items share, and return what does one."""
        ...


class Pool:
    """Does the work in this process, one item after another."""

    name = "local"

    def run(self, work: Work[Item, Result], items: Iterable[Item]) -> Iterator[Result]:
        """The result for each item, in order.

        Raises:
            UsageError, ModelError: as the work does.
        """
        do = work.begin()
        for item in items:
            yield do(item)


class RayPool(Pool):
    """Does the work on Ray Data, by actors that each begin once.

    Attributes:
        workers: actors; by default as many as Ray has GPUs, with `gpu`, or else cores.
        gpu: each actor has a GPU to itself, where Ray has any.
    """

    name = "ray"

    def __init__(self, workers: int | None = None, gpu: bool = False):
        """Raises UsageError where Ray is not installed."""
        try:
            import ray.data  # noqa: F401
        except ImportError:
            raise UsageError("--engine-pool ray needs Ray: pip install 'onnxcam[ray]'") from None
        self.workers, self.gpu = workers, gpu

    def run(self, work: Work[Item, Result], items: Iterable[Item]) -> Iterator[Result]:
        import ray

        listed = [pickle.dumps(item) for item in items]
        if not listed:
            return
        _start_ray()
        has = ray.cluster_resources()
        gpus, cores = int(has.get("GPU", 0)) if self.gpu else 0, int(has.get("CPU", 1))
        count = min(self.workers or gpus or cores, len(listed))
        share = min(1.0, 0.9 * cores / count)  # of a core for each: reading the list of items wants one, too
        data = ray.data.from_items([{"item": item} for item in listed], override_num_blocks=min(len(listed), 4 * count))
        done = data.map_batches(
            _Actor,
            fn_constructor_args=([ray.put(work)],),  # in a list, so that it is fetched by the actor itself
            batch_size=1,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=count),
            num_cpus=share,
            num_gpus=min(1.0, gpus / count),
        )
        for row in done.iter_rows():
            yield _taken(row["result"])


class _Actor(Generic[Item, Result]):
    """One worker: it begins when it is made, and hands back results, or errors that say what is wrong, as bytes."""

    def __init__(self, work: Sequence[Any]):
        import ray

        self.do: Callable[[Any], Any] | None = None
        self.error: OnnxcamError | None = None
        try:
            self.do = ray.get(work[0]).begin()
        except (UsageError, ModelError) as error:
            self.error = error

    def __call__(self, batch: dict[str, Sequence[bytes]]) -> dict[str, list[bytes]]:
        return {"result": [pickle.dumps(self._one(pickle.loads(item))) for item in batch["item"]]}

    def _one(self, item: Any) -> Any:
        if self.do is None:
            return self.error
        try:
            return self.do(item)
        except (UsageError, ModelError) as error:
            return error


def _taken(result: bytes) -> Any:
    found = pickle.loads(result)
    if isinstance(found, OnnxcamError):
        raise found
    return found


def _start_ray() -> None:
    """Connect to the Ray that is there (RAY_ADDRESS, or one that was begun in this process), or start one here."""
    import ray

    if not ray.is_initialized():
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns of what it will do one day
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere unless that is asked for
        here: dict[str, Any] = {} if os.environ.get("RAY_ADDRESS") else {"_node_ip_address": "127.0.0.1"}
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, **here)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def pool(name: str | Pool | None = None, workers: int | None = None, gpu: bool = False) -> Pool:
    """The pool of that name.

    Raises:
        UsageError: there is none, or Ray is not installed.
    """
    if isinstance(name, Pool):
        return name
    if name in (None, "local"):
        if workers is not None:
            raise UsageError("workers are of --engine-pool ray: leave them out, or name it")
        return Pool()
    if name != "ray":
        raise UsageError(f"no pool is called {name!r}: there are {', '.join(POOLS)}")
    return RayPool(workers, gpu)


def shared_out(
    name: str | Pool | None, workers: int | None, providers: Any, threads: int | None
) -> tuple[Pool, int | None]:
    """The pool, with actors on GPUs where the providers are, and the threads of each worker: an actor has one unless
    more are asked for.

    Raises:
        UsageError: as `pool`; there is no such provider.
    """
    who = pool(name, workers, Settings.of(providers).on_gpu)
    return who, 1 if who.name == "ray" and threads is None else threads
