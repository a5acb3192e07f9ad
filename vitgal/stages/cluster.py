"""The stages that describe images, on a Ray cluster."""

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
from vitgal.data.revisited import RetrievalDataset
from vitgal.features import store
from vitgal.models.inference import UNTRAINED, inference, resolve_precision
from vitgal.models.network import ViTGaL
from vitgal.stages.images import (
    BLOCK,
    Job,
    Runner,
    _refuse_failed_query,
    _refuse_failures,
    _runner,
    load,
    prefetch,
)
from vitgal.stages.shards import Piece


@contextlib.contextmanager
def _engine(
    engine: str, address: str | None, model: Path | str, how: dict
) -> Iterator["Runner | OnCluster"]:
    """What a stage's images are described with: here, or on a Ray cluster."""
    if engine == "local":
        with _runner(model, **how) as runner:
            yield runner
        return
    # Here the model tells its widths and nothing else; a mistake in it is found before Ray starts.
    with _runner(model, **(how | {"device": "cpu", "precision": "fp32"})) as here:
        with engines.connected(address):
            yield OnCluster.of(here.model, model, how)


@dataclass(frozen=True, eq=False)
class OnCluster:
    """How images are described on a Ray cluster: as by a `Runner`, in the same batches.

    model: on this machine, for its widths. source, how: what every actor makes its own Runner of.
    """

    model: ViTGaL
    source: str
    how: dict

    @classmethod
    def of(cls, model: ViTGaL, source: Path | str, how: dict) -> "OnCluster":
        """Chooses device and precision by what the cluster has."""
        name = str(source) if str(source).startswith(UNTRAINED) else str(Path(source).absolute())
        share = _share(how)
        how = how | {"device": "cuda" if share.gpus else "cpu", "threads": how["threads"] or 1}
        if how["precision"] == "auto":
            question = partial(resolve_precision, "auto", how["device"])
            how["precision"] = engines.call_remotely(question, share)
        return cls(model, name, how)

    @property
    def precision(self) -> str:
        return resolve_precision(self.how["precision"])

    def run(self, pieces: Sequence, read: Callable, describe: Callable, **more: Any) -> Iterator:
        """Results of a pipeline; `describe` is given the Runner of its actor first."""
        make = partial(_Describer, describe, self.source, self.how)
        steps = dict(read=read, make_describer=make, plan=partial(_share, self.how))
        steps |= dict(write=None, label=_named)
        return engines.Pipeline(**(steps | more)).run(pieces)

    @property
    def reading(self) -> dict[str, Any]:
        """The options of `_read`."""
        return {name: self.how[name] for name in ("size", "resize", "workers")}

    def recorded(self) -> dict[str, Any]:
        """What a stage's manifest keeps of it."""
        names = ("device", "precision", "batch_size", "workers", "threads")
        kept = {name: self.how[name] for name in names}
        return {"engine": "ray", "actors": _share(self.how).actors} | kept


def _share(how: dict) -> engines.ActorPlan:
    about = dict(threads=how["threads"], workers=how["workers"], device=how["device"])
    return engines.ActorPlan.for_nodes(engines.node_resources(), **about)


class _Describer:
    """In an actor: a Runner for as long as the process lives, and what it does with each piece."""

    def __init__(self, describe: Callable[[Runner, Any], Any], source: str, how: dict):
        self._describe, self._open = describe, contextlib.ExitStack()
        self._runner = self._open.enter_context(_runner(source, **how))

    def __call__(self, value: Any) -> Any:
        with inference(self._runner.model, self._runner.precision):
            return self._describe(self._runner, value)


def _read(jobs: Sequence[Job], *, size: int, resize: str, workers: int) -> list:
    """Every job with its network input or its ImageError, as a list that can be sent."""
    return list(prefetch(partial(load, size=size, resize=resize), jobs, workers=workers))


def _named(piece: "Piece | Sequence[Job]") -> str:
    jobs = piece.jobs if isinstance(piece, Piece) else piece
    ends = " to ".join(dict.fromkeys(job.key for job in (*jobs[:1], *jobs[-1:])))
    return f"the images {ends}" if ends else "no image"


def _absolute(jobs: Iterable[Job]) -> list[Job]:
    return [replace(job, path=Path(job.path).absolute()) for job in jobs]


