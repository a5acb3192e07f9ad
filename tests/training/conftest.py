"""Fixtures of the training tests: photographs, a run with their split, a free accelerate."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from tests.training_runs import split, write_images


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """18 photographs of three classes, of which 13 train."""
    return write_images(tmp_path / "images")


@pytest.fixture
def run(tmp_path: Path, images: Path) -> Path:
    """A run folder that holds the split of the photographs."""
    return split(tmp_path / "run", images)


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Lets a test create trainers in this process, and others afterwards."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
