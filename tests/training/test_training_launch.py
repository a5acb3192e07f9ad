"""Several processes: equal to one that accumulates; forked from a notebook, or launched."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing import PContext
from torch.multiprocessing import ProcessContext
from tqdm import tqdm

from tests.training_runs import (
    AUTOENCODER,
    MACHINE,
    NANO,
    SETTINGS,
    exit_code,
    fit,
    fit_autoencoder,
    kill,
    rows,
    split,
    write_images,
)
from vitgal import runs
from vitgal.app import train_command
from vitgal.models import weights
from vitgal.settings import AutoencoderSettings, MachineSettings, TrainingSettings
from vitgal.training import diagnostics, errors, launch, loop, networks, samples

TOP = Path(__file__).resolve().parents[2]
# On one thread in both: where a gradient is rounding alone, AdamW makes a step of the learning rate
# of it, and another number of threads rounds otherwise.
FOUR = replace(SETTINGS, epochs=1, batch_size=2, lr=1e-3, warmup_lr=1e-3)
TWO = replace(MACHINE, num_processes=2, timeout_minutes=5)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """27 photographs, of which 20 train: five steps of four."""
    return write_images(tmp_path_factory.mktemp("images") / "images", 9)


@pytest.fixture(scope="module")
def undisturbed(images, tmp_path_factory) -> Path:
    """`<run>/retrieval` of two processes that nothing disturbed."""
    run = split(tmp_path_factory.mktemp("undisturbed"), images)
    return fit(run, images, FOUR, TWO)


def state(folder: Path) -> dict:
    return torch.load(folder / "state" / "last.pt", weights_only=True)


@pytest.mark.slow
def test_two_processes_equal_one_that_accumulates(images, run, tmp_path, monkeypatch):
    settings = replace(FOUR, architecture=NANO, drop_path=0.0)
    two = fit(run, images, settings, TWO)
    # BatchNorm's statistics are those of rank 0, which sees the first half of every step: followed
    # here by hand, from what goes into the layer.
    seen, forward = [], networks.RetrievalNetwork.forward

    def watched(self, pictures, labels):
        if not seen:
            self.model.local_atrous.norm.register_forward_pre_hook(
                lambda _, inputs: seen.append(inputs[0].detach())
            )
        return forward(self, pictures, labels)

    monkeypatch.setattr(networks.RetrievalNetwork, "forward", watched)
    other = split(tmp_path / "other", images)
    single = fit(other, images, replace(settings, accumulate=2))
    result, expected = state(two)["network"], state(single)["network"]
    assert rows(two)[-1]["step"] == 5
    trained = [name for name in result if "running_" not in name and "batches" not in name]
    # five steps move a parameter by up to 5e-3
    for name in trained:
        assert (result[name] - expected[name]).abs().max() < 1e-5, name
    mean, variance = torch.zeros(128), torch.ones(128)
    for values in seen[:10:2]:
        mean = 0.9 * mean + 0.1 * values.mean((0, 2, 3))
        variance = 0.9 * variance + 0.1 * values.var((0, 2, 3), unbiased=True)
    norm = "model.local_atrous.norm.running_"
    # parameters differ by up to 1e-5 between the two runs, and so do the values seen
    assert torch.allclose(result[f"{norm}mean"], mean, atol=1e-4)
    assert torch.allclose(result[f"{norm}var"], variance, atol=1e-4)
    assert rows(two)[-1]["loss"] == pytest.approx(rows(single)[-1]["loss"], abs=1e-4)


@pytest.mark.slow
def test_forked_processes_write_one_log_and_can_be_watched(images, run, capfd):
    logs = []
    folder = fit(run, images, FOUR, TWO, watch=lambda log: logs.append(len(log)))
    assert logs[-1] == len(rows(folder)) == 1  # one epoch, written once
    assert len(list((folder / "tensorboard").iterdir())) == 1
    assert not launch.PartialState._shared_state  # the notebook's own process stays free
    # a second launch in one kernel works
    model = fit_autoencoder(run, images, replace(AUTOENCODER, epochs=1, batch_size=2), TWO)
    assert diagnostics.same_backbone(
        weights.load_model(model / "model.safetensors"), folder / "model.safetensors"
    )


@pytest.mark.slow
@pytest.mark.parametrize("data_workers", [0, 1])
def test_garbage_of_the_notebook_is_not_collected_in_its_processes(
    data_workers, images, run, monkeypatch
):
    """A store in a cycle, as an earlier launch leaves one, would abort the child or hang it."""

    class Cycle:
        def __init__(self):
            self.itself = self
            self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def collecting(self, index):
        gc.collect()
        return read(self, index)

    read = samples.TrainingImages.__getitem__
    monkeypatch.setattr(samples.TrainingImages, "__getitem__", collecting)
    gc.disable()
    try:
        Cycle()
        folder = fit(run, images, FOUR, replace(TWO, data_workers=data_workers))
    finally:
        gc.enable()
    assert (folder / "model.safetensors").exists()


@pytest.mark.slow
def test_a_bar_of_the_notebook_does_not_stop_its_processes(images, run):
    """A thread of the notebook draws a bar, and so holds tqdm's lock, while the processes fork."""
    held, done = threading.Event(), threading.Event()

    def draw():
        with tqdm.get_lock():
            held.set()
            done.wait()

    thread = threading.Thread(target=draw)
    thread.start()
    held.wait()
    try:
        assert (fit(run, images, FOUR, TWO) / "model.safetensors").exists()
    finally:
        done.set()
        thread.join()


