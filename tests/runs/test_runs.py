"""Run folders: reuse, resumption and refusal of stages; kills and full disks."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vitgal import runs
from vitgal.runs import manifest, paths, stage_folder
from vitgal.runs.errors import StageError

INPUTS = {"table": "abc"}


def work(folder: Path, *, text: str = "text", overwrite: bool = False, **parameters) -> bool:
    """Runs a stage that writes one file; returns whether it was finished before."""
    with runs.stage(
        folder, "toy", parameters=parameters, inputs=INPUTS, overwrite=overwrite
    ) as stage:
        finished = stage.finished
        if not finished:
            runs.write_text(folder / "out.txt", text)
            stage.finish(["out.txt"], {"images": 3})
    return finished


def interrupt(folder: Path, **parameters) -> None:
    """Interrupts the same stage between its file and its end."""
    with pytest.raises(KeyboardInterrupt):
        with runs.stage(folder, "toy", parameters=parameters, inputs=INPUTS):
            runs.write_text(folder / "out.txt", "half")
            raise KeyboardInterrupt


# Paths


def test_run_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("VITGAL_RUNS")
    assert runs.run_folder("a") == runs.checkout() / "runs" / "a"
    assert runs.run_folder(tmp_path) == tmp_path
    monkeypatch.setenv("VITGAL_RUNS", str(tmp_path))
    assert runs.run_folder("a/b") == tmp_path / "a" / "b"
    assert runs.run_folder("/elsewhere") == Path("/elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert runs.run_folder("~/a") == tmp_path / "home" / "a"


def test_run_folder_does_not_depend_on_the_current_folder(tmp_path, monkeypatch):
    # The command line runs where the user is, a notebook in notebooks/: one variable, one folder.
    monkeypatch.setenv("VITGAL_RUNS", "elsewhere")
    here = runs.run_folder("a")
    monkeypatch.chdir(tmp_path)
    assert runs.run_folder("a") == here


def test_resolve(tmp_path):
    assert runs.resolve("data/x") == runs.checkout() / "data" / "x"
    assert runs.resolve(tmp_path) == tmp_path


# Writing


def test_atomic_leaves_the_old_file_on_failure(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    assert runs.write_text(path, "old") == path
    with pytest.raises(ZeroDivisionError):
        with runs.atomic(path) as temporary:
            temporary.write_text("new")
            raise ZeroDivisionError
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["a.txt"]


def test_atomic_without_a_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        with runs.atomic(tmp_path / "a"):
            pass


def test_a_full_disk_leaves_the_old_array(tmp_path):
    path = runs.write_array(tmp_path / "a.npy", np.arange(3))
    before = path.read_bytes()
    code = (
        "import sys, resource, signal, numpy as np; from pathlib import Path\n"
        "from vitgal import runs\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "runs.write_array(Path(sys.argv[1]), np.zeros(10_000))\n"
    )
    child = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert child.returncode == 1
    assert "no space left to write a.npy; make room and run the same command again" in child.stderr
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.npy"]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 256 KiB, and a function that enlarges it; skipped where mounting is refused."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> subprocess.CompletedProcess:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        return subprocess.run(command, capture_output=True, text=True)

    if shutil.which("mount") is None or mount("size=256k").returncode:
        pytest.skip("mounting a small disk is not allowed here")
    try:
        yield folder, lambda: mount("remount,size=8m")
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_stage_on_a_full_disk_keeps_complete_files_and_goes_on(small_disk):
    folder, make_room = small_disk
    parts = {f"{i}.npy": np.full(8000, i) for i in range(6)}  # 64 kB each: three or four fit

    def work() -> list[str]:
        """Writes the missing parts; returns their names."""
        with runs.stage(folder / "s", "s", parameters={}, inputs={}) as stage:
            missing = [name for name in parts if not (stage.folder / name).exists()]
            for name in missing:
                runs.write_array(stage.folder / name, parts[name])
            stage.finish(list(parts))
        return missing

    with pytest.raises(OSError, match=r"no space left to write \d\.npy; make room"):
        work()
    complete = sorted(path.name for path in (folder / "s").glob("*.npy"))
    assert complete == list(parts)[: len(complete)] and 0 < len(complete) < 6
    assert not list((folder / "s").glob(".tmp-*")) and not (folder / "s" / runs.MANIFEST).exists()
    assert make_room().returncode == 0
    assert work() == list(parts)[len(complete) :]
    for name, array in parts.items():
        assert (np.load(folder / "s" / name) == array).all()


def test_arrays_are_the_same_bytes_every_time(tmp_path):
    arrays = {"x": np.arange(5), "y": np.eye(2, dtype=np.float32)}
    first = runs.write_arrays(tmp_path / "a.npz", arrays).read_bytes()
    assert runs.write_arrays(tmp_path / "b.npz", arrays).read_bytes() == first
    with np.load(tmp_path / "a.npz") as stored:
        np.testing.assert_array_equal(stored["y"], arrays["y"])


def test_plain():
    value = {
        1: np.arange(2),
        "nan": [np.float32("nan"), float("inf"), 0.5],
        "path": Path("a/b"),
        "flag": np.bool_(True),
        "pair": (1, np.int64(2)),
    }
    assert runs.plain(value) == {
        "1": [0, 1],
        "nan": [None, None, 0.5],
        "path": "a/b",
        "flag": True,
        "pair": [1, 2],
    }
    assert runs.plain({}) == {}


def test_read_json_reports_the_fault(tmp_path):
    path = runs.write_json(tmp_path / "a.json", {"a": float("nan"), "é": [1]})
    assert runs.read_json(path) == {"a": None, "é": [1]}
    with pytest.raises(StageError, match="none.json is missing"):
        runs.read_json(tmp_path / "none.json")
    for torn in (b'{"a": ', b"", b"\xff"):
        path.write_bytes(torn)
        with pytest.raises(StageError, match="a.json is not complete JSON"):
            runs.read_json(path)


# Fingerprints


def test_fingerprints_are_of_content(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    # sha256 of "abc" is FIPS 180's first example.
    existing = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert runs.fingerprint_file(tmp_path / "a") == existing
    assert runs.fingerprint({"a": 1, "b": [2]}) == runs.fingerprint({"b": (2,), "a": 1})
    assert runs.fingerprint([1, 2]) != runs.fingerprint([2, 1])
    assert runs.fingerprint("1") != runs.fingerprint(1)


@pytest.mark.parametrize("size", [0, 10, 4096, 5000, 100_000])
def test_fingerprint_images_sees_size_and_ends(tmp_path, size):
    path = tmp_path / "a.jpg"

    def of(content: bytes, name: str = "a") -> str:
        path.write_bytes(content)
        return runs.fingerprint_images([name], [path])

    content = bytes(size)
    first = of(content)
    assert of(content) == first
    assert of(content, "b") != first
    assert of(content + b"\0") != first
    if size:
        assert of(b"\1" + content[1:]) != first
        assert of(content[:-1] + b"\1") != first


def test_fingerprint_images_of_none_and_of_a_missing_one(tmp_path):
    assert len(runs.fingerprint_images([], [])) == 64
    with pytest.raises(FileNotFoundError, match="gone.jpg"):
        runs.fingerprint_images(["a"], [tmp_path / "gone.jpg"])
    (tmp_path / "a").touch()
    with pytest.raises(ValueError):
        runs.fingerprint_images(["a", "b"], [tmp_path / "a"])


# Stages


def test_a_finished_stage_is_reused(tmp_path):
    assert not work(tmp_path / "s", size=3)
    manifest = (tmp_path / "s" / "stage.json").read_bytes()
    assert work(tmp_path / "s", size=3, text="never written")
    assert (tmp_path / "s" / "out.txt").read_text() == "text"
    assert (tmp_path / "s" / "stage.json").read_bytes() == manifest
    assert sorted(os.listdir(tmp_path / "s")) == [".lock", "out.txt", "stage.json"]


@pytest.mark.usefixtures("plain_environment")
def test_the_manifest_holds_settings_and_outputs(tmp_path):
    work(tmp_path / "s", size=np.int64(3), scales=(1.0, 0.5))
    recorded = runs.read_stage(tmp_path / "s", "04")
    assert recorded["parameters"] == {"size": 3, "scales": [1.0, 0.5]}
    assert recorded["inputs"] == INPUTS
    assert (recorded["stage"], recorded["format"]) == ("toy", runs.STAGE_FORMAT)
    assert recorded["outputs"]["out.txt"]["bytes"] == 4
    sha = runs.fingerprint_file(tmp_path / "s" / "out.txt")
    assert recorded["outputs"]["out.txt"]["sha256"] == sha
    assert runs.output_fingerprint(tmp_path / "s", "out.txt", "04") == sha
    assert recorded["recorded"]["images"] == 3
    assert recorded["recorded"]["versions"]["numpy"] == np.__version__
    with pytest.raises(StageError, match=r"has no other.txt: run 04 again"):
        runs.output_fingerprint(tmp_path / "s", "other.txt", "04")


def test_an_interrupted_stage_goes_on_with_its_files(tmp_path):
    interrupt(tmp_path, size=3)
    assert sorted(os.listdir(tmp_path)) == [".lock", "out.txt", "started.json"]
    with pytest.raises(StageError, match="was interrupted: run 02 first"):
        runs.read_stage(tmp_path, "02")
    with runs.stage(tmp_path, "toy", parameters={"size": 3}, inputs=INPUTS) as stage:
        assert not stage.finished
        assert (tmp_path / "out.txt").read_text() == "half"


@pytest.mark.parametrize("prepare", [work, interrupt])
def test_other_settings_are_refused_and_named(tmp_path, prepare):
    prepare(tmp_path, size=3, rate=0.5, same=None)
    with pytest.raises(StageError) as error:
        work(tmp_path, size=4, rate=0.5, extra="x")
    lines = str(error.value).splitlines()
    assert lines[1:3] == [
        '  parameters.extra: null there, "x" now',
        "  parameters.size: 3 there, 4 now",
    ]
    assert "overwrite: true" in lines[-1]
    assert (tmp_path / "out.txt").exists()


@pytest.mark.usefixtures("plain_environment")
def test_a_stage_without_outputs_accepts_other_settings(tmp_path):
    # Weights of another architecture, for example, are noticed once the stage has begun.
    with pytest.raises(ZeroDivisionError):
        with runs.stage(tmp_path, "toy", parameters={"size": 3}, inputs=INPUTS):
            raise ZeroDivisionError
    assert sorted(os.listdir(tmp_path)) == [".lock", "started.json"]
    with pytest.raises(StageError, match="other settings"):  # another worker may be about to write
        with runs.stage(tmp_path, "toy", parameters={}, inputs=INPUTS, slot=runs.WorkerSlot(0, 2)):
            pass
    assert not work(tmp_path, size=4)
    assert runs.read_stage(tmp_path, "04")["parameters"] == {"size": 4}


def test_workers_that_reopen_a_stage_together(tmp_path):
    """Each sees a finished stage, and the first one turns it into an interrupted one."""
    work(tmp_path)
    settings = runs.read_json(tmp_path / runs.MANIFEST)
    first, second = (runs.Stage(tmp_path, "toy", True, settings) for _ in range(2))
    first.reopen()
    second.reopen()
    assert not first.finished and not second.finished
    assert (tmp_path / runs.STARTED).exists() and not (tmp_path / runs.MANIFEST).exists()


@pytest.mark.slow
def test_locks_of_an_earlier_number_of_workers_block_no_one(tmp_path):
    """Twenty workers check the lock that three workers left, all at once."""
    with runs.locked(tmp_path, runs.WorkerSlot(0, 3)):
        pass
    code = (
        "import sys; from pathlib import Path; from vitgal import runs; input()\n"
        f"with runs.locked(Path({str(tmp_path)!r}), runs.WorkerSlot(int(sys.argv[1]), 20)):\n"
        "    print('in', flush=True); input()"
    )
    start = [sys.executable, "-c", code]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    workers = [subprocess.Popen([*start, str(number)], **pipes) for number in range(20)]
    for line in ("in\n", ""):  # all enter, all leave
        for worker in workers:
            worker.stdin.write("\n")
            worker.stdin.flush()
        assert [worker.stdout.readline() for worker in workers] == 20 * [line]
    assert [worker.wait() for worker in workers] == 20 * [0]
    with runs.locked(tmp_path, runs.WorkerSlot(1, 20)):
        with pytest.raises(StageError, match="another process .* .not as one of 3"):
            with runs.locked(tmp_path, runs.WorkerSlot(0, 3)):
                pass


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def flock(handle, kind):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(StageError, match="cannot be locked .Function not impl.*must support flock"):
        work(tmp_path)


def test_other_inputs_stage_and_format_are_refused(tmp_path, monkeypatch):
    work(tmp_path)
    for name, inputs, word in (
        ("toy", {"table": "xyz"}, "inputs.table"),
        ("other", INPUTS, "stage: "),
    ):
        with pytest.raises(StageError, match=word):
            with runs.stage(tmp_path, name, parameters={}, inputs=inputs):
                pass
    monkeypatch.setattr(stage_folder, "STAGE_FORMAT", runs.STAGE_FORMAT + 1)
    with pytest.raises(StageError, match="format: 1 there, 2 now"):
        work(tmp_path)


def test_overwrite_starts_anew(tmp_path):
    work(tmp_path, size=3)
    (tmp_path / "shard-00").mkdir()
    (tmp_path / "shard-00" / "a.npy").write_bytes(b"")
    assert not work(tmp_path, size=4, overwrite=True, text="again")
    assert (tmp_path / "out.txt").read_text() == "again"
    assert not (tmp_path / "shard-00").exists()
    interrupt(tmp_path / "half", size=3)
    assert not work(tmp_path / "half", size=4, overwrite=True)


def test_overwrite_keeps_files_that_no_stage_wrote(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(StageError, match="holds files but no stage"):
        work(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("damage", ["other", "text and more", None])
def test_a_changed_output_is_no_finished_stage(tmp_path, damage):
    work(tmp_path)
    if damage is None:
        (tmp_path / "out.txt").unlink()
    else:
        (tmp_path / "out.txt").write_text(damage[:4] if damage == "other" else damage)
    with pytest.raises(StageError, match=r"out.txt is missing or not as the stage left it"):
        work(tmp_path)
    assert not work(tmp_path, overwrite=True)


def test_a_changed_version_is_one_warning(tmp_path):
    work(tmp_path)
    manifest = runs.read_json(tmp_path / runs.MANIFEST)
    manifest["recorded"]["versions"]["numpy"] = "0.1"
    runs.write_json(tmp_path / runs.MANIFEST, manifest)
    now = runs.versions()["numpy"]
    with pytest.warns(UserWarning, match=f"numpy 0.1 then, {now} now") as record:
        assert work(tmp_path)
    assert len(record) == 1


def test_one_process_at_a_time(tmp_path):
    with runs.locked(tmp_path / "s"):
        with pytest.raises(StageError, match="another process is working"):
            work(tmp_path / "s")
    assert not work(tmp_path / "s")


def test_a_killed_process_frees_the_folder_and_its_temporary_files_go(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from vitgal import runs\n"
        "folder = Path(sys.argv[1])\n"
        "with runs.stage(folder, 'toy', parameters={}, inputs={'table': 'abc'}):\n"
        "    with runs.atomic(folder / 'deep' / 'out.txt') as temporary:\n"
        "        temporary.write_text('half')\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    child = subprocess.run([sys.executable, "-c", code, tmp_path])
    assert child.returncode == -signal.SIGKILL
    assert [path.name.startswith(runs.TEMPORARY) for path in (tmp_path / "deep").iterdir()] == [
        True
    ]
    assert not work(tmp_path)
    assert os.listdir(tmp_path / "deep") == []


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StageError, match="cannot write to the run folder .*VITGAL_RUNS"):
        work(tmp_path / "file" / "s")


@pytest.fixture
def ordinary_user():
    """Drops the rights of root for the test, since root may write everywhere."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield
    if root:
        os.seteuid(0)


