"""Fixtures of the training tests: photographs, their split, a finished fit, a free accelerate."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from tests.training_runs import fit, split, write_images


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """18 photographs of three classes, of which 13 train."""
    return write_images(tmp_path / "images")


@pytest.fixture
def run(tmp_path: Path, images: Path) -> Path:
    """A run folder that holds the split of the photographs."""
    return split(tmp_path / "run", images)


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`<run>/retrieval` of a finished fit with SETTINGS on such photographs, to read alone."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    images = write_images(folder / "images")
    retrieval = fit(split(folder / "run", images), images)
    for state in (retrieval / "state").glob("*.pt"):
        state.unlink()  # 9 MB that no test reads
    return retrieval


@pytest.fixture
def trained(run: Path, uninterrupted: Path) -> Path:
    """A run folder that holds the split and a copy of the finished fit."""
    shutil.copytree(uninterrupted, run / "retrieval")
    return run


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Lets a test create trainers in this process, and others afterwards."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
