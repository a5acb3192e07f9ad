"""Several workers that extract together, machines that differ, and a full disk."""

import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.mini_benchmark import TOP, contents, evaluate, extract
from tests.stages.killing import fork_server
from vitgal import runs
from vitgal.features.store import FeatureStore, RowFile
from vitgal.models import inference
from vitgal.stages import describe, local_describer, ray_describer


def work(run, benchmark, weight_file, worker: int, meeting, loaded) -> None:
    """One of two workers: notes every image that it reads, and waits for the other to begin."""
    load_image, open_local = local_describer.load_image, ray_describer.open_local

    def noted(task, **options):
        loaded.put((worker, task.key))
        return load_image(task, **options)

    def together(*arguments):
        meeting.wait(60)  # both are in the stage before either extracts
        return open_local(*arguments)

    local_describer.load_image, ray_describer.open_local = noted, together
    try:
        extract(run, benchmark, weight_file, worker=worker, worker_count=2, read_threads=0)
    except runs.StageError as error:
        assert "are for other workers" in str(error)


@pytest.mark.slow
def test_two_processes_divide_the_work(global_run, benchmark, weight_file, finished, monkeypatch):
    context = fork_server(monkeypatch)
    meeting, loaded = context.Barrier(2), context.Queue()
    workers = [
        context.Process(target=work, args=(global_run, benchmark, weight_file, i, meeting, loaded))
        for i in (0, 1)
    ]
    for worker in workers:
        worker.start()
    images = [loaded.get(timeout=60) for _ in range(6)]
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert loaded.empty()
    assert len({key for _, key in images}) == 6  # no image twice
    assert {worker for worker, _ in images} == {0, 1}
    assert (global_run / "mini/local/stage.json").exists()
    assert contents(global_run / "mini/local") == contents(finished / "run" / "mini" / "local")


def test_workers_one_after_the_other(global_run, benchmark, weight_file):
    arguments = (global_run, benchmark, weight_file)
    with pytest.raises(runs.StageError, match="worker 1 has written its shards.*1 of 2 .shard-00"):
        extract(*arguments, worker=1, worker_count=2)
    folder = extract(*arguments, worker=0, worker_count=2)
    assert len(FeatureStore.open(folder, verify=True)) == 6
    with pytest.raises(ValueError, match="worker is 2: 2 workers"):
        extract(*arguments, worker=2, worker_count=2)
    with pytest.raises(ValueError, match="overwrite"):
        extract(*arguments, worker=0, worker_count=2, overwrite=True)


def test_the_last_worker_detects_damaged_shards_of_others(local_run, benchmark, weight_file):
    """The stage may be finished or not: its index is not written over the damage."""
    folder = local_run / "mini" / "local"
    scores, offsets = (folder / "shard-01" / f"{name}.npy" for name in ("scores", "offsets"))
    for file in (scores, offsets):
        good = file.read_bytes()
        file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        if file is scores:  # no output of the stage: found only by an unfinished one
            (folder / runs.MANIFEST).rename(folder / runs.STARTED)
        with pytest.raises(runs.StageError, match=r"1 \(shard-01, ...\) are damaged: run this"):
            extract(local_run, benchmark, weight_file, worker=0, worker_count=2)
        assert not (folder / runs.MANIFEST).exists()
        extract(local_run, benchmark, weight_file)
        assert file.read_bytes() == good
    assert len(FeatureStore.open(folder, verify=True)) == 6


@pytest.mark.slow
def test_auto_is_not_mixed(run, benchmark, weight_file, monkeypatch):
    """Machines that resolve precision auto in two ways: nothing is mixed, nothing is lost."""
    arguments = (run, benchmark, weight_file)

    def resolves_to(precision: str) -> None:
        monkeypatch.setattr(inference, "resolve_precision", lambda *_: precision)

    resolves_to("bf16")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        append = RowFile.append

        def once(file, *block):
            append(file, *block)
            raise KeyboardInterrupt

        patch.setattr(describe, "BLOCK", 4)
        patch.setattr(RowFile, "append", once)
        evaluate(*arguments, precision="auto")
    resolves_to("fp32")
    with pytest.raises(runs.StageError, match='precision: "bf16" there, "fp32" now.*auto depends'):
        evaluate(*arguments, precision="auto")
    evaluate(*arguments, precision="auto", overwrite=True)
    with pytest.raises(runs.StageError, match="for other workers"):
        extract(*arguments, worker=0, worker_count=2, precision="auto")
    resolves_to("bf16")
    for workers in (dict(worker=1, worker_count=2), {}):
        with pytest.raises(runs.StageError, match="shard-00 was made in fp32, and here .* bf16"):
            extract(*arguments, precision="auto", **workers)
    resolves_to("fp32")
    shutil.rmtree(run / "mini" / "local" / "shard-01")  # the one of bf16
    folder = extract(*arguments, precision="auto")
    assert len(FeatureStore.open(folder, verify=True)) == 6


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["evaluate", "extract"])
def test_a_full_disk(run, benchmark, weight_file, stage):
    """Files above a limit cannot be written: the stage stops with the system's error, the next run
    finishes. Extraction meets the limit at its second shard, so that the first is kept."""
    if stage == "extract":
        evaluate(run, benchmark, weight_file)
    arguments = map(str, (TOP, stage, run, benchmark, weight_file))
    child = subprocess.run(
        [sys.executable, "-c", FULL_DISK, *arguments], capture_output=True, text=True
    )
    assert child.returncode == 1
    assert "File too large" in child.stderr
    folder = run / "mini" / ("global" if stage == "evaluate" else "local")
    assert not (folder / "database.npy").exists()
    assert [path.name for path in folder.glob("shard-*")] == ["shard-00"] * (stage == "extract")
    assert not (folder / "stage.json").exists()
    if stage == "evaluate":
        database = np.load(evaluate(run, benchmark, weight_file) / "database.npy")
        assert database.any(axis=1).all()
    else:
        opened = FeatureStore.open(extract(run, benchmark, weight_file), verify=True)
        assert len(opened) == 6


FULL_DISK = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests import mini_benchmark
from vitgal.features import store
real = store.write_shard

def limited(folder, *arguments, **options):
    if folder.name == "shard-01":
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
    return real(folder, *arguments, **options)

store.write_shard = limited
if sys.argv[2] == "evaluate":
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
getattr(mini_benchmark, sys.argv[2])(*map(Path, sys.argv[3:]))
"""
