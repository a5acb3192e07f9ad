"""Inputs of a stage: what is read, and when, to find out whether a finished stage still holds."""

import builtins
import os
from pathlib import Path

import pytest

from vitgal import runs

NAMES = ["a", "b"]


@pytest.fixture
def files(tmp_path) -> Path:
    """A folder with a weight file and two images."""
    folder = tmp_path / "files"
    folder.mkdir()
    for name in ("weights", *NAMES):
        (folder / name).write_bytes(name.encode() * 5000)
    return folder


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """The names of the files that have been opened so far."""
    names: list[str] = []
    real = builtins.open

    def counting(file, *arguments, **options):
        names.append(os.path.basename(file) if isinstance(file, (str, os.PathLike)) else "")
        return real(file, *arguments, **options)

    monkeypatch.setattr(builtins, "open", counting)
    return names


def inputs(files: Path, label: str = "x") -> dict:
    images = runs.images_input(NAMES, [files / name for name in NAMES])
    return {
        "weights": runs.file_input(files / "weights"),
        "images": runs.combined_input([images], lambda images: [images, label]),
        "table": "abc",
    }


def work(folder: Path, inputs: dict, *, overwrite: bool = False) -> bool:
    """Runs a stage that writes one file; returns whether it was finished before."""
    with runs.stage(folder, "toy", parameters={}, inputs=inputs, overwrite=overwrite) as stage:
        finished = stage.finished
        if not finished:
            runs.write_text(folder / "out.txt", "text")
            stage.finish(["out.txt"])
    return finished


def touch(path: Path) -> None:
    """Gives a file a time of change one second later."""
    times = path.stat()
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 10**9))


def test_the_manifest_has_fingerprints_of_the_content(tmp_path, files):
    work(tmp_path / "s", inputs(files))
    images = runs.fingerprint_images(NAMES, [files / name for name in NAMES])
    wanted = {
        "weights": runs.fingerprint_file(files / "weights"),
        "images": runs.fingerprint([images, "x"]),
        "table": "abc",
    }
    manifest = runs.read_stage(tmp_path / "s", "04")
    assert manifest["inputs"] == wanted == runs.input_fingerprints(inputs(files))
    assert manifest["recorded"]["stamps"].keys() == {"weights", "images"}
    # Whoever passes fingerprints in place of files gets the same stage.
    assert work(tmp_path / "s", wanted)


def test_a_reused_stage_reads_no_input(tmp_path, files, opened):
    work(tmp_path / "s", inputs(files))
    assert {"weights", *NAMES} <= set(opened)
    opened.clear()
    assert work(tmp_path / "s", inputs(files))
    assert opened and not {"weights", *NAMES} & set(opened)


@pytest.mark.parametrize("name", ["weights", "a"])
def test_a_changed_file_is_noticed(tmp_path, files, name):
    work(tmp_path / "s", inputs(files))
    content = (files / name).read_bytes()
    (files / name).write_bytes(b"z" + content[1:])
    touch(files / name)
    with pytest.raises(runs.StageError, match="weights" if name == "weights" else "images"):
        work(tmp_path / "s", inputs(files))
    (files / name).write_bytes(content)
    assert work(tmp_path / "s", inputs(files))
    assert not work(tmp_path / "s", inputs(files, "y"), overwrite=True)


