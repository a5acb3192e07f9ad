"""Describes images on a Ray cluster: in the same batches as a LocalDescriber."""

import contextlib
import errno
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from vitgal import engines
from vitgal.features import store
from vitgal.models.inference import UNTRAINED, inference, resolve_precision
from vitgal.models.network import ViTGaL
from vitgal.settings import MachineSettings
from vitgal.stages.images import Failure, ImageTask
from vitgal.stages.local_describer import LocalDescriber, StageSettings, load_images, open_local
from vitgal.stages.shards import ShardTask


@dataclass(frozen=True, eq=False)
class RayDescriber:
    """A Ray cluster whose actors each hold a LocalDescriber.

    Attributes:
        model: the network on this machine, which only gives its dimensions.
        source: the weight file, by its absolute path, or "untrained:<architecture>".
        settings: of the global or the local stage.
        machine: of every actor, with the device and the threads that the cluster offers.
        precision: "fp32" or "bf16".
    """

    model: ViTGaL
    source: str
    settings: StageSettings
    machine: MachineSettings
    precision: str

    def describe_blocks(
        self, blocks: Sequence[Sequence[ImageTask]], bar: tqdm
    ) -> Iterator[tuple[np.ndarray, list[Failure]]]:
        """Yields the global descriptors (n, D) float32 of each block in order, and its failures."""
        pipeline = self._pipeline(self._read_block, _describe_block, None, ordered=True)
        with contextlib.closing(pipeline.run([_absolute(block) for block in blocks])) as results:
            for rows, failures in results:
                bar.update(len(rows))
                yield rows, failures

    def write_shards(self, shards: Sequence[ShardTask], bar: tqdm) -> Iterator[list[Failure]]:
        """Writes the shards in any order and yields the failures of each."""
        shards = [
            replace(shard, folder=shard.folder.absolute(), images=_absolute(shard.images))
            for shard in shards
        ]
        pipeline = self._pipeline(self._read_shard, _describe_shard, _write_shard, ordered=False)
        with contextlib.closing(pipeline.run(shards)) as results:
            for folder, count, failures, node in results:
                # Listed: a network file system may remember that one name was missing.
                if not folder.is_dir() and folder.name not in os.listdir(folder.parent):
                    raise engines.ClusterError(
                        f"the node {node} has written {folder} to a disk of its own: the run "
                        "folder must lie where every node finds it under the same path"
                    )
                bar.update(count)
                yield failures

    def recorded(self) -> dict[str, Any]:
        """Lists what a stage's manifest records of the cluster; no result depends on it."""
        machine = self.machine
        local = LocalDescriber(self.model, self.settings, machine, self.precision)
        return {
            "engine": "ray",
            "actors": _actor_plan(machine).actors,
            "device": machine.device,
            "precision": self.precision,
            "batch_size": local.batch_size,
            "workers": machine.read_threads,
            "threads": machine.threads,
        }

    def _pipeline(
        self, read: Callable, describe: Callable, write: Callable | None, ordered: bool
    ) -> engines.Pipeline:
        settings = replace(self.settings, precision=self.precision)
        return engines.Pipeline(
            read=read,
            make_describer=partial(_Actor, describe, self.source, settings, self.machine),
            write=write,
            plan=partial(_actor_plan, self.machine),
            label=_task_name,
            ordered=ordered,
        )

    @property
    def _read_block(self) -> Callable:
        return partial(_read_images, settings=self.settings, machine=self.machine)

    @property
    def _read_shard(self) -> Callable:
        return partial(_read_shard, settings=self.settings, machine=self.machine)