def test_a_dead_process_ends_the_others(images, run, monkeypatch):
    step = loop.Trainer.run_step

    def dying(self, batches):
        if self.accelerator.process_index == 1 and self.progress.step == 2:
            kill()
        return step(self, batches)

    monkeypatch.setattr(loop.Trainer, "run_step", dying)
    with pytest.raises(errors.Preempted, match="process 1 .* was killed .SIGKILL.*goes on"):
        fit(run, images, FOUR, TWO)
    monkeypatch.undo()
    assert (fit(run, images, FOUR, TWO) / "stage.json").exists()


@pytest.mark.slow
def test_the_process_that_died_is_named_though_another_noticed(images, run, tmp_path, monkeypatch):
    step, wait, join = loop.Trainer.run_step, launch._await_launcher, ProcessContext.join
    noticed = tmp_path / "noticed"

    def dying(self, batches):
        if self.accelerator.process_index == 1 and self.progress.step == 2:
            kill()
        return step(self, batches)

    def waiting():
        noticed.touch()
        wait()

    def late(self, *given):
        """The launcher looks when the other process has met the broken connection."""
        first, second = self.processes
        while second.exitcode is not None and first.exitcode is None and not noticed.exists():
            time.sleep(0.01)
        return join(self, *given)

    monkeypatch.setattr(loop.Trainer, "run_step", dying)
    monkeypatch.setattr(launch, "_await_launcher", waiting)
    monkeypatch.setattr(ProcessContext, "join", late)
    with pytest.raises(errors.TrainingError, match="process 1 .* was killed .SIGKILL"):
        fit(run, images, FOUR, TWO)
    assert noticed.exists()


@pytest.mark.slow
def test_a_signalled_process_ends_without_waiting(images, run, tmp_path, monkeypatch):
    step = loop.Trainer.run_step
    waited = tmp_path / "waited"

    def dying(self, batches):
        if self.progress.step == 2:
            own = signal.SIGKILL if self.accelerator.process_index == 1 else signal.SIGTERM
            os.kill(os.getpid(), own)
        return step(self, batches)

    monkeypatch.setattr(loop.Trainer, "run_step", dying)
    monkeypatch.setattr(launch, "_await_launcher", waited.touch)
    with pytest.raises(errors.TrainingError):  # the one's error or the other's
        fit(run, images, FOUR, TWO)
    assert not waited.exists()


@pytest.mark.slow
def test_a_bad_loss_on_one_process_stops_all(images, run, monkeypatch):
    forward = networks.RetrievalNetwork.forward

    def broken(self, pictures, labels):
        result = forward(self, pictures, labels)
        bad = launch.PartialState().process_index == 1
        return result | {"loss": result["loss"] * (float("nan") if bad else 1)}

    monkeypatch.setattr(networks.RetrievalNetwork, "forward", broken)
    with pytest.raises(errors.TrainingError) as error:
        fit(run, images, FOUR, TWO)
    assert "the loss is not finite at step 0 of epoch 0" in str(error.value)
    data = samples.read_data(run / "split", images, FOUR)
    (_, *_), second = (
        list(samples.Batches(len(data.train), 2, 2, rank, seed=0, epoch=0)) for rank in (0, 1)
    )
    assert all(data.train.names[index] in str(error.value) for _, index in second[0])
    assert state(run / "retrieval")["progress"]["step"] == 0  # the state before is saved


