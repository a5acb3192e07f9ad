"""A wheel built from the checkout and used in an empty folder, without the checkout."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

from vitgal import runs
from vitgal.app.layout import lay_out

TOP = Path(__file__).resolve().parents[2]
VERSION = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]["version"]


def call(*command, cwd, status=0, **environment):
    """Runs a command without the checkout on Python's path; returns what it printed."""
    hidden = ("PYTHONPATH", "VITGAL_RUNS")
    variables = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        list(map(str, command)),
        **{"cwd": cwd, "env": variables | environment, "capture_output": True, "text": True},
    )
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def tracked():
    listed = call("git", "ls-files", "-z", cwd=TOP).split("\0")
    return sorted(name for name in listed if name and (TOP / name).is_file())


@pytest.fixture(scope="module")
def built(tmp_path_factory, tracked):
    """The folder of wheel and sources that `python -m build` makes."""
    source, dist = (tmp_path_factory.mktemp(name) for name in ("source", "dist"))
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(TOP / name, source / name)
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, ".", cwd=source)
    return dist


@pytest.fixture(scope="module")
def installed(tmp_path_factory, built):
    """The `vitgal` command of a new environment that has this one's dependencies."""
    folder = tmp_path_factory.mktemp("environment")
    call(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "host.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python"]
    (wheel,) = built.glob("*.whl")
    call(*pip, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    return folder / "bin" / "vitgal"


@pytest.mark.slow
def test_the_wheel_holds_every_tracked_file_of_notebooks_params_weights_and_sources(built, tracked):
    call(sys.executable, "-m", "twine", "check", "--strict", *built.iterdir(), cwd=built)
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = {name for name in wheel.namelist() if not name.endswith("/")}
        parts = {name for name in tracked if name.split("/")[0] in runs.PARTS}
        brought = {name.removeprefix("vitgal/project/") for name in names if "/project/" in name}
        assert brought == parts and len(parts) > 100
        for name in parts:
            assert wheel.read(f"vitgal/project/{name}") == (TOP / name).read_bytes()
        package = {name for name in tracked if name.startswith("vitgal/")}
        assert package <= names and "vitgal/py.typed" in names
        (licence,) = (name for name in names if name.endswith("licenses/LICENSE"))
        assert wheel.read(licence) == (TOP / "LICENSE").read_bytes()
    assert path.stat().st_size < 25_000_000


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_folder(installed, tmp_path):
    assert "vitgal_s12" in call(installed, "download", "--list", cwd=tmp_path)
    photographs = TOP / "third_party" / "landmarks" / "eiffel_tower"
    query = sorted(path.name for path in photographs.glob("*.jpg"))[0]
    call(installed, "own", photographs, "--query", query, cwd=tmp_path)
    assert len((tmp_path / "runs" / "demo" / "own" / "ranking.csv").read_text().splitlines()) == 3
    # From a folder below the one that was laid out: runs lie beside its notebooks.
    work = tmp_path / "work"
    call(installed, "notebooks", "work", cwd=tmp_path)
    assert (work / "notebooks" / "08_own_photos.ipynb").is_file()
    call(installed, "run", "tiny.yaml", "--only", "01", cwd=work / "params")
    assert (work / "runs" / "tiny" / "split" / "train.csv").is_file()
    # One that has lost its data says so in a sentence.
    (project,) = installed.parents[1].glob("lib/python*/site-packages/vitgal/project")
    shutil.rmtree(project)
    message = call(installed, "download", "--list", cwd=tmp_path, status=1)
    assert re.fullmatch(
        "vitgal: .* lacks vitgal's notebooks and params: install the wheel again.*\n", message
    )


def test_one_version_stands_in_every_place():
    assert f"\nversion: {VERSION}\n" in (TOP / "CITATION.cff").read_text()
    assert re.search(r"^## (\S+)", (TOP / "CHANGELOG.md").read_text(), re.M)[1] == VERSION
    assert re.search(r"^FOLDERS = \((.*)\)", (TOP / "setup.py").read_text(), re.M)[1] == (
        ", ".join(f'"{part}"' for part in runs.PARTS)
    )


def test_laid_out_notebooks_keep_a_users_changes(tmp_path):
    assert lay_out(tmp_path) == []
    for name in ("notebooks/06_rerank.ipynb", "params/demo.yaml", "params/machines/gpu.yaml"):
        assert (tmp_path / name).read_bytes() == (TOP / name).read_bytes()
    changed = tmp_path / "params" / "demo.yaml"
    changed.write_text("seed: 1\n")
    (tmp_path / "params" / "tiny.yaml").unlink()
    assert lay_out(tmp_path) == [changed]
    assert changed.read_text() == "seed: 1\n" and (tmp_path / "params" / "tiny.yaml").is_file()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        lay_out(tmp_path / "file")
