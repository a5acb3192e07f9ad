"""The stages of notebooks 02 and 03: the retrieval model and the autoencoder."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate.state import PartialState
from accelerate.utils import broadcast_object_list

from vitgal import runs
from vitgal.models import weights
from vitgal.models.heads import ArcFace, LinearClassifier
from vitgal.models.inference import device_of
from vitgal.models.network import ViTGaL, build_model, outline, seeded
from vitgal.models.teacher import Teacher
from vitgal.settings import (
    AutoencoderSettings,
    MachineSettings,
    Recipe,
    SettingsError,
    TrainingSettings,
)
from vitgal.settings.training import CHANGEABLE
from vitgal.training.errors import TrainingError
from vitgal.training.fit import Fit, continued
from vitgal.training.launch import join, launched, own_environment, rank, run_fit
from vitgal.training.loop import training_precision
from vitgal.training.networks import AutoencoderNetwork, DistilledNetwork, RetrievalNetwork

Watch = Callable[[pd.DataFrame], None]


def fit_retrieval(
    run: Path,
    settings: TrainingSettings,
    machine: MachineSettings,
    *,
    image_folder: Path,
    overwrite: bool = False,
    watch: Watch | None = None,
    progress: bool = True,
) -> Path:
    """Trains the retrieval model with ArcFace on `<run>/split`; returns `<run>/retrieval`.

    Writes model.safetensors (backbone and multi-atrous head, no classifier), log.jsonl (a row every
    50 steps and at each epoch's end), failures.json (images that could not be read), tensorboard/
    and state/ (the last two states to resume from, with the classifier; the best model so far). A
    finished stage returns at once, an interrupted one continues from its last state.

    Args:
        image_folder: the folder that the split's paths are relative to.
        watch: called with the log so far after each epoch; while forked processes train, whenever
            they have written it.
    Raises:
        FileNotFoundError: a listed image is missing (before anything starts).
        Preempted: SIGTERM came; the state is saved.
        TrainingError: anything else that stops the run.

    Source: ViTGaL section 4, and the published training code where the two differ.
    """
    inputs = split_inputs(run / "split")
    for name in ("initial_weights", "teacher_weights"):
        if source := getattr(settings, name):
            inputs[name] = _fingerprint(source)
    model = outline(
        settings.architecture, embed_dim=settings.embed_dim, class_token=settings.class_token
    )
    _check_size(model, settings)
    build = functools.partial(_retrieval_network, settings)
    fit = Fit(build, settings, machine, run / "retrieval", run / "split", image_folder)
    return _fit_stage(replace(fit, watch=watch, progress=progress), inputs, overwrite)


def fit_autoencoder(
    run: Path,
    settings: AutoencoderSettings,
    machine: MachineSettings,
    *,
    image_folder: Path,
    overwrite: bool = False,
    watch: Watch | None = None,
    progress: bool = True,
) -> Path:
    """Trains the autoencoder on the frozen retrieval model; returns `<run>/autoencoder`.

    Writes the complete model (backbone and autoencoder) as model.safetensors and the rest as
    `fit_retrieval` does; the backbone's tensors stay bit-identical. Arguments and errors are those
    of `fit_retrieval`.
    """
    if settings.backbone_weights is None:
        runs.read_stage(run / "retrieval", "notebook 02_train")
        source = run / "retrieval" / "model.safetensors"
    else:
        source = runs.resolve(settings.backbone_weights)
    inputs = split_inputs(run / "split") | {"weights": runs.fingerprint_file(source)}
    _check_size(weights.load_outline(source), settings)
    build = functools.partial(_autoencoder_network, source, settings)
    fit = Fit(build, settings, machine, run / "autoencoder", run / "split", image_folder)
    return _fit_stage(replace(fit, watch=watch, progress=progress), inputs, overwrite)


def _fingerprint(source: str) -> str:
    """The sha256 of the file of a source of weights; of timm's own weights their name."""
    _, file = runs.split_source(source)
    return runs.fingerprint_file(runs.resolve(file)) if file else source


def _check_size(model: ViTGaL, settings: Recipe) -> None:
    """Raises SettingsError where a model of `outline` cannot train at the recipe's image_size."""
    size, name = settings.image_size, f"{settings.PREFIX}image_size"
    if not model.on_timm:
        if size % model.patch:
            raise SettingsError(f"{name} {size} is not a multiple of {model.patch}")
        return
    try:
        model.check_size(size, size)
        try:
            _pass(model, size)
        except Exception:  # some operations need numbers, which the meta device has not
            built = build_model(
                model.architecture,
                seed=0,
                embed_dim=model.embed_dim,
                class_token=model.class_token,
            )
            _pass(built, size)
    except ValueError as error:
        raise SettingsError(f"{name}: {error}") from error


@torch.no_grad()
def _pass(model: ViTGaL, size: int) -> None:
    """Passes two images through the network, in training mode, where it builds no copies."""
    model.train().global_features(torch.zeros(2, 3, size, size, device=device_of(model)))


def split_inputs(split: Path) -> dict[str, str]:
    """Returns fingerprints of the tables that training depends on, from the split's manifest."""
    return {
        name: runs.output_fingerprint(split, f"{name}.csv", "notebook 01_data_split")
        for name in ("train", "val", "val_retrieval")
    }


def read_log(folder: Path) -> pd.DataFrame:
    """Reads a fit's log.jsonl: a row every 50 steps and at each epoch's end."""
    runs.read_stage(folder, "the notebook that trains it")
    log = folder / "log.jsonl"
    try:
        return pd.read_json(log, lines=True)
    except ValueError as error:
        raise runs.StageError(
            f"{log} is damaged ({error}); set overwrite: true to train again"
        ) from None


def compared(settings: Recipe, machine: MachineSettings) -> dict[str, Any]:
    """Returns the parameters of a training; threads and processes change the last bits.

    `sync_batchnorm` counts only if it is off and there are several.
    """
    values = settings.compared()
    if settings.scale_lr:
        values["step_images"] = settings.step_images
    if machine.num_processes == 1 or settings.sync_batchnorm:
        del values["sync_batchnorm"]
    return values | {
        "precision": training_precision(settings),
        "threads": machine.threads,
        "num_processes": machine.num_processes,
    }


def _retrieval_network(settings: TrainingSettings, classes: int) -> RetrievalNetwork:
    model = build_model(
        settings.architecture,
        seed=settings.seed,
        drop_path=settings.drop_path,
        embed_dim=settings.embed_dim,
        class_token=settings.class_token,
    )
    if settings.initial_weights is not None:
        weights.initial_weights(model, runs.resolve_source(settings.initial_weights))
    if settings.freeze_backbone:
        model.freeze_trunk()
    with seeded(settings.seed):
        head = ArcFace(
            model.embed_dim,
            classes,
            settings.margin,
            settings.scale,
            sub_centres=settings.sub_centres,
            chunk=settings.class_chunk,
            sampled=settings.sampled_classes,
        )
        if settings.teacher is None:
            return RetrievalNetwork(model, head, settings.label_smoothing)
        side = settings.teacher_size or settings.image_size
        teacher = Teacher(settings.teacher, runs.resolve(settings.teacher_weights), (side, side))
        return DistilledNetwork(
            model, head, teacher, settings.distill_weight, settings.label_smoothing
        )


def _autoencoder_network(
    source: Path, settings: AutoencoderSettings, classes: int
) -> AutoencoderNetwork:
    model = weights.load_model(source)
    model.attach_autoencoder(settings.code_dim, seed=settings.seed).freeze_backbone()
    with seeded(settings.seed):
        classifier = LinearClassifier(model.embed_dim, classes)
    return AutoencoderNetwork(model, classifier, settings)


def _fit_stage(fit: Fit, inputs: dict[str, str], overwrite: bool) -> Path:
    """Opens the stage, trains where it is not finished, and finishes it; returns its folder."""
    fit = replace(fit, parameters=compared(fit.settings, fit.machine))
    with contextlib.ExitStack() as stack:
        ignored = stack.enter_context(own_environment())
        if launched():
            join(fit.machine)
        stage = stack.enter_context(_open_stage(fit, inputs, overwrite))
        if not stage.finished:
            owner, begun = runs.fingerprint(stage.settings), stage.settings["parameters"]
            run_fit(replace(fit, owner=owner, begun=begun))
            if rank() == 0:
                stage.finish(
                    ["model.safetensors", "log.jsonl", "failures.json", "changes.json"],
                    {
                        "device": "cuda" if torch.cuda.device_count() else "cpu",
                        "data_workers": fit.machine.data_workers,
                        "processes": fit.machine.num_processes,
                        "threads": fit.machine.threads or torch.get_num_threads(),
                        "ignored_environment": ignored,
                        "unreadable": len(runs.read_json(fit.folder / "failures.json")),
                    }
                    | runs.read_json(fit.folder / "changes.json"),
                )
    if launched():
        PartialState().wait_for_everyone()  # the next stage reads this one's files
    return fit.folder


@contextlib.contextmanager
def _open_stage(fit: Fit, inputs: dict[str, str], overwrite: bool) -> Iterator[runs.Stage]:
    """Opens the stage and checks the images, in the first of launched processes."""
    stage = error = None
    with contextlib.ExitStack() as stack:
        if rank() == 0:
            try:
                opened = runs.stage(
                    fit.folder,
                    fit.folder.name,
                    parameters=_continued(fit, overwrite),
                    inputs=inputs,
                    overwrite=overwrite,
                )
                stage = stack.enter_context(opened)
                if not stage.finished:
                    fit.read_data().refuse_missing()
            except Exception as caught:
                if not launched():
                    raise
                error = caught  # raised when the other processes know of it
        if launched():
            stage = _broadcast(stage, error, fit, runs.fingerprint([fit.parameters, inputs]))
        yield stage


def _continued(fit: Fit, overwrite: bool) -> dict[str, Any]:
    """Returns the parameters of the stage: the begun run's, where a resumed one may have others."""
    recorded = None if overwrite else runs.read_settings(fit.folder)
    if recorded is None:
        return dict(fit.parameters)
    begun = recorded["parameters"]
    parameters = continued(begun, fit.parameters, fit.settings.may_change)
    other = runs.differences(begun, parameters | {"environment": begun.get("environment")})
    names = {line.partition(":")[0] for line in other}
    state, finished = ((fit.folder / name).exists() for name in ("state", runs.MANIFEST))
    if names and names <= set(CHANGEABLE) and state and not finished:
        raise TrainingError(
            f"{fit.folder} was begun with other settings: {'; '.join(other)}; may_change: "
            f"[{', '.join(sorted(names))}] goes on with the new ones and records it"
        )
    return parameters


def _broadcast(
    stage: runs.Stage | None, error: Exception | None, fit: Fit, settings: str
) -> runs.Stage:
    """Gives the first process's stage, or its error, to all; their `settings` must be equal."""
    message = [(str(error or ""), stage and stage.finished, stage and stage.settings, settings)]
    broadcast_object_list(message)
    text, finished, stage_settings, first = message[0]
    if error is not None:
        raise error
    if text:
        raise TrainingError(f"the first process cannot begin: {text}")
    if first != settings:
        raise TrainingError(
            "this process was started with other parameters or data than the first one: every node "
            "needs the same command and the same run folder"
        )
    return stage or runs.Stage(fit.folder, fit.folder.name, finished, stage_settings)