@pytest.mark.slow
def test_sigterm_to_one_process_saves_all(images, run, undisturbed, monkeypatch):
    step = loop.Trainer.run_step

    def told(self, batches):
        result = step(self, batches)
        if self.accelerator.process_index == 1 and self.progress.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "run_step", told)
        with pytest.raises(errors.Preempted):
            fit(run, images, FOUR, TWO)
    pending = state(run / "retrieval")["progress"]["pending"]
    assert [len(rank) for rank in pending] == [3, 3]  # both stopped after the third step
    folder = fit(run, images, FOUR, TWO)
    name = "model.safetensors"
    assert (folder / name).read_bytes() == (undisturbed / name).read_bytes()
    assert rows(folder) == rows(undisturbed)


@pytest.mark.slow
def test_sigterm_during_validation_ends_all(images, run, undisturbed, monkeypatch):
    validate = networks.RetrievalNetwork.validate

    def told(self, pictures, labels):
        if launch.PartialState().process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return validate(self, pictures, labels)

    with monkeypatch.context() as patch:
        patch.setattr(networks.RetrievalNetwork, "validate", told)
        with pytest.raises(errors.Preempted, match="while validating"):
            fit(run, images, FOUR, TWO)
    progress = state(run / "retrieval")["progress"]
    assert (progress["epoch"], progress["step"]) == (0, 5)  # saved before the validation
    name = "model.safetensors"
    assert (fit(run, images, FOUR, TWO) / name).read_bytes() == (undisturbed / name).read_bytes()
    assert rows(run / "retrieval") == rows(undisturbed)


@pytest.mark.slow
def test_a_silent_process_ends_the_run(images, run, monkeypatch):
    step = loop.Trainer.run_step

    def silent(self, batches):
        if self.accelerator.process_index == 1 and self.progress.step == 2:
            signal.pause()  # until the launcher asks it to end
            os._exit(1)
        return step(self, batches)

    monkeypatch.setattr(loop.Trainer, "run_step", silent)
    with pytest.raises(
        errors.TrainingError, match="(?si)process 0 of the launch failed.*time(d )?out"
    ):
        fit(run, images, FOUR, replace(TWO, timeout_minutes=0.2))


@pytest.mark.slow
def test_a_stopped_process_ends_the_run_and_holds_no_lock(images, run, monkeypatch):
    step, close = loop.Trainer.run_step, PContext.close

    def stopped(self, batches):
        if self.accelerator.process_index == 1 and self.progress.step == 2:
            os.kill(os.getpid(), signal.SIGSTOP)
        return step(self, batches)

    # The launcher asks it to end, which it cannot hear, and kills it half a minute later.
    monkeypatch.setattr(PContext, "close", lambda self, *_, **__: close(self, timeout=1))
    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "run_step", stopped)
        with pytest.raises(errors.TrainingError) as error:
            fit(run, images, FOUR, replace(TWO, timeout_minutes=0.1))
    assert not isinstance(error.value, errors.Preempted)  # status 1: it would stand still again
    assert "another process was silent for 0.1 minutes (timeout_minutes)" in str(error.value)
    with runs.locked(run / "retrieval"):  # else StageError
        pass


@pytest.mark.slow
def test_sigterm_to_the_notebook_reaches_its_processes(images, run, monkeypatch):
    step = loop.Trainer.run_step

    def told(self, batches):
        result = step(self, batches)
        if self.accelerator.process_index == 0 and self.progress.step == 2:
            os.kill(os.getppid(), signal.SIGTERM)
            while not self.termination.requested:  # until the launcher passes it on
                time.sleep(0.01)
        return result

    def work() -> None:
        try:
            fit(run, images, FOUR, TWO)
        except errors.Preempted:
            os._exit(os.EX_TEMPFAIL)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "run_step", told)
        assert exit_code(work) == os.EX_TEMPFAIL
    assert [len(rank) for rank in state(run / "retrieval")["progress"]["pending"]] == [3, 3]
    assert (fit(run, images, FOUR, TWO) / "stage.json").exists()


# The traps of forking from a notebook


