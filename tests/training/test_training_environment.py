"""What libraries read from the environment: hidden, taken as a parameter, or refused."""

import os
from dataclasses import replace

import pytest

from tests.training_runs import MACHINE, SETTINGS, fit, split
from vitgal import runs
from vitgal.training import errors

ONE = replace(SETTINGS, epochs=1)
FOREIGN = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_DYNAMO_BACKEND": "AOT_EAGER",
    "ACCELERATE_TORCH_DEVICE": "meta",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "PARALLELISM_CONFIG_TP_SIZE": "2",
}
LEFT_OVER = {
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "1",
    "RANK": "3",
    "LOCAL_RANK": "3",
    "WORLD_SIZE": "1",
    "PMI_SIZE": "1",
    "PMI_RANK": "0",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_environment_changes_no_weight(processes, images, run, tmp_path, monkeypatch):
    machine, recipe = replace(MACHINE, num_processes=processes), replace(ONE, batch_size=2)
    plain = fit(split(tmp_path / "plain", images), images, recipe, machine)
    options = FOREIGN | LEFT_OVER
    for name, value in options.items():
        monkeypatch.setenv(name, value)
    folder = fit(run, images, recipe, machine)
    name = "model.safetensors"
    assert (folder / name).read_bytes() == (plain / name).read_bytes()
    ignored = runs.read_json(folder / "stage.json")["recorded"]["ignored_environment"]
    assert options.items() - ignored.items() == {("SLURM_NTASKS", "8"), ("SLURM_PROCID", "5")}
    assert {key: os.environ[key] for key in options} == options  # as before


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"PMI_SIZE": "4"}, "PMI_SIZE is 4 .*by accelerate launch, or unset PMI_SIZE"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE is 2"),
        ({"MV2_COMM_WORLD_SIZE": "2"}, "MV2_COMM_WORLD_SIZE is 2"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE is 4 .* but RANK is not set: unset WORLD_SIZE"),
        ({"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0"}, "but MASTER_ADDR is not set"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
            "2 processes were launched, but num_processes is 1",
        ),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE in the environment is 'two', not a number"),
    ],
)
def test_half_a_launch_is_refused(given, said, images, run, monkeypatch):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(errors.TrainingError, match=said):
        fit(run, images, ONE)
    assert not (run / "retrieval").exists()


@pytest.mark.usefixtures("plain_environment")
def test_library_variables_are_parameters(images, run, monkeypatch):
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    folder = fit(run, images, ONE)
    manifest = runs.read_json(folder / "stage.json")
    assert manifest["parameters"]["environment"] == {"ONEDNN_DEFAULT_FPMATH_MODE": "BF16"}
    assert manifest["recorded"]["threads"] == 1
    monkeypatch.delenv("ONEDNN_DEFAULT_FPMATH_MODE")
    with pytest.raises(runs.StageError, match="environment: .*BF16.* there, null now"):
        fit(run, images, ONE)
