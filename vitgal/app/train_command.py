"""`accelerate launch -m vitgal.training PARAMS.yaml`: trains what notebooks 02 and 03 train.

On several nodes every node starts the same command, with a file as `vitgal run` takes it:

    accelerate launch --num_processes 16 --num_machines 2 ... -m vitgal.training PARAMS.yaml

The run folder and the images must be the same for all nodes (a shared disk).
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from vitgal import runs
from vitgal.app import parameters, pipeline
from vitgal.settings import AutoencoderSettings, MachineSettings, TrainingSettings
from vitgal.stages.train import fit_autoencoder, fit_retrieval
from vitgal.training.errors import Preempted

STAGES = {"02": "retrieval", "03": "autoencoder"}  # by the notebook that trains it


def main(arguments: list[str] | None = None) -> int:
    """Trains by a params file; returns 0, 75 to be started again, 2 if asked wrongly, else 1."""
    parser = argparse.ArgumentParser(prog="python -m vitgal.training", description="Trains.")
    parser.add_argument("params", type=Path, metavar="PARAMS.yaml", help="as for vitgal run")
    parser.add_argument("--only", choices=STAGES, help="one of both notebooks' models")
    parser.add_argument(
        "-p", dest="overrides", nargs=2, action="append", default=[], metavar=("NAME", "VALUE")
    )
    parser.add_argument("--output", type=Path, metavar="runs/NAME", help="the run folder")
    options = parser.parse_args(arguments)
    try:
        run, stages = read_parameters(
            options.params,
            only=options.only,
            overrides=dict(options.overrides),
            output=options.output,
        )
        for number, values in stages.items():
            train(number, run, values)
    except Preempted as error:
        return _report(error, pipeline.RESTART)
    except parameters.ParameterError as error:
        return _report(error, 2)
    except (ValueError, OSError, RuntimeError) as error:
        return _report(error, 1)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def _report(error: Exception, status: int) -> int:
    print(f"vitgal.training: {error}", file=sys.stderr, flush=True)
    return status


def read_parameters(
    params: Path,
    *,
    only: str | None = None,
    overrides: dict[str, Any] | None = None,
    output: Path | None = None,
) -> tuple[Path, dict[str, dict[str, Any]]]:
    """Returns the run folder, and by notebook ("02", "03") the flat settings it would run with.

    Reads and checks the file as `vitgal run` does; raises ParameterError, FileNotFoundError.
    """
    notebooks = parameters.chain(runs.checkout() / "notebooks")
    selected = parameters.select(notebooks, only=[only] if only else list(STAGES))
    run, changed = pipeline.plan(
        parameters.own_range(parameters.read_params(params))[0],
        notebooks,
        selected,
        overrides=overrides or {},
        output=output,
        source=str(params),
    )
    values = {}
    for path in selected:
        defaults = {name: line.default for name, line in parameters.declared(path).items()}
        values[path.name[:2]] = defaults | changed[path]
    return run, values


def train(notebook: str, run: Path, values: dict[str, Any]) -> Path:
    """Trains what notebook "02" or "03" trains with flat settings; returns the stage's folder."""
    images = runs.data_folder(run, values["image_folder"], "train")
    machine, overwrite = MachineSettings.build(values), values["overwrite"]
    if notebook == "02":
        settings = TrainingSettings.build(values)
        return fit_retrieval(run, settings, machine, image_folder=images, overwrite=overwrite)
    settings = AutoencoderSettings.build(values)
    return fit_autoencoder(run, settings, machine, image_folder=images, overwrite=overwrite)
