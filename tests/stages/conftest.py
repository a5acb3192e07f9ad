"""The small benchmark, and finished stages of it that tests copy instead of making them."""

import shutil
from pathlib import Path

import pytest

from tests.mini_benchmark import NANO, evaluate, extract, write_benchmark
from vitgal.models.network import ViTGaL, build_model
from vitgal.models.weights import save_model


@pytest.fixture(scope="session")
def model() -> ViTGaL:
    """An eighth of XCiT's smallest, for all that any model does."""
    return build_model("timm:test_vit", code_dim=8, seed=0)


@pytest.fixture(scope="session")
def weight_file(tmp_path_factory, model) -> Path:
    return save_model(model, tmp_path_factory.mktemp("weights") / "model.safetensors")


@pytest.fixture(scope="session")
def xcit_file(tmp_path_factory) -> Path:
    model = build_model(NANO, code_dim=8, seed=0)
    return save_model(model, tmp_path_factory.mktemp("xcit") / "model.safetensors")


@pytest.fixture(scope="session")
def finished(tmp_path_factory, weight_file) -> Path:
    """A folder with the benchmark and a run of both stages, which tests must not change."""
    folder = tmp_path_factory.mktemp("finished")
    benchmark = write_benchmark(folder / "benchmark")
    evaluate(folder / "run", benchmark, weight_file)
    extract(folder / "run", benchmark, weight_file)
    return folder


@pytest.fixture
def benchmark(tmp_path, finished) -> Path:
    return shutil.copytree(finished / "benchmark", tmp_path / "benchmark")


@pytest.fixture
def run(tmp_path) -> Path:
    """An empty run."""
    return tmp_path / "run"


@pytest.fixture
def global_run(run, finished) -> Path:
    """The run with a finished global stage."""
    shutil.copytree(finished / "run" / "mini" / "global", run / "mini" / "global")
    return run


@pytest.fixture
def local_run(global_run, finished) -> Path:
    """The run with both stages finished."""
    shutil.copytree(finished / "run" / "mini" / "local", global_run / "mini" / "local")
    return global_run
