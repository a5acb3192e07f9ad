"""Describes images on a Ray cluster, in the same batches as on one machine."""

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

from vitgal import engines, runs
from vitgal.features import store
from vitgal.features.codes import Codes
from vitgal.models.inference import resolve_precision
from vitgal.settings import MachineSettings
from vitgal.stages.images import Failure, ImageTask, ShardTask
from vitgal.stages.local_describer import LocalDescriber, StageSettings, load_images, open_local


@dataclass(frozen=True, eq=False)
class RayDescriber(LocalDescriber):
    """A LocalDescriber that delegates its work to the actors of a Ray cluster.

    Of its network only the dimensions are used. source: as for `open_model`, its file by its
    absolute path.
    """

    source: str = ""
    codes: Codes | None = None

    def describe_blocks(
        self, blocks: Sequence[Sequence[ImageTask]], bar: tqdm
    ) -> Iterator[tuple[np.ndarray, list[Failure]]]:
        """Yields global descriptors (B, D) and failures of each block, as LocalDescriber does."""
        blocks = [_absolute(block) for block in blocks]
        with contextlib.closing(self._run(blocks, _read_images, _describe_block)) as results:
            for rows, failures in results:
                bar.update(len(rows))
                yield rows, failures

    def write_shards(self, shards: Sequence[ShardTask], bar: tqdm) -> Iterator[list[Failure]]:
        """Writes the shards, in any order, and yields the failures of each."""
        shards = [
            replace(shard, folder=shard.folder.absolute(), images=_absolute(shard.images))
            for shard in shards
        ]
        results = self._run(shards, _read_shard, _describe_shard, _write_shard)
        with contextlib.closing(results):
            for folder, count, failures, node in results:
                # Listed, because a network file system may cache that one name is missing.
                if not folder.is_dir() and folder.name not in os.listdir(folder.parent):
                    raise engines.ClusterError(
                        f"the node {node} has written {folder} to a disk of its own: the run "
                        "folder must lie where every node finds it under the same path"
                    )
                bar.update(count)
                yield failures

    def recorded(self) -> dict[str, Any]:
        """Returns the cluster's entries for a stage's manifest; no result depends on them."""
        return super().recorded() | {
            "engine": "ray",
            "actors": _actor_plan(self.machine).actors,
            "device": self.machine.device,
            "threads": self.machine.threads,
        }

    def _run(
        self, work: Sequence[Any], read: Callable, describe: Callable, write: Callable | None = None
    ) -> Iterator[Any]:
        settings, machine = self.settings, self.machine
        return engines.Pipeline(
            read=partial(read, settings=settings, machine=machine, multiple=self.multiple),
            make_describer=partial(_Actor, describe, self.source, settings, machine, self.codes),
            write=write,
            plan=partial(_actor_plan, machine),
            label=_label,
            ordered=write is None,
        ).run(work)


@contextlib.contextmanager
def open_describer(
    source: Path | str,
    settings: StageSettings,
    machine: MachineSettings,
    codes: Codes | None = None,
) -> Iterator[LocalDescriber]:
    """Opens a model on this machine or on a Ray cluster, by the setting `engine`.

    source, codes: as for `open_local`.
    """
    if machine.engine == "local":
        with open_local(source, settings, machine, codes) as local:
            yield local
        return
    # The model is loaded here first: a bad weight file is reported before Ray starts.
    on_cpu = replace(machine, device="cpu")
    with open_local(source, replace(settings, precision="fp32"), on_cpu, codes) as local:
        with engines.connected(machine.ray_address):
            plan = _actor_plan(machine)
            device = "cuda" if plan.gpus else "cpu"
            precision = local.precision if local.extractor else settings.precision
            if precision == "auto":
                precision = engines.call_remotely(partial(resolve_precision, "auto", device), plan)
            settings = replace(settings, precision=precision)
            machine = replace(machine, device=device, threads=machine.threads or 1)
            path = runs.resolve_source(source, Path.cwd())
            yield RayDescriber(
                local.model,
                settings,
                machine,
                precision,
                extractor=local.extractor,
                source=str(path),
                codes=codes,
            )


def _actor_plan(machine: MachineSettings) -> engines.ActorPlan:
    return engines.ActorPlan.for_nodes(
        engines.node_resources(),
        threads=machine.threads,
        workers=machine.read_threads,
        device=machine.device,
    )


class _Actor:
    """The LocalDescriber of one process, and the step that it performs."""

    def __init__(
        self,
        step: Callable[[LocalDescriber, Any], Any],
        source: str,
        settings: StageSettings,
        machine: MachineSettings,
        codes: Codes | None,
    ):
        self._step, self._open = step, contextlib.ExitStack()
        self._describer = self._open.enter_context(open_local(source, settings, machine, codes))

    def __call__(self, value: Any) -> Any:
        with self._describer.running():
            return self._step(self._describer, value)


def _label(work: ShardTask | Sequence[ImageTask]) -> str:
    images = work.images if isinstance(work, ShardTask) else work
    ends = " to ".join(dict.fromkeys(image.key for image in (*images[:1], *images[-1:])))
    return f"the images {ends}" if ends else "no image"


def _absolute(tasks: Iterable[ImageTask]) -> list[ImageTask]:
    return [replace(task, path=Path(task.path).absolute()) for task in tasks]


def _read_images(
    tasks: Sequence[ImageTask],
    settings: StageSettings,
    machine: MachineSettings,
    multiple: int | None,
) -> list:
    return list(load_images(tasks, settings, machine, multiple))


def _describe_block(describer: LocalDescriber, images: list) -> tuple[np.ndarray, list[Failure]]:
    return describer.global_rows(images, len(images))


@dataclass(frozen=True, eq=False)
class _ShardState:
    """A shard on its way through the pipeline."""

    shard: ShardTask
    images: list | None  # loaded, later the items to write; None: the shard is on disk already
    failures: list[Failure] = field(default_factory=list)


def _read_shard(
    shard: ShardTask, settings: StageSettings, machine: MachineSettings, multiple: int | None
) -> _ShardState:
    # A machine that died may have written it without a report.
    if written := shard.written():
        return _ShardState(shard, None, failures=written.failures)
    return _ShardState(shard, _read_images(shard.images, settings, machine, multiple))


def _describe_shard(describer: LocalDescriber, state: _ShardState) -> _ShardState:
    if state.images is None:
        return state
    items, failures = describer.local_items(state.images, state.shard.keys)
    state.shard.refuse_failed_query(failures)
    return _ShardState(state.shard, items, failures=failures)


def _write_shard(state: _ShardState) -> tuple[Path, int, list[Failure], str]:
    """Writes a shard under another name and moves it: a lost machine may still be writing it."""
    shard = state.shard
    if state.images is not None:
        private = shard.folder.with_name(f"{store.PARTIAL}{uuid.uuid4().hex}")
        moved = private / shard.folder.name
        store.write_shard(moved, state.images, shard.format, failures=state.failures)
        store.drop_index(shard.folder.parent)
        shutil.rmtree(shard.folder, ignore_errors=True)
        try:
            os.replace(moved, shard.folder)
        except OSError as error:  # the other writer was first; its shard is the same
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        shutil.rmtree(private)
    return shard.folder, len(shard.images), state.failures, socket.gethostname()
