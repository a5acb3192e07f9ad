"""`engine: ray`: results equal those of the local engine, even where a machine is lost.

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

import joblib
import numpy as np
import psutil
import pytest
import timm
import torch
from safetensors.torch import save_file

from tests import mini_benchmark
from vitgal import engines, runs
from vitgal.data import revisited
from vitgal.engines import pipeline as engines_pipeline
from vitgal.engines.connection import import_ray
from vitgal.features.store.feature_store import FeatureStore
from vitgal.models.network import build_model
from vitgal.models.weights import save_model
from vitgal.settings import MachineSettings, MatchingSettings, RerankingSettings, SettingsError
from vitgal.stages import ray_describer, rerank as stages_rerank

SHARD = 2  # images: the twelve make six shards
STORE = 200 * 1024 * 1024


# Without a cluster


def test_engines():
    with pytest.raises(SettingsError, match="unknown engine 'spark'; known: local, ray"):
        MachineSettings(engine="spark")
    with pytest.raises(SettingsError, match="ray_address 'head:6379' needs engine: ray"):
        MachineSettings(ray_address="head:6379")


def test_without_ray_the_extra_is_named():
    code = "import sys; sys.modules['ray'] = None\nfrom vitgal import engines\n"
    code += "engines.check_engine('local')\nengines.check_engine('ray')"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode == 1
    assert 'pip install -e ".[scale]"' in child.stderr.splitlines()[-1]


@pytest.mark.slow
def test_importing_leaves_ray_alone():
    modules = "vitgal.engines.connection, vitgal.engines.pipeline, vitgal.stages.extract"
    code = f"import sys, {modules}; print('ray' in sys.modules)"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.stdout.split() == ["False"]


@pytest.mark.parametrize(
    ("nodes", "options", "wanted"),
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
def test_actor_plans(nodes, options, wanted):
    plan = engines.ActorPlan.for_nodes(nodes, **({"threads": None, "workers": 1} | options))
    assert (plan.actors, plan.cpus, plan.gpus, plan.tasks) == wanted


@pytest.mark.parametrize(("nodes", "device"), [([], None), ([{}], "cpu"), ([{"CPU": 2}], "cuda")])
def test_a_cluster_without_the_device_is_refused(nodes, device):
    with pytest.raises(engines.ClusterError, match="the Ray cluster has no .PUs"):
        engines.ActorPlan.for_nodes(nodes, threads=1, workers=1, device=device)


def test_an_address_without_a_cluster_is_refused():
    with pytest.raises(engines.ClusterError, match="nothing answers at ray_address 127.0.0.1:1 "):
        with engines.connected("127.0.0.1:1"):
            pass
    for address in ("head", "head:port", "ray://head:10001"):
        with pytest.raises(engines.ClusterError, match="is not HOST:PORT"):
            with engines.connected(address):
                pass


# Two nodes

slow = [pytest.mark.slow]


class Two:
    """A cluster of a head and one other node."""

    def __init__(self):
        import_ray()
        from ray.cluster_utils import Cluster

        args = dict(num_cpus=1, object_store_memory=STORE, include_dashboard=False)
        self.nodes = Cluster(initialize_head=True, head_node_args=args)
        self.other = self.nodes.add_node(num_cpus=1, object_store_memory=STORE)
        self.nodes.wait_for_nodes(timeout=120)
        self.address = self.nodes.address


@pytest.fixture(scope="module")
def two():
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the nodes cannot import it
    before = set(psutil.Process().children(recursive=True))
    cluster = Two()
    with engines.connected(cluster.address):
        yield cluster
    cluster.nodes.shutdown()
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    left = set(psutil.Process().children(recursive=True)) - before
    _, alive = psutil.wait_procs(left, timeout=30)
    assert not alive, "Ray has left processes behind"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Ten database images, of which the last cannot be read, and two queries, as a benchmark."""
    folder = mini_benchmark.write_benchmark(tmp_path_factory.mktemp("data") / "mini", images=10)
    broken = folder / "jpg/image9.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    model = build_model(mini_benchmark.NANO, code_dim=8, seed=0)
    save_model(model, folder / "model.safetensors")
    return folder


def evaluate(run, data, **changed):
    changed = dict(top=10, max_failed_share=0.1) | changed
    return mini_benchmark.evaluate(run, data, data / "model.safetensors", **changed)


def extract(run, data, **changed):
    changed = dict(shard_size=SHARD, max_failed_share=0.1) | changed
    return mini_benchmark.extract(run, data, data / "model.safetensors", **changed)


def rerank(run, data, **changed):
    truth = revisited.load_ground_truth(data / "gnd_mini.pkl")
    settings = RerankingSettings(top=10, matching=MatchingSettings(max_distance=1.0))
    machine = MachineSettings(**changed)
    return stages_rerank.rerank_shortlist(run, truth, settings, machine)


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


