"""Run folders that somebody else prepared: links, damaged manifests, a foreign repository."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vitgal import runs

OTHER = {"stage.json": "{}", "out.txt": "mine"}


def work(folder: Path, *, overwrite: bool = False, slot=runs.ALONE, inputs=None) -> bool:
    """Runs a stage that writes one file; returns whether it was finished before."""
    with runs.stage(
        folder, "toy", parameters={}, inputs=inputs or {}, overwrite=overwrite, slot=slot
    ) as stage:
        finished = stage.finished
        if not finished:
            runs.write_text(folder / "out.txt", "text")
            stage.finish(["out.txt"])
    return finished


@pytest.fixture
def other(tmp_path) -> Path:
    """Another run's stage; nothing may touch it."""
    folder = tmp_path / "other"
    folder.mkdir()
    for name, text in OTHER.items():
        (folder / name).write_text(text)
    yield folder
    assert {path.name: path.read_text() for path in folder.iterdir()} == OTHER


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "link", ["mini/s", "mini", "mini/s/.lock", "mini/s/a.partial", "mini/s/log", "mini/s/07.ipynb"]
)
def test_a_planted_link_is_refused(link, overwrite, other, tmp_path):
    path = tmp_path / "run" / link
    path.parent.mkdir(parents=True)
    path.symlink_to(other if link in ("mini/s", "mini") else other / "out.txt")
    with pytest.raises(runs.PathError, match=rf"{path.name} is a link to {other}.*move it away"):
        work(tmp_path / "run" / "mini" / "s", overwrite=overwrite)


@pytest.mark.parametrize("name", [".lock-of-2", ".lock-of-2-0", ".lock-look"])
def test_a_planted_lock_of_a_worker_is_refused(name, other, tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / name).symlink_to(other / "out.txt")
    with pytest.raises(runs.PathError, match=f"{name} is a link"):
        work(tmp_path / "s", slot=runs.WorkerSlot(0, 2))


def test_locks_are_not_emptied(tmp_path):
    """A lock may be a hard link to another file."""
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "s").mkdir()
    os.link(tmp_path / "mine", tmp_path / "s" / ".lock")
    work(tmp_path / "s")
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_named_pipe_in_place_of_a_lock_does_not_wait(tmp_path):
    (tmp_path / "s").mkdir()
    os.mkfifo(tmp_path / "s" / ".lock")
    os.mkfifo(tmp_path / "s" / "stage.json")
    with pytest.raises(runs.StageError):
        work(tmp_path / "s")


def test_a_link_deep_in_an_unfinished_stage_is_refused(other, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with runs.stage(tmp_path / "s", "toy", parameters={}, inputs={}):
            raise KeyboardInterrupt
    (tmp_path / "s" / "shard-00").mkdir()
    (tmp_path / "s" / "shard-00" / "rows.npy").symlink_to(other / "out.txt")
    with pytest.raises(runs.PathError, match=r"shard-00/rows\.npy is a link"):
        work(tmp_path / "s")
    shutil.rmtree(tmp_path / "s" / "shard-00")
    (tmp_path / "s" / "shard-00").symlink_to(other)
    with pytest.raises(runs.PathError, match="shard-00 is a link"):
        work(tmp_path / "s")


def test_a_run_may_be_a_link(tmp_path, monkeypatch):
    monkeypatch.setenv("VITGAL_RUNS", str(tmp_path / "runs"))
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "a").symlink_to(tmp_path / "disk")
    assert not work(runs.run_folder("a") / "s")
    assert (tmp_path / "disk" / "s" / "out.txt").read_text() == "text"


def changed(*path, value):
    """Returns a function that replaces one entry of a manifest, or removes it (value ...)."""

    def change(manifest):
        for key in path[:-1]:
            manifest = manifest[key]
        manifest[path[-1]] = value
        if value is ...:
            del manifest[path[-1]]

    return change


