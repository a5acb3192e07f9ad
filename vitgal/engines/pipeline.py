"""Pipelines of three steps on a Ray cluster, restarted after a loss of processes or machines.

A work item holds images that the local engine describes together, so both form equal batches.
"""

import contextlib
import functools
import io
import logging
import pickle
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vitgal.engines.connection import ClusterError, import_ray, last_line
from vitgal.runs import UserError

# Most failures of a pipeline in a row. A lost machine causes one; an image that crashes its reader
# would cause one after every restart.
RETRIES = 5
TASK_RETRIES = 1  # of a task within a pipeline that goes on
IN_FLIGHT = 2  # work items of an actor: the next is transferred while the first is described


@dataclass(frozen=True)
class ActorPlan:
    """How many actors and tasks run at once, and the CPUs and GPUs (0 or 1) of each actor."""

    actors: int
    cpus: int
    gpus: int
    tasks: int

    @classmethod
    def for_nodes(
        cls,
        nodes: Sequence[Mapping[str, float]],
        *,
        threads: int | None,
        workers: int,
        device: str | None = None,
    ) -> "ActorPlan":
        """Plans one actor for each GPU; without GPUs, one for each `threads` CPUs of a node.

        Args:
            nodes: The resources of each machine, as `node_resources` returns them.
            threads: Of each actor without a GPU; None: 1.
            workers: Threads of a task that reads images.
            device: "cuda" requires GPUs, "cpu" ignores them, None takes them where there are any.

        Raises:
            ClusterError: The cluster has no such device.
        """
        cpus = [int(node.get("CPU", 0)) for node in nodes]
        gpus = 0 if device == "cpu" else int(sum(node.get("GPU", 0) for node in nodes))
        if not (gpus if device == "cuda" else gpus or any(cpus)):
            missing = "GPUs" if device == "cuda" else "GPUs or CPUs"
            raise ClusterError(f"the Ray cluster has no {missing}")
        cpus_per_actor = 1 if gpus else min(threads or 1, max(cpus))
        actors = gpus or sum(count // cpus_per_actor for count in cpus)
        return cls(actors, cpus_per_actor, min(gpus, 1), max(1, sum(cpus) // max(1, workers)))


def node_resources() -> list[dict[str, float]]:
    """Returns the resources of each machine of the cluster, by name ("CPU", "GPU", ...)."""
    return [node["Resources"] for node in import_ray().nodes() if node["Alive"]]


def call_remotely(function: Callable[[], Any], plan: ActorPlan) -> Any:
    """Calls a function on a machine with free resources for an actor of the plan."""
    task = import_ray().remote(num_cpus=plan.cpus, num_gpus=plan.gpus)(function)
    return import_ray().get(task.remote())


@dataclass(frozen=True, eq=False)
class WorkItem:
    """A value in a pipeline, with the output of its steps.

    A step's error is stored as a value; Ray would wrap a raised one in its own.
    """

    number: int
    value: Any
    error: Exception | None = None
    printed: str = ""

    def apply(self, step: Callable[[Any], Any]) -> "WorkItem":
        """Returns the item after a step; an item with an error is returned unchanged."""
        if self.error is not None:
            return self
        printed, value, error = io.StringIO(), None, None
        try:
            with contextlib.redirect_stdout(printed):
                value = step(self.value)
        except Exception as raised:
            error = _sendable(raised)
        return WorkItem(self.number, value, error, self.printed + printed.getvalue())


@dataclass(frozen=True, eq=False)
class Pipeline:
    """Steps that read, describe and write work items; items and results must be picklable.

    Attributes:
        read: Runs as tasks on any machine. Like `write` it reserves no CPU, or it could wait for
            CPUs that are held by the actors that wait for it.
        make_describer: Called once in each actor; returns the step that takes the result of `read`.
        write: Runs as tasks; None: the describer's results are yielded.
        plan: Called before every start, since a cluster changes.
        label: Returns the name of an item for error messages.
        ordered: Whether results come in the order of the items, not as they are done.
    """

    read: Callable[[Any], Any]
    make_describer: Callable[[], Callable[[Any], Any]]
    write: Callable[[Any], Any] | None
    plan: Callable[[], ActorPlan]
    label: Callable[[Any], str] = str
    ordered: bool = False

    def run(self, values: Sequence[Any]) -> Iterator[Any]:
        """Yields the result of each value, and prints the output of its steps.

        After the loss of a process or machine the pipeline restarts with the remaining items.

        Raises:
            ClusterError: Ray broke more than RETRIES times in a row.
            Exception: The first error of a step, as the step raised it.
        """
        remaining, failures, finished = dict(enumerate(values)), 0, 0
        while remaining:
            plan = self.plan()
            try:
                with contextlib.closing(self._results(remaining, plan)) as results:
                    for number, value in results:
                        del remaining[number]
                        finished += 1
                        yield value
            except import_ray().exceptions.RayError as error:
                # With more results than were in flight, another item caused this failure.
                failures = 1 if finished > 4 * IN_FLIGHT * plan.actors else failures + 1
                finished = 0
                if failures > RETRIES:
                    first = self.label(remaining[min(remaining)])  # items start in order
                    raise ClusterError(
                        f"the Ray cluster broke {failures} times in a row, at {first} or soon "
                        f"after: {last_line(error)}; finished work is kept, run the same command "
                        "again to continue"
                    ) from None
                print(f"a Ray process or machine was lost ({type(error).__name__}): continuing")

    def _results(self, values: dict[int, Any], plan: ActorPlan) -> Iterator[tuple[int, Any]]:
        flow = self._flow([WorkItem(number, value) for number, value in values.items()], plan)
        for batch in flow.iter_batches(batch_size=None, prefetch_batches=0):
            for item in batch["item"]:
                print(item.printed, end="")
                if item.error is not None:
                    raise item.error
                yield item.number, item.value

    def _flow(self, items: list[WorkItem], plan: ActorPlan) -> Any:
        """Returns the Ray data set of the results, one row for each item; nothing runs yet."""
        data = import_ray().data
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        context = data.DataContext.get_current().copy()
        context.enable_progress_bars = False
        context.enable_fallback_to_arrow_object_ext_type = True
        context.execution_options.preserve_order = self.ordered
        with warnings.catch_warnings(), data.DataContext.current(context):
            # Ray deprecates retries as options of `map` and has no other place before 2.64.
            warnings.simplefilter("ignore", DeprecationWarning)
            rows = [{"item": item} for item in items]
            flow = data.from_items(rows, override_num_blocks=len(rows))
            tasks = min(plan.tasks, len(items))  # Ray warns of more tasks than items
            flow = _map_tasks(flow, self.read, tasks)
            flow = flow.map(
                _Actor,
                fn_constructor_args=(self.make_describer,),
                compute=data.ActorPoolStrategy(
                    size=min(plan.actors, len(items)), max_tasks_in_flight_per_actor=IN_FLIGHT
                ),
                num_cpus=plan.cpus,
                num_gpus=plan.gpus,
                # A lost actor's items would wait for its restart, forever if no machine has room
                # for it.
                max_restarts=0,
            )
            return flow if self.write is None else _map_tasks(flow, self.write, tasks)


def _map_tasks(flow: Any, step: Callable[[Any], Any], tasks: int) -> Any:
    return flow.map(
        lambda row: {"item": row["item"].apply(step)},
        compute=import_ray().data.TaskPoolStrategy(size=tasks),
        num_cpus=0,
        max_retries=TASK_RETRIES,
    )


class _Actor:
    """A process that makes its step at the first row, so that an item can store an error."""

    def __init__(self, make_step: Callable[[], Callable[[Any], Any]]):
        self._make_step = functools.cache(make_step)

    def __call__(self, row: dict) -> dict:
        return {"item": row["item"].apply(lambda value: self._make_step()(value))}


def _sendable(error: Exception) -> Exception:
    """Returns an error that can be pickled, with a note about the node that raised it."""
    trace = "".join(traceback.format_exception(error))
    try:
        error = pickle.loads(pickle.dumps(error))
    except Exception:  # an error's class may raise anything when it is copied
        error = RuntimeError(f"{type(error).__name__}: {error}")
    node = import_ray().util.get_node_ip_address()
    if isinstance(error, FileNotFoundError):
        error.add_note(
            f"(on the node {node}: every node must find images, weights and the run folder under "
            "the same path)"
        )
    elif not isinstance(error, UserError):
        error.add_note(f"(on the node {node})\n{trace}")
    return error