def test_a_folder_without_permission(tmp_path, ordinary_user):
    if os.getuid():  # the user of the fixture has no access in any case
        tmp_path.chmod(0o500)
    with pytest.raises(
        StageError, match=r"cannot write to the run folder .*Permission denied.*give"
    ):
        work(tmp_path / "s")


def test_a_stage_that_never_ran(tmp_path):
    with pytest.raises(StageError, match="has not been run: run 04_global_evaluation first"):
        runs.read_stage(tmp_path / "global", "04_global_evaluation")


def test_files_without_settings_are_not_continued(tmp_path):
    # A user who deletes a damaged stage.json leaves files of unknown settings, which must not
    # become part of a stage with other settings.
    work(tmp_path, size=3)
    (tmp_path / "stage.json").unlink()
    with pytest.raises(StageError):
        work(tmp_path, size=4)


def test_a_kill_before_the_first_file_does_not_block_overwrite(tmp_path):
    (tmp_path / f"{runs.TEMPORARY}1-started.json").write_text("{")
    assert not work(tmp_path, overwrite=True)


def test_a_temporary_folder_is_swept(tmp_path):
    interrupt(tmp_path)
    (tmp_path / f"{runs.TEMPORARY}1-shard" / f"{runs.TEMPORARY}1-a.npy").mkdir(parents=True)
    assert not work(tmp_path)


