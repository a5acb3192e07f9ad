"""Slurm's job script, the containers, continuous integration and the hooks before a commit."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.run import STRIP
from vitgal.app.command_line import _parser
from vitgal.training.launch import LAUNCH

TOP = Path(__file__).resolve().parents[2]
SCRIPT = TOP / "params" / "machines" / "slurm.sh"
JOB = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "4"}
JOB |= {"SLURM_NNODES": "2"}
# Stand-ins: srun runs its command as task 3 with programs that record how they were called.
PROGRAMS = {
    "srun": 'shift\nSLURM_PROCID=3 "$@"',
    "scontrol": 'echo "$@" >> "$FOLDER/control"\n[ "$1" != show ] || printf "n1\\nn2\\n"',
    "vitgal": 'printf "%s\\n" "$@" > "$FOLDER/called"\nexit $STATUS',
    "python": 'printf "%s\\n" "$@" > "$FOLDER/called"\nenv > "$FOLDER/env"\nexit $STATUS',
}


@pytest.fixture
def submit(tmp_path):
    for name, body in PROGRAMS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)

    def run(*arguments, status=0, **variables):
        """Returns the script's status, the arguments of the started program, and scontrol's."""
        path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "FOLDER": str(tmp_path)}
        environment = path | JOB | {"STATUS": str(status)} | variables
        done = subprocess.run(
            ["bash", SCRIPT, *arguments], env=environment, capture_output=True, text=True
        )
        files = [tmp_path / name for name in ("called", "control")]
        lines = [path.read_text().splitlines() if path.exists() else [] for path in files]
        return done.returncode, *lines, done.stdout + done.stderr

    return run


def test_extraction_is_an_array_whose_interrupted_workers_are_requeued(submit):
    array = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_ARRAY_JOB_ID": "40"}
    status, called, control, _ = submit("extract", "a.yaml", "-p", "top", "5", status=75, **array)
    options = _parser().parse_args(called)
    assert (options.params, options.only) == (Path("a.yaml"), "05")
    expected = {"machine": "slurm", "worker": "2", "worker_count": "8", "top": "5"}
    assert dict(options.overrides) == expected
    assert status == 75 and control == ["requeue 40_2"]
    assert submit("extract", "a.yaml", status=1, **array)[::2] == (1, ["requeue 40_2"])


def test_training_starts_a_process_on_each_gpu_and_is_requeued(submit, tmp_path):
    status, called, control, _ = submit("train", "a.yaml", "--only", "02", status=75)
    assert called == ["-m", "vitgal.training", "a.yaml", *"-p machine slurm".split()] + [
        *"-p num_processes 4 --only 02".split()
    ]
    variables = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines())
    assert {name: variables[name] for name in LAUNCH} == {
        **{"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "0"},
        **{"MASTER_ADDR": "n1", "MASTER_PORT": "20041"},
    }
    assert variables["LOCAL_WORLD_SIZE"] == "2"
    assert status == 75 and control == ["show hostnames n[1-2]", "requeue 41"]


def test_a_dry_run_prints_the_command_and_a_wrong_call_the_usage(submit):
    status, called, control, printed = submit("run", "a b.yaml", VITGAL_DRY_RUN="1")
    assert (status, called, control) == (0, [], [])
    assert printed == "srun vitgal run a\\ b.yaml -p machine slurm \n"
    status, called, _, printed = submit("extract")
    assert status == 2 and not called and "sbatch --array=0-7" in printed
    assert submit("nothing", "a.yaml")[0] == 2
    status, _, _, printed = submit("extract", "a.yaml")
    assert status != 0 and "start it with sbatch --array=0-7" in printed


def test_continuous_integration_calls_targets_of_the_makefile():
    targets = re.findall(r"^(\w+):", (TOP / "Makefile").read_text(), re.M)
    jobs = yaml.safe_load((TOP / ".github/workflows/tests.yml").read_text())["jobs"]
    commands = {n: [s["run"] for s in job["steps"] if "run" in s] for n, job in jobs.items()}
    assert commands == {"check": ["make check"], "test": ["make test"]}
    assert {"check", "test"} <= set(targets)
    assert jobs["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]


def test_containers_install_by_the_makefile_from_the_constraints():
    lines = (TOP / "Dockerfile").read_text()
    assert "make .venv/.installed" in lines
    assert all((TOP / name).exists() for name in re.search(r"COPY (.*) \./\n", lines)[1].split())
    makefile = (TOP / "Makefile").read_text()
    assert "STAMP := $(VENV)/.installed" in makefile and "--constraint constraints.txt" in makefile
    container = json.loads((TOP / ".devcontainer/devcontainer.json").read_text())
    assert (TOP / ".devcontainer" / container["build"]["dockerfile"]).resolve().is_file()
    assert container["postCreateCommand"] == "make .venv/.installed"


def test_hooks_are_what_the_tests_demand():
    (repository,) = yaml.safe_load((TOP / ".pre-commit-config.yaml").read_text())["repos"]
    entries = {hook["id"]: hook["entry"].replace('"', "") for hook in repository["hooks"]}
    assert entries["nbstripout"].endswith(" ".join(["nbstripout", "--verify", *STRIP]))
    assert " ruff check" in entries["ruff-check"] and " ruff format" in entries["ruff-format"]
