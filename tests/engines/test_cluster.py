"""`engine: ray`: equal to the local engine, also where a machine is lost in the middle of it.

The cluster is real: two Ray nodes on this machine, a CPU and the smallest object store each.
"""

import os
import shutil
import subprocess
import sys
import threading
import time
import uuid
from functools import partial
from pathlib import Path

import cv2
import joblib
import numpy as np
import psutil
import pytest

from tests.stages import test_extraction
from vitgal import runs
from vitgal.data import revisited
from vitgal.engines import cluster
from vitgal.features.store.feature_store import FeatureStore
from vitgal.models.network import build_model
from vitgal.models.weights import save_model
from vitgal.stages import cluster as stages_cluster
from vitgal.stages import describe as stages_describe
from vitgal.stages import rerank as stages_rerank

SHARD = 2  # images: the twelve make six shards
STORE = 200 * 1024 * 1024


# Without a cluster


def test_engines(tmp_path):
    cluster.check_engine("local")
    with pytest.raises(ValueError, match="unknown engine 'spark'; known: local, ray"):
        stages_describe.evaluate_global(
            tmp_path, dataset="mini", data_folder=tmp_path, model="", engine="spark"
        )
    with pytest.raises(ValueError, match="ray_address 'head:6379' needs engine: ray"):
        stages_rerank.rerank_shortlist(
            tmp_path, dataset="mini", data_folder=tmp_path, ray_address="head:6379"
        )


def test_without_ray_the_extra_is_named():
    code = "import sys; sys.modules['ray'] = None\nfrom vitgal.engines import cluster\n"
    code += "cluster.check_engine('local')\ncluster.check_engine('ray')"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode == 1
    assert 'pip install -e ".[scale]"' in child.stderr.splitlines()[-1]


@pytest.mark.slow
def test_importing_leaves_ray_alone():
    code = "import sys, vitgal.cluster, vitgal.extraction; print('ray' in sys.modules)"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.stdout.split() == ["False"]


@pytest.mark.parametrize(
    ("nodes", "about", "wanted"),
    [
        # actors, CPUs and GPUs of each, tasks at once
        ([{"CPU": 1.0}, {"CPU": 1.0}], {}, (2, 1, 0, 2)),
        ([{"CPU": 8.0}, {"CPU": 6.0}], {"threads": 4}, (3, 4, 0, 14)),
        ([{"CPU": 2.0}], {"threads": 16}, (1, 2, 0, 2)),
        ([{"CPU": 16.0, "GPU": 4.0}, {"CPU": 8.0}], {"workers": 4}, (4, 1, 1, 6)),
        ([{"CPU": 16.0, "GPU": 4.0}], {"device": "cpu"}, (16, 1, 0, 16)),
        ([{"GPU": 1.0}], {}, (1, 1, 1, 1)),
    ],
)
def test_shares(nodes, about, wanted):
    share = cluster.Share.among(nodes, **({"threads": None, "workers": 1} | about))
    assert (share.actors, share.cpus, share.gpus, share.tasks) == wanted


@pytest.mark.parametrize(("nodes", "device"), [([], None), ([{}], "cpu"), ([{"CPU": 2}], "cuda")])
def test_nothing_to_share(nodes, device):
    with pytest.raises(cluster.ClusterError, match="the Ray cluster has no .PUs"):
        cluster.Share.among(nodes, threads=1, workers=1, device=device)


def test_nobody_at_the_address():
    with pytest.raises(cluster.ClusterError, match="nothing answers at ray_address 127.0.0.1:1 "):
        with cluster.connected("127.0.0.1:1"):
            pass
    for address in ("head", "head:port", "ray://head:10001"):
        with pytest.raises(cluster.ClusterError, match="is not HOST:PORT"):
            with cluster.connected(address):
                pass


# Two nodes

slow = [pytest.mark.slow, pytest.mark.last]


class Two:
    """A cluster of a head and one other node."""

    def __init__(self):
        cluster._ray()
        from ray.cluster_utils import Cluster

        args = dict(num_cpus=1, object_store_memory=STORE, include_dashboard=False)
        self.nodes = Cluster(initialize_head=True, head_node_args=args)
        self.other = self.nodes.add_node(num_cpus=1, object_store_memory=STORE)
        self.nodes.wait_for_nodes()
        self.address = self.nodes.address