contents = mini_benchmark.contents


class TestTwoNodes:
    pytestmark = slow

    def test_a_step_s_own_error_arrives(self, two):
        def wrong(number):
            raise runs.StageError(f"{number} is wrong")

        pipeline = self.pipeline(read=wrong)
        with pytest.raises(runs.StageError, match="^7 is wrong$"):
            list(pipeline.run([7]))
        assert list(pipeline.run([])) == []

    def test_order_prints_and_the_end_of_a_process(self, two, tmp_path, capsys):
        """The process that describes 3 dies once: the pipeline goes on without a loss."""

        def describe(folder):
            def step(number):
                if number == 3 and not (folder / "died").exists():
                    (folder / "died").touch()
                    os._exit(1)
                print(f"described {number}")
                return 10 * number

            return step

        pipeline = self.pipeline(make_describer=partial(describe, tmp_path), ordered=True)
        assert list(pipeline.run(range(6))) == [0, 10, 20, 30, 40, 50]
        lines = capsys.readouterr().out.splitlines()
        assert sum("was lost (ActorDiedError)" in line for line in lines) == 1
        assert [line for line in lines if line.startswith("described")] == [
            f"described {number}" for number in range(6)
        ]

    def test_an_item_that_kills_every_process_is_named(self, two, monkeypatch):
        """A work item that crashes every actor ends the run; it is not retried for ever."""
        monkeypatch.setattr(engines_pipeline, "RETRIES", 1)

        def describe():
            return lambda number: os._exit(1) if number == 2 else number

        label = "work item {}".format
        pipeline = self.pipeline(make_describer=describe, label=label)
        with pytest.raises(engines.ClusterError, match="broke 2 times in a row, at work item 2"):
            list(pipeline.run(range(9)))

    def pipeline(self, **steps):
        plan = engines.ActorPlan(actors=1, cpus=1, gpus=0, tasks=1)
        same = dict(read=lambda value: value, make_describer=lambda: lambda value: value)
        return engines.Pipeline(**(same | dict(write=None, plan=lambda: plan) | steps))

    def test_global_descriptors(self, two, local, run, data):
        folder = evaluate(run, data, engine="ray", ray_address=two.address)
        assert contents(folder) == contents(local / "mini/global")
        recorded = runs.read_json(folder / "stage.json")["recorded"]
        assert (recorded["engine"], recorded["actors"], recorded["failed"]) == ("ray", 2, 1)

    def test_a_node_lost_while_extracting(self, two, local, run, data, tmp_path, monkeypatch):
        """The other node is killed while it describes its second shard."""
        locks = partial(_held, ray_describer._describe_shard, two.other.node_id, tmp_path)
        monkeypatch.setattr(ray_describer, "_describe_shard", locks)
        os.mkfifo(tmp_path / "holds")
        os.mkfifo(tmp_path / "go")
        kept: dict = {}
        killer = threading.Thread(
            target=_kill, args=(two, tmp_path, run / "mini/local", kept), daemon=True
        )
        killer.start()
        folder = extract(run, data, engine="ray", ray_address=two.address)
        killer.join(60)
        assert kept, "the other node was never in the middle of a shard"
        assert 0 < len(kept) < 6
        assert contents(folder) == contents(local / "mini/local")
        assert not list(folder.glob(".partial*"))
        # Shards that were complete when the node was lost are not written again.
        assert {name: (folder / name).stat().st_ino for name in kept} == kept
        assert len(engines.node_resources()) == 1
        opened = FeatureStore.open(folder, verify=True)
        assert len(opened) == 11 and list(opened.failures) == ["image9"]

    def test_a_network_of_timm(self, two, data, tmp_path):
        torch.manual_seed(0)
        save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "net.safetensors")
        weights = f"timm:test_resnet@{tmp_path / 'net.safetensors'}"
        options = dict(top=10, max_failed_share=0.1, size=None, resize="area")
        ray = dict(engine="ray", ray_address=two.address)
        folders = [
            mini_benchmark.evaluate(tmp_path / name, data, weights, **options, **engine)
            for name, engine in {"local": {}, "ray": ray}.items()
        ]
        assert contents(folders[0]) == contents(folders[1])

    def test_a_finished_stage_is_the_same_for_both(self, two, run, data):
        assert extract(run, data) == extract(run, data, engine="ray") == run / "mini/local"

    def test_reranking(self, two, local, run, data):
        """On two processes of the node that is left; the driver's own is not one of them."""
        with engines.parallel("ray", two.address, workers=9, tasks=9) as pool:
            assert sorted(pool(joblib.delayed(abs)(-i) for i in range(9))) == list(range(9))
        folder = rerank(run, data, engine="ray", ray_address=two.address)
        assert contents(folder) == contents(local / "mini/rerank")
        assert np.load(folder / "inliers.npy").max() > 4
        assert runs.read_json(folder / "stage.json")["recorded"]["engine"] == "ray"

    def test_the_error_of_a_worker_is_raised_here(self, two, local, tmp_path, data):
        """Too many unreadable images stop the stage as they do on one machine."""
        shutil.copytree(local / "mini/global", tmp_path / "mini/global")
        with pytest.raises(runs.StageError, match="1 of 12 images cannot be read.*image9"):
            extract(tmp_path, data, engine="ray", ray_address=two.address, max_failed_share=0)
        assert not (tmp_path / "mini/local/stage.json").exists()

    def test_a_shard_on_a_disk_of_the_node(self, two, local, tmp_path, data, monkeypatch):
        """A node that does not see the run folder writes somewhere else."""
        shutil.copytree(local / "mini/global", tmp_path / "mini/global")
        monkeypatch.setattr(
            ray_describer, "_write_shard", partial(_elsewhere, ray_describer._write_shard)
        )
        with pytest.raises(engines.ClusterError, match=r"shard-0\d to a disk of its own"):
            extract(tmp_path, data, engine="ray", ray_address=two.address)


