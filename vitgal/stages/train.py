"""The stages of notebooks 02 and 03: the retrieval model and the autoencoder."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate.state import PartialState
from accelerate.utils import broadcast_object_list

from vitgal import runs
from vitgal.models import weights
from vitgal.models.heads import ArcFace, LinearClassifier
from vitgal.models.network import build_model
from vitgal.models.teacher import Teacher
from vitgal.training.distillation import DistilledNetwork
from vitgal.training.launch import _fit, _join, _launch, _launched, _rank
from vitgal.training.networks import AutoencoderNetwork, RetrievalNetwork
from vitgal.training.recipe import Recipe, TrainingError
from vitgal.training.samples import read_data


def fit_retrieval(
    run: Path,
    *,
    image_folder: Path,
    architecture: str = "xcit_small_12_p16_224",
    initial_weights: Path | None = None,
    recipe: Recipe | None = None,
    drop_path: float = 0.1,
    margin: float = 0.15,
    scale: float = 30.0,
    teacher: str | None = None,
    teacher_weights: Path | None = None,
    distill_weight: float = 0.8,
    overwrite: bool = False,
    watch: Callable[[pd.DataFrame], None] | None = None,
    progress: bool = True,
) -> Path:
    """Trains the retrieval model with ArcFace on `<run>/split`; returns `<run>/retrieval`.

    Writes model.safetensors (backbone and multi-atrous head, no classifier), log.jsonl (a row every
    50 steps and at each epoch's end), failures.json (images that could not be read), tensorboard/
    and state/ (the last two states to resume from, with the classifier; the best model so far). A
    finished stage returns at once, an interrupted one continues from its last state.

    Args:
        image_folder: what the paths of the split are relative to.
        initial_weights: ImageNet XCiT's, or a model of ours that is trained further; None starts
            from random ones.
        margin: ArcFace's angular margin in radians; published code 0.15, paper 0.1.
        teacher: a network of timm that the model learns to agree with (`distillation`); published:
            none. Its weights are the file teacher_weights, and distill_weight is its share of the
            loss, ArcFace's the rest.
        watch: called with the log so far after each epoch; while forked processes train, whenever
            they have written it.
    Raises:
        FileNotFoundError: a listed image is missing (before anything starts).
        Preempted: SIGTERM came; the state is saved.
        TrainingError: too few images, a loss that is not finite, too many unreadable images, a
            process or data worker that died, too little memory.

    Source: ViTGaL section 4, and the published training code where the two differ.
    """
    recipe = recipe or Recipe()
    inputs = split_inputs(run / "split")
    if initial_weights is not None:
        inputs["initial_weights"] = runs.fingerprint_file(initial_weights)
    parameters = recipe.affecting() | {
        "architecture": architecture,
        "drop_path": drop_path,
        "margin": margin,
        "scale": scale,
    }
    if (teacher is None) != (teacher_weights is None):
        raise ValueError("teacher is a network's name and teacher_weights its file: give both")
    taught = None
    if teacher is not None:
        if not 0 < distill_weight <= 1:
            raise ValueError(f"distill_weight {distill_weight} is not above 0 and up to 1")
        inputs["teacher_weights"] = runs.fingerprint_file(teacher_weights)
        parameters |= {"teacher": teacher, "distill_weight": distill_weight}
        taught = (teacher, teacher_weights, distill_weight)
    build = functools.partial(
        _retrieval_network, architecture, initial_weights, drop_path, margin, scale, recipe, taught
    )
    settings = {"parameters": parameters, "inputs": inputs, "overwrite": overwrite}
    return _fit_stage(run, "retrieval", settings, build, recipe, image_folder, watch, progress)


def fit_autoencoder(
    run: Path,
    *,
    image_folder: Path,
    source: Path | None = None,
    code_dim: int = 128,
    reconstruction_weight: float = 10.0,
    recipe: Recipe | None = None,
    overwrite: bool = False,
    watch: Callable[[pd.DataFrame], None] | None = None,
    progress: bool = True,
) -> Path:
    """Trains the autoencoder on the frozen retrieval model; returns `<run>/autoencoder`.

    Writes the complete model (backbone and autoencoder) as model.safetensors and the rest as
    `fit_retrieval` does; the backbone's tensors stay bit-identical. Resumes, returns and raises as
    `fit_retrieval` does, and ValueError for a recipe with options of the retrieval model.

    Args:
        source: the retrieval model; None takes `<run>/retrieval/model.safetensors`.
        code_dim: length of a local descriptor; published 128 where the tokens have 384.
        reconstruction_weight: of the mean squared error beside the cross-entropy; published 10.
    """
    recipe = recipe or Recipe(epochs=25)
    if recipe.retrieval_only():
        names = ", ".join(recipe.retrieval_only())
        raise ValueError(f"{names}: only the retrieval model's training knows this")
    if source is None:
        runs.read_stage(run / "retrieval", "notebook 02_train")
        source = run / "retrieval" / "model.safetensors"
    inputs = split_inputs(run / "split") | {"weights": runs.fingerprint_file(source)}
    parameters = recipe.affecting() | {
        "code_dim": code_dim,
        "reconstruction_weight": reconstruction_weight,
    }
    build = functools.partial(_autoencoder_network, source, code_dim, reconstruction_weight, recipe)
    settings = {"parameters": parameters, "inputs": inputs, "overwrite": overwrite}
    return _fit_stage(run, "autoencoder", settings, build, recipe, image_folder, watch, progress)


def split_inputs(split: Path) -> dict[str, str]:
    """Fingerprints of the split that training depends on, from its manifest."""
    return {
        name: runs.output_fingerprint(split, f"{name}.csv", "notebook 01_data_split")
        for name in ("train", "val", "val_retrieval")
    }


def read_log(folder: Path) -> pd.DataFrame:
    """A fit's log.jsonl as a table, a row every 50 steps and at each epoch's end."""
    runs.read_stage(folder, "the notebook that trains it")
    return pd.read_json(folder / "log.jsonl", lines=True)


def _retrieval_network(
    architecture: str,
    initial_weights: Path | None,
    drop_path: float,
    margin: float,
    scale: float,
    recipe: Recipe,
    taught: tuple[str, Path, float] | None,
    classes: int,
) -> RetrievalNetwork:
    model = build_model(architecture, seed=recipe.seed, drop_path=drop_path)
    if initial_weights is not None:
        weights.initial_weights(model, initial_weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        head = ArcFace(
            model.embed_dim,
            classes,
            margin,
            scale,
            sub_centres=recipe.sub_centres,
            chunk=recipe.class_chunk,
            sampled=recipe.sampled_classes,
        )
        if taught is None:
            return RetrievalNetwork(model, head, recipe.label_smoothing)
        name, source, weight = taught
        return DistilledNetwork(model, head, Teacher(name, source), weight, recipe.label_smoothing)


def _autoencoder_network(
    source: Path, code_dim: int, reconstruction_weight: float, recipe: Recipe, classes: int
) -> AutoencoderNetwork:
    seed = recipe.seed
    model = weights.load_model(source).attach_autoencoder(code_dim, seed=seed).freeze_backbone()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = LinearClassifier(model.embed_dim, classes)
    return AutoencoderNetwork(model, classifier, reconstruction_weight, recipe.label_smoothing)


def _fit_stage(
    run: Path,
    name: str,
    settings: dict[str, Any],
    build: Callable,
    recipe: Recipe,
    image_folder: Path,
    watch: Callable[[pd.DataFrame], None] | None,
    show: bool,
) -> Path:
    """Opens the stage, fits where it is not finished, and finishes it; returns its folder."""
    folder, split = run / name, run / "split"

    def check() -> None:
        read_data(split, image_folder, recipe).refuse_missing()

    with _stage(folder, name, settings, recipe, check) as stage:
        if not stage.finished:
            owner = runs.fingerprint(stage.settings)
            _launch(_fit, (build, recipe, folder, split, image_folder, owner), watch, show)
            if _rank() == 0:
                outputs = ["model.safetensors", "log.jsonl", "failures.json"]
                failures = len(runs.read_json(folder / "failures.json"))
                stage.finish(outputs, **_recorded(recipe), unreadable=failures)
    if _launched():
        PartialState().wait_for_everyone()  # the next stage reads what this one wrote
    return folder


@contextlib.contextmanager
def _stage(
    folder: Path, name: str, settings: dict[str, Any], recipe: Recipe, check: Callable[[], None]
) -> Iterator[runs.Stage]:
    """The open stage; among launched processes the first holds it and the others hear of it."""
    with contextlib.ExitStack() as stack:
        if not _launched():
            stage = stack.enter_context(runs.stage(folder, name, **settings))
            if not stage.finished:
                check()
            yield stage
            return
        _join(recipe)
        stage, failure = None, None
        if _rank() == 0:
            try:
                stage = stack.enter_context(runs.stage(folder, name, **settings))
                if not stage.finished:
                    check()
            except Exception as error:  # told to all, then raised
                failure = error
        yield _told(stage, failure, folder, name, settings)


def _told(
    stage: runs.Stage | None,
    failure: Exception | None,
    folder: Path,
    name: str,
    settings: dict[str, Any],
) -> runs.Stage:
    """The first process's stage as every launched process sees it; raises what it met there."""
    wanted = runs.fingerprint([settings["parameters"], settings["inputs"]])
    said = [(str(failure or ""), stage and stage.finished, stage and stage.settings, wanted)]
    broadcast_object_list(said)
    text, finished, found, first = said[0]
    if failure is not None:
        raise failure
    if text:
        raise TrainingError(f"the first process cannot begin: {text}")
    if first != wanted:
        raise TrainingError(
            "this process was started with other parameters or data than the first one: every node "
            "needs the same command and the same run folder"
        )
    return stage or runs.Stage(folder, name, finished, found)


def _recorded(recipe: Recipe) -> dict:
    return {
        "device": "cuda" if torch.cuda.device_count() else "cpu",
        "data_workers": recipe.data_workers,
        "processes": recipe.num_processes,
    }
