"""Trackers of training: TensorBoard always, any of accelerate's by one setting."""

import json

import pytest
from accelerate import tracking

from vitgal.settings import MachineSettings
from vitgal.training.errors import TrainingError
from vitgal.training.trackers import open_trackers


class Lines(tracking.GeneralTracker):
    """A tracker that appends its rows to a file; started, it needs the folder."""

    name = "lines"
    requires_logging_directory = True

    def __init__(self, run_name, logging_dir):
        super().__init__()
        self.file = logging_dir / f"{run_name}.jsonl"

    def start(self):
        self.file.touch(exist_ok=False)

    def log(self, values, step=None, **_):
        with open(self.file, "a") as handle:
            handle.write(json.dumps([step, values]) + "\n")

    @property
    def tracker(self):
        return self.file


@pytest.fixture
def lines(monkeypatch):
    available = [*tracking.get_available_trackers(), "lines"]
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "lines", Lines)
    monkeypatch.setattr(tracking, "_available_trackers", available)


def test_a_tracker_is_off_until_it_is_named(tmp_path, lines):
    assert MachineSettings().tracker is None
    for name in (None, "tensorboard"):
        assert [board.name for board in open_trackers(name, tmp_path)] == ["tensorboard"]
    boards = open_trackers("lines", tmp_path)
    assert [board.name for board in boards] == ["tensorboard", "lines"]
    for board in boards:
        board.log({"loss": 0.5}, step=3)
        board.finish()
    assert (tmp_path / "vitgal.jsonl").read_text() == '[3, {"loss": 0.5}]\n'


def test_a_tracker_that_cannot_be_used_says_why(tmp_path, lines):
    with pytest.raises(TrainingError, match="tracker 'paper' is none of aim, .*wandb"):
        open_trackers("paper", tmp_path)
    absent = next(
        name for name in ("comet_ml", "aim", "clearml") if name not in tracking._available_trackers
    )
    with pytest.raises(TrainingError, match=f"{absent} is not installed: `pip install {absent}`"):
        open_trackers(absent, tmp_path)
    (tmp_path / "vitgal.jsonl").touch()
    with pytest.raises(TrainingError, match="lines does not start .*: log in, or leave tracker"):
        open_trackers("lines", tmp_path)