def test_an_accelerator_left_over_is_refused(images, run):
    launch.PartialState(cpu=True)
    try:
        with pytest.raises(errors.TrainingError, match="accelerate was already started"):
            fit(run, images, FOUR, TWO)
    finally:
        launch.AcceleratorState._reset_state(reset_partial_state=True)


def test_a_used_gpu_is_refused(images, run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(errors.TrainingError, match="GPU was already used in this process"):
        fit(run, images, FOUR, TWO)


def test_threads_of_forked_processes_are_refused(images, run):
    with pytest.raises(errors.TrainingError, match="threads is 2 with num_processes 2"):
        fit(run, images, FOUR, replace(TWO, threads=2))


@pytest.mark.slow
def test_a_launch_from_a_notebook(images, run):
    # The kernel has computed on several threads before, and draws the curves of what its forked
    # processes write; a text bar arrives in the cell.
    cells = [
        f"import sys\nsys.path.insert(0, {str(TOP / 'tests')!r})\n%matplotlib inline\n"
        "from dataclasses import replace\nfrom pathlib import Path\nimport torch\n"
        "from tests.training_runs import MACHINE, SETTINGS\n"
        "from vitgal.viz import live_curves\n"
        "from vitgal.stages import train as training",
        "torch.set_num_threads(2)\nx = torch.randn(2000, 500)\nprint((x @ x.T).relu().shape)",
        f"folder = training.fit_retrieval(Path({str(run)!r}), replace(SETTINGS, batch_size=2), "
        f"replace(MACHINE, num_processes=2), image_folder=Path({str(images)!r}), "
        "watch=live_curves())",
        "print(len(training.read_log(folder)))",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, kernel_name="python3", timeout=120).execute()
    _, _, fitted, log = notebook.cells
    visible = [output for output in fitted.outputs if output.output_type == "display_data"]
    assert ["image/png" in output.data for output in visible] == [True]
    message = "".join(output.get("text", "") for output in fitted.outputs)
    assert "10/10" in message  # two epochs of five steps
    assert log.outputs[0]["text"] == "2\n"


# The command line


def test_flat_values_become_settings():
    """`ae_` names and shared ones, an int for a float, what other sections own."""
    values = {"epochs": 3, "ae_epochs": 5, "seed": 7, "augment": "fast", "lr": 1, "margin": 0.2}
    values |= {"ae_image_size": 64, "code_dim": 16, "threads": 1, "num_processes": 2, "top": 9}
    assert TrainingSettings.build(values) == TrainingSettings(
        epochs=3, seed=7, augment="fast", lr=1.0, margin=0.2
    )
    assert AutoencoderSettings.build(values) == AutoencoderSettings(
        epochs=5, seed=7, augment="fast", image_size=64, code_dim=16
    )
    assert MachineSettings.build(values) == MachineSettings(threads=1, num_processes=2)


def test_wrong_parameters_are_reported(tmp_path, capsys):
    params = tmp_path / "params.yaml"
    params.write_text("run_dir: x\nepoch: 3\n")
    assert train_command.main([str(params)]) == 2
    assert "epoch; did you mean epochs" in capsys.readouterr().err


def test_a_failure_is_reported(tmp_path, capsys):
    assert train_command.main([str(TOP / "params" / "tiny.yaml"), "--output", str(tmp_path)]) == 1
    assert "01_data_split" in capsys.readouterr().err


def arguments(run: Path, images: Path, **given) -> list[str]:
    """The command line after `python`: params/tiny.yaml on the test's images."""
    values = {"num_processes": 2, "image_folder": images, "batch_size": 2, "image_size": 32}
    values |= {"precision": "fp32", "epochs": 1, "data_workers": 0, "threads": 1} | given
    pairs = [word for name, value in values.items() for word in ("-p", name, str(value))]
    start = ["-m", "vitgal.training", "params/tiny.yaml", "--only", "02", "--output", str(run)]
    return [*start, *pairs]


def launch_command(run: Path, images: Path, *options: str, **given) -> list[str]:
    """The command that trains in launched processes."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", *options]
    return [*launcher, *arguments(run, images, **given)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("told", "number"),
    [("os.getppid()", "SIGTERM"), ("os.getppid()", "SIGHUP"), ("os.getpid()", "SIGTERM")],
)
def test_vitgal_run_ends_with_75(told, number, images, run, scratch):
    """A signal to `vitgal run`, or to the notebook's process alone, while it trains."""
    cell = (
        "import os, signal, sys\nfrom dataclasses import replace\nfrom pathlib import Path\n"
        f"sys.path.insert(0, {str(TOP)!r})\n"
        "from tests.training_runs import MACHINE, SETTINGS, after_step, fit\n"
        f"after_step(2, lambda: os.kill({told}, signal.{number}))\n"
        f"fit(Path({str(run)!r}), Path({str(images)!r}), replace(SETTINGS, epochs=9999), MACHINE)"
    )
    notebook = scratch("02_train.ipynb", "run_dir: str = 'a'", cell)
    command = (
        "import sys; from pathlib import Path; from vitgal.app import command_line, pipeline\n"
        "pipeline.chain = lambda _: [Path(sys.argv[1])]\n"
        "sys.exit(command_line.main(['run', sys.argv[2], '--output', sys.argv[3]]))"
    )
    params = notebook.with_name("params.yaml")
    params.write_text("run_dir: a\n")
    child = started([sys.executable, "-c", command, str(notebook), str(params), str(run)])
    output = child.communicate()[0]
    assert child.returncode == os.EX_TEMPFAIL, output
    assert (run / "retrieval" / "state" / "last.pt").exists(), output
    assert "the state is saved" in output


def started(command: list[str], output: Path | None = None) -> subprocess.Popen:
    """The command begun; what it says goes into a pipe, or into the file `output`."""
    options = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TOP)}
    with contextlib.ExitStack() as stack:
        message = subprocess.PIPE if output is None else stack.enter_context(open(output, "wb"))
        return subprocess.Popen(
            command, cwd=TOP, env=options, stdout=message, stderr=subprocess.STDOUT, text=True
        )