DAMAGED = {
    "no outputs": changed("outputs", value=...),
    "outputs is a list": changed("outputs", value=[]),
    "an output is a text": changed("outputs", "out.txt", value="x"),
    "an output without bytes": changed("outputs", "out.txt", value={}),
    "bytes is a text": changed("outputs", "out.txt", "bytes", value="4"),
    "bytes is true": changed("outputs", "out.txt", "bytes", value=True),
    "sha256 is a number": changed("outputs", "out.txt", "sha256", value=1),
    "recorded is null": changed("recorded", value=None),
    "no recorded": changed("recorded", value=...),
    "versions is a list": changed("recorded", "versions", value=["numpy"]),
    "a version is a list": changed("recorded", "versions", "numpy", value=[1]),
    "stamps is a text": changed("recorded", "stamps", value="x"),
    "a stamp is null": changed("recorded", "stamps", value={"table": None}),
    "a path is a list": changed("recorded", "weights", value=["x"]),
    "no stage": changed("stage", value=...),
    "format is a text": changed("format", value="1"),
    "parameters is a list": changed("parameters", value=[]),
    "inputs is null": changed("inputs", value=None),
    "an input is a number": changed("inputs", "table", value=7),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_manifest_is_refused_with_its_name(case, tmp_path):
    work(tmp_path / "s", inputs={"table": "abc"})
    manifest = runs.read_json(tmp_path / "s" / "stage.json")
    DAMAGED[case](manifest)
    runs.write_json(tmp_path / "s" / "stage.json", manifest)
    for read in (
        lambda: work(tmp_path / "s", inputs={"table": "abc"}),
        lambda: runs.read_stage(tmp_path / "s", "04"),
        lambda: runs.output_fingerprint(tmp_path / "s", "out.txt", "04"),
    ):
        with pytest.raises(runs.StageError, match=r"stage\.json is damaged.*overwrite: true"):
            read()
    assert not work(tmp_path / "s", inputs={"table": "abc"}, overwrite=True)


@pytest.mark.parametrize(
    "content", ["[]", "null", "1", "{", "[" * 100_000, "1" * 5000, '{"format": 1e400}', "\udc80"]
)
@pytest.mark.parametrize("name", ["stage.json", "started.json"])
def test_other_json_is_refused_as_a_manifest(name, content, tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / name).write_bytes(content.encode(errors="surrogateescape"))
    (tmp_path / "s" / "half.txt").touch()
    with pytest.raises(runs.StageError, match=rf"{name} is (damaged|not complete JSON)"):
        work(tmp_path / "s")
    assert not work(tmp_path / "s", overwrite=True)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret"])
def test_an_output_outside_the_folder_is_refused(name, tmp_path):
    (tmp_path / "secret").write_text("text")
    work(tmp_path / "s")
    manifest = runs.read_json(tmp_path / "s" / "stage.json")
    manifest["outputs"] = {name: manifest["outputs"]["out.txt"]}
    runs.write_json(tmp_path / "s" / "stage.json", manifest)
    with pytest.raises(runs.PathError, match="is not the path of a file inside"):
        work(tmp_path / "s")


@pytest.mark.usefixtures("plain_environment")
def test_a_manifest_cannot_write_to_the_terminal(tmp_path):
    work(tmp_path / "s")
    manifest = runs.read_json(tmp_path / "s" / "stage.json")
    manifest["parameters"] = {f"\x1b[2J{n}": {"\u202ekey\n": "x" * 1000} for n in range(5000)}
    runs.write_json(tmp_path / "s" / "stage.json", manifest)
    with pytest.raises(runs.StageError, match="and 4980 more") as error:
        work(tmp_path / "s")
    lines = str(error.value).split("\n")
    assert len(lines) == 23 and all(line.isprintable() for line in lines)
    assert len(str(error.value)) < 5000


GIT = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]


def git(folder: Path, *command: str) -> str:
    """Runs git in a folder, as without the variables of a surrounding call."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run([*GIT, *command], cwd=folder, env=clean, capture_output=True, check=True)
    return done.stdout.decode().strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_foreign_repository_is_not_recorded(tmp_path):
    """Neither one that git's variables name, nor one around a package without its own."""
    outer = tmp_path / "outer"
    package = outer / "site" / "vitgal"
    shutil.copytree(Path(runs.__file__).parent, package / "runs")
    (package / "__init__.py").touch()
    git(tmp_path, "init", str(outer))
    git(outer, "add", ".")
    git(outer, "commit", "-m", "foreign")
    head = git(outer, "rev-parse", "HEAD")
    code = "from vitgal import runs; print(runs.commit())"

    def commit(folder: Path, **variables: str) -> str:
        """What a process records whose package is in a folder."""
        child = subprocess.run(
            [sys.executable, "-c", code],
            cwd=outer,
            env=os.environ | variables | {"PYTHONPATH": str(folder)},
            capture_output=True,
            text=True,
        )
        assert child.returncode == 0, child.stderr
        return child.stdout.strip()

    foreign = {"GIT_DIR": str(outer / ".git"), "GIT_WORK_TREE": str(outer)}
    assert commit(outer / "site") == "None"
    assert commit(outer / "site", **foreign) == "None"
    own = commit(runs.checkout())
    assert own != head and commit(runs.checkout(), **foreign) == own
    index = {"GIT_INDEX_FILE": str(tmp_path / "none"), "GIT_OBJECT_DIRECTORY": str(tmp_path)}
    assert commit(runs.checkout(), **index) == own
    # A repository of the package's own is recorded, with a plus where it was changed.
    git(tmp_path, "init", str(outer / "site"))
    git(outer / "site", "add", ".")
    git(outer / "site", "commit", "-m", "own")
    inner = git(outer / "site", "rev-parse", "HEAD")
    assert commit(outer / "site", **foreign) == inner
    (package / "__init__.py").write_text("# changed\n")
    assert commit(outer / "site", **foreign) == f"{inner}+"