def test_an_old_date_does_not_hide_a_change(tmp_path, files):
    work(tmp_path / "s", inputs(files))
    before = (files / "a").stat()
    (files / "a").write_bytes(b"z" * before.st_size)
    os.utime(files / "a", ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(runs.StageError, match="images"):
        work(tmp_path / "s", inputs(files))


def test_other_values_beside_the_files_are_noticed(tmp_path, files):
    work(tmp_path / "s", inputs(files))
    with pytest.raises(runs.StageError, match="images"):
        work(tmp_path / "s", inputs(files, "y"))


def test_a_touched_or_copied_file_is_accepted(tmp_path, files, opened):
    work(tmp_path / "s", inputs(files))
    touch(files / "a")
    opened.clear()
    assert work(tmp_path / "s", inputs(files))
    assert "a" in opened and "weights" not in opened
    files.rename(tmp_path / "elsewhere")
    assert work(tmp_path / "s", inputs(tmp_path / "elsewhere"))


def test_verified_images_are_read_though_nothing_seems_changed(tmp_path, files, opened):
    def checked(verify: bool) -> dict:
        paths = [str(files / name) for name in NAMES]
        images = runs.images_input(NAMES, paths, verify=verify)
        return {"images": runs.combined_input([images], lambda part: [part])}

    work(tmp_path / "s", checked(False))
    opened.clear()
    assert work(tmp_path / "s", checked(False)) and not set(NAMES) & set(opened)
    assert work(tmp_path / "s", checked(True)) and set(NAMES) <= set(opened)
    # A disk that lost a file's content while sizes and times stayed: the recorded stamp is forged.
    (files / "a").write_bytes(b"z" * 5000)
    runs.write_json(tmp_path / "s" / ".stamps.json", {"images": checked(False)["images"].stamp()})
    assert work(tmp_path / "s", checked(False))
    with pytest.raises(runs.StageError, match="images"):
        work(tmp_path / "s", checked(True))


def test_files_that_were_copied_are_read_once(tmp_path, files, opened):
    work(tmp_path / "s", inputs(files))
    before = (tmp_path / "s" / "stage.json").read_bytes()
    for name in ("weights", *NAMES):
        touch(files / name)
    assert work(tmp_path / "s", inputs(files))
    opened.clear()
    assert work(tmp_path / "s", inputs(files))
    assert not {"weights", *NAMES} & set(opened)
    assert (tmp_path / "s" / "stage.json").read_bytes() == before
    (files / "a").write_bytes(b"z" * 5000)
    with pytest.raises(runs.StageError, match="images"):
        work(tmp_path / "s", inputs(files))
    assert not work(tmp_path / "s", inputs(files), overwrite=True)
    assert not (tmp_path / "s" / ".stamps.json").exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"weights": 1, "images": null}'])
def test_damaged_stamps_are_ignored(content, tmp_path, files, opened):
    work(tmp_path / "s", inputs(files))
    (tmp_path / "s" / ".stamps.json").write_text(content)
    assert work(tmp_path / "s", inputs(files))


def test_undecodable_names_have_fingerprints(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    (tmp_path / name).write_bytes(b"x")
    image = runs.images_input([name], [tmp_path / name])
    assert len(image.stamp()) == len(image.fingerprint()) == 64


def test_threads_keep_the_order_and_hold_few_items():
    used = []
    results = runs.threaded(lambda item: -item, (used.append(i) or i for i in range(20_000)), 3)
    assert [next(results) for _ in range(5)] == [0, -1, -2, -3, -4]
    assert len(used) <= 8192
    assert list(results) == [-i for i in range(5, 20_000)]
    with pytest.raises(ZeroDivisionError):
        list(runs.threaded(lambda item: 1 / item, [1, 0]))
    assert list(runs.threaded(len, [])) == []


def test_an_interrupted_stage_compares_the_content(tmp_path, files):
    with pytest.raises(KeyboardInterrupt):
        with runs.stage(tmp_path / "s", "toy", parameters={}, inputs=inputs(files)):
            raise KeyboardInterrupt
    (tmp_path / "s" / "half.txt").touch()
    (files / "a").write_bytes(b"z")
    with pytest.raises(runs.StageError, match="images"):
        work(tmp_path / "s", inputs(files))


def test_a_missing_file_is_an_error_before_the_stage_begins(tmp_path, files):
    work(tmp_path / "s", inputs(files))
    (files / "b").unlink()
    for folder in ("s", "other"):
        with pytest.raises(FileNotFoundError, match="b'"):
            work(tmp_path / folder, inputs(files))
    assert not (tmp_path / "other").exists()


def test_no_images(tmp_path):
    nothing = {"images": runs.images_input([], [])}
    assert not work(tmp_path / "s", nothing)
    assert work(tmp_path / "s", nothing)