def _held(real, doomed: str, folder: Path, describer, state):
    """Describes a shard; the second one on each node waits, for ever on the doomed node."""
    import ray

    here = "doomed" if ray.get_runtime_context().get_node_id() == doomed else "other"
    (folder / f"{here}-{uuid.uuid4().hex}").touch()
    if len(list(folder.glob(f"{here}-*"))) == 2:
        if here == "doomed":
            (folder / "holds").write_text("the second")  # returns when the test reads it
            (folder / "holds").read_text()  # never returns: there is no writer
        else:
            with open(folder / "go", "rb") as handle:
                handle.read(1)
    return real(describer, state)


def _kill(two: Two, folder: Path, stage: Path, kept: dict) -> None:
    """Kills the node that waits in its second shard; adds the complete shards to `kept`."""
    go = os.open(folder / "go", os.O_RDWR)  # so that neither side waits for the other to open
    (folder / "holds").read_text()
    while not (complete := list(stage.glob("shard-*"))):
        time.sleep(0.05)
    two.nodes.remove_node(two.other, allow_graceful=False)
    kept |= {path.name: path.stat().st_ino for path in complete}
    os.write(go, b"1")


def _elsewhere(real, state):
    folder, *results = real(state)
    shutil.rmtree(folder)
    return folder, *results


@pytest.mark.slow
def test_an_interrupt_while_ray_starts():
    """Ctrl-C at Ray's first process is handled in the end, and no process is left."""
    code = """
import os, signal, threading, psutil
from vitgal import engines
from vitgal.engines.connection import import_ray
me = psutil.Process()
import_ray()
def interrupt():
    while not me.children(recursive=True):
        pass
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt, daemon=True).start()
try:
    with engines.connected():
        print("inside")
except KeyboardInterrupt:
    print("interrupted")
_, left = psutil.wait_procs(me.children(recursive=True), timeout=30)
print(len(left), signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (child.returncode, child.stdout) == (0, "interrupted\n0 True\n"), child.stderr


@pytest.mark.slow
def test_an_instance_of_its_own():
    """Without an address Ray is started here, for this user alone, and leaves nothing behind."""
    code = """
import os, psutil, stat
from pathlib import Path
from vitgal import engines
plan = engines.ActorPlan(actors=1, cpus=1, gpus=0, tasks=1)
pipeline = engines.Pipeline(
    read=lambda x: x + 1,
    make_describer=lambda: lambda x: 2 * x,
    write=lambda x: -x,
    plan=lambda: plan,
)
me = psutil.Process()
for number in (1, 2):  # the second instance of a process has the same token
    with engines.connected():
        print(sorted(pipeline.run([number, 2])))
        servers = {
            connection.laddr.ip.removeprefix("::ffff:")
            for process in [me, *me.children(recursive=True)]
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
        token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
        modes = [oct(stat.S_IMODE(path.stat().st_mode)) for path in (token, token.parent)]
        print(servers, *modes, len(token.read_text()), (token.parent / "ray").is_dir())
_, left = psutil.wait_procs(me.children(recursive=True), timeout=30)
print(len(left), token.parent.exists(), "RAY_AUTH_TOKEN_PATH" in os.environ)
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    private = "{'127.0.0.1'} 0o600 0o700 64 True\n"
    printed = f"[-6, -4]\n{private}[-6, -6]\n{private}0 False False\n"
    assert (child.returncode, child.stdout) == (0, printed), child.stderr
    assert child.stderr == ""
