"""The command that trains: the retrieval model (notebook 02) and the autoencoder (notebook 03).

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
from vitgal.app import pipeline
from vitgal.app.command_line import add_overrides, escape_output, say
from vitgal.settings.reader import Settings, read_file
from vitgal.stages.train import fit_autoencoder, fit_retrieval

STAGES = {"02": "retrieval", "03": "autoencoder"}  # by the notebook that trains it


def main(arguments: list[str] | None = None) -> int:
    """Trains by a params file; returns 0, 75 after SIGTERM, 2 for wrong settings, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m vitgal.training", description="Trains the models of notebooks 02 and 03."
    )
    parser.add_argument("params", type=Path, metavar="PARAMS.yaml", help="as for vitgal run")
    parser.add_argument("--only", choices=STAGES, help="train only this notebook's model")
    add_overrides(parser, None, "the run folder")
    escape_output()
    options = parser.parse_args(arguments)
    try:
        run, chosen = read_notebook_settings(
            options.params,
            only=options.only,
            overrides=dict(options.overrides),
            output=options.output,
        )
        for number, settings in chosen.items():
            train(number, run, settings)
    except (ValueError, OSError, RuntimeError) as error:
        say(f"vitgal.training: {error}", sys.stderr)
        return getattr(error, "status", 1)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def read_notebook_settings(
    params: Path,
    *,
    only: str | None = None,
    overrides: dict[str, Any] | None = None,
    output: Path | None = None,
) -> tuple[Path, dict[str, Settings]]:
    """Returns the run folder, and by notebook ("02", "03") its settings.

    Reads and checks the file as `vitgal run` does; raises SettingsError, FileNotFoundError.
    """
    notebooks = pipeline.chain(runs.resolve("notebooks"))
    selected = pipeline.select(notebooks, only=[only] if only else list(STAGES))
    values = read_file(params)
    run, injected = pipeline.plan(values, notebooks, selected, overrides=overrides, output=output)
    settings = {path.name[:2]: pipeline.settings_in(path, injected[path]) for path in selected}
    return run, settings


def train(notebook: str, run: Path, settings: Settings) -> Path:
    """Trains the model of notebook "02" or "03"; returns the stage's folder."""
    images = runs.data_folder(run, settings.run.image_folder, "train")
    machine, overwrite = settings.machine, settings.run.overwrite
    if notebook == "02":
        recipe = settings.training
        return fit_retrieval(run, recipe, machine, image_folder=images, overwrite=overwrite)
    recipe = settings.autoencoder
    return fit_autoencoder(run, recipe, machine, image_folder=images, overwrite=overwrite)