@pytest.mark.slow
def test_two_launches_are_two_nodes(images, run, tmp_path):
    port = str(launch._free_port())
    nodes = ["--num_machines", "2", "--num_processes", "2", "--main_process_ip", "127.0.0.1"]
    nodes += ["--main_process_port", port]
    output = [tmp_path / f"node{rank}.txt" for rank in (0, 1)]  # a full pipe would stop its node
    children = [
        started(launch_command(run, images, *nodes, "--machine_rank", str(rank)), output[rank])
        for rank in (0, 1)
    ]
    codes = [child.wait() for child in children]
    assert codes == [0, 0], [path.read_text() for path in output]
    # the same files, and the same bytes, as two processes forked on one machine
    other = split(tmp_path / "other", images)
    values = {"num_processes": "2", "image_folder": str(images), "batch_size": "2"}
    values |= {"image_size": "32", "precision": "fp32", "epochs": "1", "data_workers": "0"}
    _, settings = train_command.read_notebook_settings(
        TOP / "params" / "tiny.yaml", only="02", overrides=values | {"threads": "1"}
    )
    forked = train_command.train("02", other, settings["02"])
    for name in ("model.safetensors", "failures.json"):
        assert (run / "retrieval" / name).read_bytes() == (forked / name).read_bytes()
    assert rows(run / "retrieval") == rows(forked)


@pytest.mark.slow
def test_launched_processes_hear_why_the_first_cannot_begin(images, run):
    with runs.locked(run / "retrieval"):
        child = started(launch_command(run, images, "--num_machines", "1", "--num_processes", "2"))
        output = child.communicate()[0]
    assert child.returncode != 0
    assert "another process is working in" in output
    assert "the first process cannot begin: another process is working in" in output


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="SyncBatchNorm needs two GPUs")
def test_synchronised_statistics_are_those_of_the_whole_batch(images, run, tmp_path):
    values = {"drop_path": 0.0, "threads": "null"}
    options = ["--num_machines", "1", "--num_processes", "2"]
    two = started(launch_command(run, images, *options, **values))
    assert two.communicate() and two.returncode == 0
    other = split(tmp_path / "other", images)
    whole = arguments(other, images, num_processes=1, batch_size=4, **values)
    single = started([sys.executable, *whole])
    assert single.communicate() and single.returncode == 0
    result, expected = (state(folder / "retrieval")["network"] for folder in (run, other))
    for name, value in expected.items():
        # the running variance's n / (n - 1) counts the whole batch in both
        torch.testing.assert_close(result[name], value, atol=1e-4, rtol=1e-3)