def _cluster_rows(
    remote: OnCluster,
    queries: Sequence[Job],
    data: RetrievalDataset,
    path: Path,
    scales: Sequence[float],
    *,
    share: float,
    disable: bool,
) -> tuple[np.ndarray, store.RowFile]:
    """The queries' descriptors, and the database's in `path`, from where they stand on disk."""
    number = len(data.database)
    settings = {"precision": remote.precision}
    rows = store.RowFile.open(path, (number, remote.model.embed_dim), settings=settings)
    todo = zip(data.database[rows.rows :], data.database_paths[rows.rows :], strict=True)
    jobs = _absolute(Job(name, image) for name, image in todo)
    blocks = [jobs[first : first + BLOCK] for first in range(0, len(jobs), BLOCK)]
    steps = dict(read=partial(_read, **remote.reading), ordered=True)
    steps |= dict(describe=partial(_describe_block, scales=tuple(scales)))
    found = remote.run([_absolute(queries), *blocks], **steps)
    bar = dict(total=number, initial=rows.rows, desc="describing", unit="image", disable=disable)
    with contextlib.closing(found), tqdm(**bar) as shown:
        described, failures = next(found)
        _refuse_failed_query(failures)
        for block, failures in found:
            rows.append(block, failures)
            shown.update(len(block))
            _refuse_failures(rows.failures, number, share)
    rows.finish()
    return described, rows


def _describe_block(
    runner: Runner, results: list, *, scales: Sequence[float]
) -> tuple[np.ndarray, list[dict]]:
    return runner.global_rows(results, len(results), scales=scales)


def _shards_on_cluster(
    remote: OnCluster, pieces: Sequence[Piece], made: store.ShardFormat, options: dict, bar: dict
) -> Iterator[list[dict]]:
    """Has the shards written, in any order; yields the failures of each that is whole."""
    pieces = [Piece(piece.where.absolute(), _absolute(piece.jobs)) for piece in pieces]
    steps = dict(read=partial(_read_piece, made=made, reading=remote.reading))
    steps |= dict(describe=partial(_describe_piece, options=options))
    steps |= dict(write=partial(_write_piece, made=made))
    with contextlib.closing(remote.run(pieces, **steps)) as found:
        with tqdm(**bar, unit="image") as shown:
            for where, images, failed, node in found:
                # Listed: what a network file system remembers of one name may be old.
                if not where.is_dir() and where.name not in os.listdir(where.parent):
                    raise engines.ClusterError(
                        f"the node {node} has written {where} to a disk of its own: the run folder "
                        "must lie where every node finds it under the same path"
                    )
                shown.update(images)
                yield failed


@dataclass(frozen=True, eq=False)
class _Filled:
    """A piece on its way: its images, read or described; None: its shard is whole already."""

    piece: Piece
    content: list | None
    kept: dict[str, store.EncodedFeatures] = field(default_factory=dict)
    failed: list[dict] = field(default_factory=list)


def _read_piece(piece: Piece, *, made: store.ShardFormat, reading: dict) -> _Filled:
    # Whole where the machine that wrote it died before it could say so.
    if shard := store.whole_shard(piece.where, piece.keys, made):
        return _Filled(piece, None, failed=shard.failures)
    return _Filled(piece, _read(piece.jobs, **reading), piece.salvaged(made))


def _describe_piece(runner: Runner, read: _Filled, *, options: dict) -> _Filled:
    if read.content is None:
        return read
    piece = read.piece
    items, failed = runner.local_items(read.content, piece.keys, read.kept, **options)
    piece.refuse_failed_query(failed)
    return _Filled(piece, items, failed=failed)


def _write_piece(
    described: _Filled, *, made: store.ShardFormat
) -> tuple[Path, int, list[dict], str]:
    """Writes a shard under a name of its own and moves it: a second writer may be at it.

    (A machine that is given up may still be writing.) Returns the shard's folder, the number of
    images, the failures and this machine's name.
    """
    where = described.piece.where
    if described.content is not None:
        own = where.with_name(f"{store.PARTIAL}{uuid.uuid4().hex}")
        store.write_shard(own / where.name, described.content, made, failures=described.failed)
        store.drop_index(where.parent)
        shutil.rmtree(where, ignore_errors=True)
        try:
            os.replace(own / where.name, where)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            # The second writer was first; its shard is the same.
        shutil.rmtree(own)
    return where, len(described.piece.jobs), described.failed, socket.gethostname()
