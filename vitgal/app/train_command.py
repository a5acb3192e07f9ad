"""Training: the retrieval model with ArcFace (notebook 02), the autoencoder on its tokens (03).

Both fits are one loop (`trainer`) over the images of a split (`training_data`, `augmentation`) by
one recipe (`recipe`). What these modules offer to notebooks and scripts can be had from here. On
several nodes every node starts the same command, with a file as `vitgal run` takes it:

    accelerate launch --num_processes 16 --num_machines 2 ... -m vitgal.training PARAMS.yaml

The run folder and the images must be the same for all nodes (a shared disk).
"""

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from vitgal import runs
from vitgal.app import parameters, pipeline
from vitgal.stages.train import fit_autoencoder, fit_retrieval, read_log, split_inputs
from vitgal.training.augmentation import (
    augment_fast,
    augment_published,
    displayable,
    network_input,
    normalised,
    squashed,
)
from vitgal.training.diagnostics import (
    epoch_table,
    lost_variance,
    parameter_table,
    same_backbone,
    schedule_table,
    token_maps,
    validation_photographs,
)
from vitgal.training.loop import Preempted, Progress, Trainer, fitting_batch
from vitgal.training.networks import AutoencoderNetwork, RetrievalNetwork, build_optimizer
from vitgal.training.recipe import Recipe, TrainingError, learning_rates, resolve_precision
from vitgal.training.samples import Batches, Sample, SplitData, TrainingImages, read_data

__all__ = [
    "AutoencoderNetwork",
    "Batches",
    "Preempted",
    "Progress",
    "Recipe",
    "RetrievalNetwork",
    "Sample",
    "SplitData",
    "Trainer",
    "TrainingError",
    "TrainingImages",
    "augment_fast",
    "augment_published",
    "build_optimizer",
    "displayable",
    "epoch_table",
    "fit_autoencoder",
    "fit_retrieval",
    "fitting_batch",
    "learning_rates",
    "lost_variance",
    "main",
    "network_input",
    "normalised",
    "parameter_table",
    "read_data",
    "read_log",
    "read_parameters",
    "recipe_from",
    "resolve_precision",
    "same_backbone",
    "schedule_table",
    "split_inputs",
    "squashed",
    "token_maps",
    "train",
    "validation_photographs",
]
RESTART = pipeline.RESTART
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
        run, chosen = read_parameters(
            options.params,
            only=options.only,
            overrides=dict(options.overrides),
            output=options.output,
        )
        for number, values in chosen.items():
            train(number, run, values)
    except Preempted as error:
        return _said(error, RESTART)
    except parameters.ParameterError as error:
        return _said(error, 2)
    except (ValueError, OSError, RuntimeError) as error:
        return _said(error, 1)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def _said(error: Exception, status: int) -> int:
    print(f"vitgal.training: {error}", file=sys.stderr, flush=True)
    return status


def read_parameters(
    params: Path,
    *,
    only: str | None = None,
    overrides: dict[str, Any] | None = None,
    output: Path | None = None,
) -> tuple[Path, dict[str, dict[str, Any]]]:
    """The run folder, and by notebook ("02", "03") every parameter that it would run with.

    Reads and checks the file as `vitgal run` does; raises ParameterError, FileNotFoundError.
    """
    every = parameters.chain(runs.checkout() / "notebooks")
    chosen = parameters.select(every, only=[only] if only else list(STAGES))
    run, taken = pipeline.plan(
        parameters.own_range(parameters.read_params(params))[0],
        every,
        chosen,
        overrides=overrides or {},
        output=output,
        source=str(params),
    )
    values = {}
    for path in chosen:
        found = {name: line.default for name, line in parameters.declared(path).items()}
        values[path.name[:2]] = found | taken[path]
    return run, values


def recipe_from(values: dict[str, Any]) -> Recipe:
    """The recipe of a notebook's parameters; `ae_epochs` is the autoencoder's `epochs`."""
    named = {name.removeprefix("ae_"): value for name, value in values.items()}
    return Recipe(
        **{field.name: named[field.name] for field in fields(Recipe) if field.name in named}
    )


def train(notebook: str, run: Path, values: dict[str, Any]) -> Path:
    """Fits what notebook "02" or "03" fits with these parameters; returns the stage's folder."""
    shared = {
        "image_folder": runs.data_folder(run, values["image_folder"], "train"),
        "recipe": recipe_from(values),
        "overwrite": values["overwrite"],
    }
    if notebook == "02":
        given = values["initial_weights"]
        names = "architecture drop_path margin scale teacher distill_weight"
        kept = {name: values[name] for name in names.split()}
        kept["initial_weights"] = given and runs.resolve(given)
        given = values["teacher_weights"]
        return fit_retrieval(run, teacher_weights=given and runs.resolve(given), **kept, **shared)
    given = values["backbone_weights"]
    kept = {name: values[name] for name in ("code_dim", "reconstruction_weight")}
    return fit_autoencoder(run, source=given and runs.resolve(given), **kept, **shared)


if __name__ == "__main__":
    sys.exit(main())