@pytest.fixture(scope="module")
def two():
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the nodes cannot import it
    before = set(psutil.Process().children(recursive=True))
    made = Two()
    with cluster.connected(made.address):
        yield made
    made.nodes.shutdown()
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    left = set(psutil.Process().children(recursive=True)) - before
    _, alive = psutil.wait_procs(left, timeout=30)
    assert not alive, "Ray has left processes behind"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Ten database images, of which the last cannot be read, and two queries, as a benchmark."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "jpg").mkdir()
    database = [f"image{i}" for i in range(10)]
    for i, name in enumerate(database):
        photo = test_extraction.noise(*test_extraction.SHAPES[i % 5], seed=i)
        assert cv2.imwrite(str(folder / f"jpg/{name}.jpg"), photo)
    for i in range(2):
        shutil.copy(folder / f"jpg/image{3 * i}.jpg", folder / f"jpg/query{i}.jpg")
    broken = folder / "jpg/image9.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    truth = revisited.GroundTruth(
        name="mini",
        database=database,
        queries=["query0", "query1"],
        boxes=np.array([[0, 0, 128, 96], [8.5, 4, 150, 76]]),
        easy=[np.array([0]), np.array([3])],
        hard=[np.array([2]), np.array([], np.int64)],
        junk=[np.array([5]), np.array([1])],
    )
    revisited.write_ground_truth(folder / "gnd_mini.pkl", truth)
    model = build_model(test_extraction.NANO, code_dim=8, seed=0)
    save_model(model, folder / "model.safetensors")
    return folder


def evaluate(run, data, **changed):
    changed = dict(top=10, max_failed_share=0.1) | changed
    return test_extraction.evaluate(run, data, data / "model.safetensors", **changed)


def extract(run, data, **changed):
    changed = dict(shard_size=SHARD, max_failed_share=0.1) | changed
    return test_extraction.extract(run, data, data / "model.safetensors", **changed)


def rerank(run, data, **changed):
    options = dict(dataset="mini", data_folder=data, top=10, max_distance=1.0, progress=False)
    return stages_rerank.rerank_shortlist(run, **options, **changed)


@pytest.fixture(scope="module")
def local(tmp_path_factory, data) -> Path:
    """The run of the local engine."""
    run = tmp_path_factory.mktemp("local")
    evaluate(run, data)
    extract(run, data)
    rerank(run, data, workers=1)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The run of Ray's engine, stage by stage."""
    return tmp_path_factory.mktemp("ray")


contents = test_extraction.contents


class TestTwoNodes:
    pytestmark = slow

    def test_a_step_s_own_error_arrives(self, two):
        def wrong(piece):
            print(f"looking at {piece}")
            raise runs.StageError(f"{piece} is wrong")

        pipeline = self.pipeline(read=wrong)
        with pytest.raises(runs.StageError, match="^7 is wrong$"):
            list(pipeline.run([7]))
        assert list(pipeline.run([])) == []

    def test_order_prints_and_the_end_of_a_process(self, two, tmp_path, capsys):
        """The process that describes 3 dies once: the pipeline goes on, nothing is lost."""

        def describe(folder):
            def step(piece):
                if piece == 3 and not (folder / "died").exists():
                    (folder / "died").touch()
                    os._exit(1)
                print(f"described {piece}")
                return 10 * piece

            return step

        pipeline = self.pipeline(describe=partial(describe, tmp_path), ordered=True)
        assert list(pipeline.run(range(6))) == [0, 10, 20, 30, 40, 50]
        said = capsys.readouterr().out.splitlines()
        assert said.count("a Ray process or machine was lost (ActorDiedError): going on") == 1
        assert [line for line in said if line.startswith("described")] == [
            f"described {piece}" for piece in range(6)
        ]

    def test_what_kills_every_process_is_named(self, two, monkeypatch):
        """A piece that ends whoever describes it ends the run, not for ever begun again."""
        monkeypatch.setattr(cluster, "RETRIES", 1)

        def describe():
            return lambda piece: os._exit(1) if piece == 2 else piece

        pipeline = self.pipeline(describe=describe, name=lambda piece: f"piece number {piece}")
        with pytest.raises(cluster.ClusterError, match="broke 2 times in a row, at piece number 2"):
            list(pipeline.run(range(9)))

    def pipeline(self, **steps):
        share = cluster.Share(actors=1, cpus=1, gpus=0, tasks=1)
        same = dict(read=lambda piece: piece, describe=lambda: lambda piece: piece, write=None)
        return cluster.Pipeline(**(same | steps), share=lambda: share)

    def test_global_descriptors(self, two, local, run, data):
        folder = evaluate(run, data, engine="ray", ray_address=two.address)
        assert contents(folder) == contents(local / "mini/global")
        recorded = runs.read_json(folder / "stage.json")["recorded"]
        assert (recorded["engine"], recorded["actors"], recorded["failed"]) == ("ray", 2, 1)

    def test_a_node_lost_while_extracting(self, two, local, run, data, tmp_path, monkeypatch):
        """The other node is killed while it describes its second shard."""
        held = partial(_held, stages_cluster._describe_piece, two.other.node_id, tmp_path)
        monkeypatch.setattr(stages_cluster, "_describe_piece", held)
        os.mkfifo(tmp_path / "holds")
        os.mkfifo(tmp_path / "go")
        found: dict = {}
        killer = threading.Thread(
            target=_kill, args=(two, tmp_path, run / "mini/local", found), daemon=True
        )
        killer.start()
        folder = extract(run, data, engine="ray", ray_address=two.address)
        killer.join(60)
        assert found, "the other node was never in the middle of a shard"
        assert 0 < len(found) < 6
        assert contents(folder) == contents(local / "mini/local")
        assert not list(folder.glob(".partial*"))
        # What was whole when the node went was not made again.
        assert {name: (folder / name).stat().st_ino for name in found} == found
        assert len(cluster.resources()) == 1
        opened = FeatureStore.open(folder, verify=True)
        assert len(opened) == 11 and list(opened.failures) == ["image9"]

    def test_a_finished_stage_is_the_same_for_both(self, two, run, data):
        assert extract(run, data) == extract(run, data, engine="ray") == run / "mini/local"

    def test_reranking(self, two, local, run, data):
        """On two processes of the machine that is left; the driver's own is not one of them."""
        with cluster.parallel("ray", two.address, workers=9, tasks=9) as pool:
            assert sorted(pool(joblib.delayed(abs)(-i) for i in range(9))) == list(range(9))
        folder = rerank(run, data, engine="ray", ray_address=two.address)
        assert contents(folder) == contents(local / "mini/rerank")
        assert np.load(folder / "inliers.npy").max() > 4
        assert runs.read_json(folder / "stage.json")["recorded"]["engine"] == "ray"

    def test_what_a_worker_meets_is_told(self, two, local, tmp_path, data):
        """Too many unreadable images stop the stage as they do on one machine."""
        shutil.copytree(local / "mini/global", tmp_path / "mini/global")
        with pytest.raises(runs.StageError, match="1 of 12 images cannot be read.*image9"):
            extract(tmp_path, data, engine="ray", ray_address=two.address, max_failed_share=0)
        assert not (tmp_path / "mini/local/stage.json").exists()