def test_outputs_too_large_to_hash_still_differ(tmp_path, monkeypatch):
    # database.npy of a million images is larger than the limit and equally long for every model.
    monkeypatch.setattr(manifest, "HASH_LIMIT", 1)
    work(tmp_path / "a", model="s12", text="aaaa")
    work(tmp_path / "b", model="s24", text="bbbb")
    fingerprints = {runs.output_fingerprint(tmp_path / name, "out.txt", "04") for name in "ab"}
    assert len(fingerprints) == 2


def test_differences_distinguish_true_from_one():
    assert runs.differences({"a": 1}, {"a": 1.0}) == []  # as JSON may give it back
    assert runs.differences({"a": 1}, {"a": True}) == ["a: 1 there, true now"]


# The model of a run


def test_a_run_without_training_takes_the_small_model(tmp_path, capsys):
    small = runs.checkout() / runs.SMALL_WEIGHTS
    assert runs.model_file(tmp_path / "fresh", None) == small
    assert not runs.has_trained(tmp_path / "fresh")
    assert capsys.readouterr().out == (
        f"nothing has been trained in fresh: the model is the small {runs.SMALL_WEIGHTS}\n"
    )
    assert runs.model_file(tmp_path / "fresh", "data/x.pth") == runs.checkout() / "data" / "x.pth"
    assert capsys.readouterr().out == ""