@contextlib.contextmanager
def open_ray(
    source: Path | str, settings: StageSettings, machine: MachineSettings
) -> Iterator[RayDescriber]:
    """Connects to the cluster and chooses device and precision by what it offers.

    The model is loaded here first: a mistake in it is found before Ray starts.
    """
    here = replace(machine, device="cpu")
    with open_local(source, replace(settings, precision="fp32"), here) as local:
        with engines.connected(machine.ray_address):
            plan = _actor_plan(machine)
            actor = replace(
                machine, device="cuda" if plan.gpus else "cpu", threads=machine.threads or 1
            )
            precision = settings.precision
            if precision == "auto":
                precision = engines.call_remotely(
                    partial(resolve_precision, "auto", actor.device), plan
                )
            name = str(source)
            if not name.startswith(UNTRAINED):
                name = str(Path(source).absolute())
            yield RayDescriber(local.model, name, settings, actor, precision)


def _actor_plan(machine: MachineSettings) -> engines.ActorPlan:
    return engines.ActorPlan.for_nodes(
        engines.node_resources(),
        threads=machine.threads,
        workers=machine.read_threads,
        device=machine.device,
    )


class _Actor:
    """A LocalDescriber for as long as its process lives, and the step that it performs."""

    def __init__(
        self,
        step: Callable[[LocalDescriber, Any], Any],
        source: str,
        settings: StageSettings,
        machine: MachineSettings,
    ):
        self._step, self._open = step, contextlib.ExitStack()
        self._describer = self._open.enter_context(open_local(source, settings, machine))

    def __call__(self, value: Any) -> Any:
        with inference(self._describer.model, self._describer.precision):
            return self._step(self._describer, value)


def _task_name(task: ShardTask | Sequence[ImageTask]) -> str:
    """Names a block or a shard by its first and last image."""
    images = task.images if isinstance(task, ShardTask) else task
    ends = " to ".join(dict.fromkeys(image.key for image in (*images[:1], *images[-1:])))
    return f"the images {ends}" if ends else "no image"


def _absolute(tasks: Iterable[ImageTask]) -> list[ImageTask]:
    return [replace(task, path=Path(task.path).absolute()) for task in tasks]


def _read_images(
    tasks: Sequence[ImageTask], settings: StageSettings, machine: MachineSettings
) -> list:
    return list(load_images(tasks, settings, machine))


def _describe_block(describer: LocalDescriber, images: list) -> tuple[np.ndarray, list[Failure]]:
    return describer.global_rows(images, len(images))


@dataclass(frozen=True, eq=False)
class _ShardState:
    """A shard on its way through the pipeline.

    images: loaded images, or items to write; None: the shard is on disk already.
    """

    shard: ShardTask
    images: list | None
    kept: dict[str, store.EncodedFeatures] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)


def _read_shard(shard: ShardTask, settings: StageSettings, machine: MachineSettings) -> _ShardState:
    # The machine that wrote it may have died before it could report that.
    if written := shard.written():
        return _ShardState(shard, None, failures=written.failures)
    images = _read_images(shard.images, settings, machine)
    return _ShardState(shard, images, shard.salvage())


def _describe_shard(describer: LocalDescriber, state: _ShardState) -> _ShardState:
    if state.images is None:
        return state
    items, failures = describer.local_items(state.images, state.shard.keys, state.kept)
    state.shard.refuse_failed_query(failures)
    return _ShardState(state.shard, items, failures=failures)


def _write_shard(state: _ShardState) -> tuple[Path, int, list[Failure], str]:
    """Writes a shard under a name of its own and moves it: a second writer may be at work.

    (A machine that was given up may still be writing.) Returns the shard's folder, the number of
    its images, the failures and this machine's name.
    """
    folder = state.shard.folder
    if state.images is not None:
        private = folder.with_name(f"{store.PARTIAL}{uuid.uuid4().hex}")
        store.write_shard(
            private / folder.name, state.images, state.shard.format, failures=state.failures
        )
        store.drop_index(folder.parent)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            os.replace(private / folder.name, folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            # The second writer was first; its shard is the same.
        shutil.rmtree(private)
    return folder, len(state.shard.images), state.failures, socket.gethostname()