def _held(real, doomed: str, folder: Path, runner, read, *, options):
    """Describes a shard, but the second on each node waits: on the doomed one for ever."""
    import ray

    here = "doomed" if ray.get_runtime_context().get_node_id() == doomed else "other"
    (folder / f"{here}-{uuid.uuid4().hex}").touch()
    if len(list(folder.glob(f"{here}-*"))) == 2:
        if here == "doomed":
            (folder / "holds").write_text("the second")  # returns when the test reads it
            (folder / "holds").read_text()  # never does: nobody writes
        else:
            with open(folder / "go", "rb") as handle:
                handle.read(1)
    return real(runner, read, options=options)


def _kill(two: Two, folder: Path, stage: Path, found: dict) -> None:
    """Ends the node that is held in its second shard, once a shard is whole; notes those."""
    go = os.open(folder / "go", os.O_RDWR)  # so that neither side waits for the other to open
    (folder / "holds").read_text()
    while not (whole := list(stage.glob("shard-*"))):
        time.sleep(0.05)
    two.nodes.remove_node(two.other, allow_graceful=False)
    found |= {path.name: path.stat().st_ino for path in whole}
    os.write(go, b"1")

    def test_a_shard_on_a_disk_of_the_node(self, two, local, tmp_path, data, monkeypatch):
        """A node that does not see the run folder writes somewhere else."""
        shutil.copytree(local / "mini/global", tmp_path / "mini/global")
        monkeypatch.setattr(
            stages_cluster, "_write_piece", partial(_elsewhere, stages_cluster._write_piece)
        )
        with pytest.raises(cluster.ClusterError, match=r"shard-0\d to a disk of its own"):
            extract(tmp_path, data, engine="ray", ray_address=two.address)


def _elsewhere(real, described, *, made):
    where, *found = real(described, made=made)
    shutil.rmtree(where)
    return where, *found


@pytest.mark.slow
@pytest.mark.last
def test_an_interrupt_while_ray_starts():
    """Ctrl-C as soon as Ray's first process is there: it is heard, and nothing is left."""
    code = """
import os, signal, threading, psutil
from vitgal.engines import cluster
me = psutil.Process()
cluster._ray()
def interrupt():
    while not me.children(recursive=True):
        pass
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt, daemon=True).start()
try:
    with cluster.connected():
        print("inside")
except KeyboardInterrupt:
    print("interrupted")
_, left = psutil.wait_procs(me.children(recursive=True), timeout=30)
print(len(left), signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (child.returncode, child.stdout) == (0, "interrupted\n0 True\n"), child.stderr


@pytest.mark.slow
@pytest.mark.last
def test_an_instance_of_its_own():
    """Without an address Ray is started here and leaves no process behind."""
    code = """
from vitgal.engines import cluster
share = cluster.Share(1, 1, 0, 1)
with cluster.connected():
    same = dict(read=lambda x: x + 1, describe=lambda: lambda x: 2 * x, write=lambda x: -x)
    print(sorted(cluster.Pipeline(**same, share=lambda: share).run([1, 2])))
import psutil
_, left = psutil.wait_procs(psutil.Process().children(recursive=True), timeout=30)
print(len(left))
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (child.returncode, child.stdout) == (0, "[-6, -4]\n0\n"), child.stderr
    assert child.stderr == ""