def test_a_run_with_a_model_takes_that_model(tmp_path, capsys):
    work(tmp_path / "autoencoder")
    assert runs.model_file(tmp_path, None) == tmp_path / "autoencoder" / "model.safetensors"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("stage", ["retrieval", "autoencoder"])
def test_a_run_with_an_interrupted_training_has_no_model(stage, tmp_path):
    interrupt(tmp_path / stage)
    assert runs.has_trained(tmp_path)
    with pytest.raises(StageError, match="run notebook 03_train_autoencoder"):
        runs.model_file(tmp_path, None)


def test_a_checkout_without_the_small_model_needs_training(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "SMALL_WEIGHTS", "weights/none.safetensors")
    with pytest.raises(StageError, match="has not been run: run notebook 03"):
        runs.model_file(tmp_path, None)


def test_commit_is_a_hash_or_none():
    commit = runs.commit()
    assert commit is None or len(commit.rstrip("+")) == 40


@pytest.mark.usefixtures("plain_environment")
def test_the_manifest_is_plain_json(tmp_path):
    work(tmp_path, rate=np.float64("nan"))
    assert json.loads((tmp_path / "stage.json").read_text())["parameters"] == {"rate": None}


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be", "latin-1"]
)
def test_lines_of_a_text_are_read_by_its_byte_order_mark_or_refused(tmp_path, encoding):
    path = tmp_path / "names.txt"
    path.write_bytes(
        "été\r\n\r\na\x0bb\u2028c.jpg\n".replace(
            "\u2028", "" if encoding == "latin-1" else "\u2028"
        ).encode(encoding)
    )
    if encoding in ("utf-16-le", "utf-16-be", "latin-1"):  # without a mark
        with pytest.raises(ValueError, match="names.txt is no text in UTF-8.*save it as UTF-8"):
            runs.read_lines(path)
    else:
        assert runs.read_lines(path) == ["été", "", "a\x0bb\u2028c.jpg"]


def test_a_text_without_lines(tmp_path):
    for data in (b"", b"\n", b"\xef\xbb\xbf"):
        (tmp_path / "names.txt").write_bytes(data)
        assert runs.read_lines(tmp_path / "names.txt") == []
