"""Training: the retrieval model with ArcFace (notebook 02), the autoencoder on its tokens (03).

Both fits are one loop (`trainer`) over the images of a split (`training_data`, `augmentation`) by
one recipe (`recipe`). What these modules offer to notebooks and scripts can be had from here. On
several nodes every node starts the same command, with a file as `vitgal run` takes it:

    accelerate launch --num_processes 16 --num_machines 2 ... -m vitgal.training PARAMS.yaml

The run folder and the images must be the same for all nodes (a shared disk).
"""

import argparse
import contextlib
import functools
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import torch
from accelerate import notebook_launcher
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import broadcast_object_list, patch_environment
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from vitgal import images, landmarks, pipeline, runs, weights
from vitgal.augmentation import (
    augment_fast,
    augment_published,
    displayable,
    network_input,
    normalised,
    squashed,
)
from vitgal.distillation import DistilledNetwork, Teacher
from vitgal.model import ArcFace, LinearClassifier, ViTGaL, build_model
from vitgal.recipe import Recipe, TrainingError, learning_rates, resolve_precision
from vitgal.trainer import (
    AutoencoderNetwork,
    Preempted,
    Progress,
    RetrievalNetwork,
    Trainer,
    build_optimizer,
    fitting_batch,
    timeout,
)
from vitgal.training_data import Batches, Sample, SplitData, TrainingImages, read_data

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
PEER_SECONDS = 30  # that a process which lost another one waits, for that one to be reported
WATCH_SECONDS = 5  # between two looks at the log that forked processes write


# The two fits


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


# One stage, in this process, in forked ones, or in those that a launcher has started


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


def _launched() -> bool:
    """Whether a launcher has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _rank() -> int:
    return PartialState().process_index if _launched() else 0


def _join(recipe: Recipe) -> None:
    """Joins the launched processes; TrainingError where they are not as many as the recipe says."""
    world = int(os.environ["WORLD_SIZE"])
    if world != recipe.num_processes:
        raise TrainingError(
            f"{world} processes were launched, the parameters say num_processes: "
            f"{recipe.num_processes}; batch_size counts for each of them, so make the two agree"
        )
    PartialState(cpu=torch.cuda.device_count() == 0, timeout=timeout(recipe))


def _launch(
    work: Callable, arguments: tuple, watch: Callable[[pd.DataFrame], None] | None, show: bool
) -> None:
    """Runs the fit here, or in `num_processes` forked processes that accelerate joins."""
    recipe, folder = arguments[1:3]
    if _launched():
        work(*arguments, watch, show)
        AcceleratorState._reset_state()
        return
    if PartialState._shared_state:
        raise TrainingError(
            "accelerate was already started in this process; restart the kernel and run the "
            "training cell once"
        )
    if recipe.num_processes == 1:
        try:
            work(*arguments, watch, show)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
        return
    _refuse_fork(recipe)
    threads = patch_environment(omp_num_threads=os.environ.get("OMP_NUM_THREADS", "1"))
    with _watching(folder, watch), _child_errors(), threads:
        notebook_launcher(
            _forked,
            (work, arguments, show),
            num_processes=recipe.num_processes,
            use_port=str(_free_port()),  # two runs on one machine must not meet
        )


def _refuse_fork(recipe: Recipe) -> None:
    """Raises TrainingError where forked processes could not compute."""
    # torch otherwise asks the CUDA driver whether there is a GPU, after which no fork can use one.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if torch.cuda.is_initialized():
        raise TrainingError(
            "the GPU was already used in this process, and the processes of a launch are forked "
            "from it; restart the kernel and run the training cell before anything on the GPU"
        )
    if recipe.threads not in (None, 1):
        raise TrainingError(
            f"threads: {recipe.threads} with num_processes: {recipe.num_processes}: processes that "
            "are forked compute on one thread each; set threads: null, or start the processes by "
            "accelerate launch -m vitgal.training"
        )


def _forked(work: Callable, arguments: tuple, show: bool) -> None:
    """One forked process's fit."""
    # Threads do not survive a fork, and OpenMP would wait for its own for ever.
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    try:
        work(*arguments, None, show, forked=True)
    except RuntimeError as error:
        if _lost_peer(error):
            _await_launcher()
        raise


def _lost_peer(error: RuntimeError) -> bool:
    """Whether another process of the launch has gone: gloo's words for it, or NCCL's."""
    gone = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited")
    return any(words in str(error) for words in gone)


def _await_launcher() -> None:
    """Lets the launcher see the process that died, with the cause, before those that lost it.

    The launcher reports the first ended process that it finds and ends the others by SIGTERM.
    """
    threading.Event().wait(PEER_SECONDS)


@contextlib.contextmanager
def _child_errors() -> Iterator[None]:
    """The first failed process's own error, in place of the launcher's report."""
    try:
        yield
    except SignalException as error:
        raise Preempted(f"asked to end ({error}); the processes have saved their state") from error
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        said = failure.message
        said = said["message"] if isinstance(said, dict) else said
        if failure.exitcode < 0:
            said = f"it was killed ({failure.signal_name()}), perhaps for memory"
        kind = Preempted if "Preempted" in said else TrainingError
        raise kind(f"process {rank} of the launch failed: {said}") from error


@contextlib.contextmanager
def _watching(folder: Path, watch: Callable[[pd.DataFrame], None] | None) -> Iterator[None]:
    """Hands the log to `watch` while forked processes write it: they have no notebook."""
    if watch is None:
        yield
        return
    log, done = folder / "log.jsonl", threading.Event()

    def written() -> int | None:
        return log.stat().st_mtime_ns if log.exists() else None

    # The log of a run that goes on is shown here and not by the thread: a fork in the middle of a
    # drawing would leave its locks locked for ever. Later it is the forked processes who write it.
    begun = written()
    if begun is not None:
        watch(pd.read_json(log, lines=True))

    def look() -> None:
        seen = begun
        while not done.wait(WATCH_SECONDS):
            if written() != seen:
                seen = written()
                watch(pd.read_json(log, lines=True))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    watch(pd.read_json(log, lines=True))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _fit(
    build: Callable,
    recipe: Recipe,
    folder: Path,
    split: Path,
    image_folder: Path,
    owner: str,
    watch: Callable[[pd.DataFrame], None] | None,
    show: bool,
    forked: bool = False,
) -> None:
    """One process's fit: trains, and on rank 0 writes the model."""
    threads = 1 if forked else recipe.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    data = read_data(split, image_folder, recipe)
    trainer = Trainer(build(classes=data.classes), recipe, folder, data, owner)
    torch.set_num_threads(threads)  # accelerate has its own idea
    trainer.load_state()
    trainer.run(watch, show)
    if trainer.accelerator.is_main_process:
        weights.save_model(trainer.result.model, folder / "model.safetensors")
        runs.write_json(folder / "failures.json", trainer.progress.unreadable)
    if not _launched() or forked:
        trainer.accelerator.end_training()


def _recorded(recipe: Recipe) -> dict:
    return {
        "device": "cuda" if torch.cuda.device_count() else "cpu",
        "data_workers": recipe.data_workers,
        "processes": recipe.num_processes,
    }


# The command line: one of several processes that `accelerate launch` starts, or one alone


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
    except pipeline.ParameterError as error:
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
    every = pipeline.chain(runs.checkout() / "notebooks")
    chosen = pipeline.select(every, only=[only] if only else list(STAGES))
    run, taken = pipeline.plan(
        pipeline.own_range(pipeline.read_params(params))[0],
        every,
        chosen,
        overrides=overrides or {},
        output=output,
        source=str(params),
    )
    values = {}
    for path in chosen:
        found = {name: line.default for name, line in pipeline.declared(path).items()}
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


# What notebooks 02 and 03 show


def schedule_table(recipe: Recipe) -> pd.DataFrame:
    """The learning rate of each epoch, as `plots.training_curves` draws it: epoch, lr."""
    rates = learning_rates(recipe)
    return pd.DataFrame({"epoch": range(len(rates)), "lr": rates})


def epoch_table(log: pd.DataFrame, *, last: int = 5) -> pd.DataFrame:
    """The last validated epochs of a log as text: shares in percent, rates with an exponent.

    log: see `read_log`. A column that the log lacks is left out; an empty log gives no row.
    """
    shown = {
        "epoch": ("epoch", "{:.0f}"),
        "step": ("step", "{:.0f}"),
        "lr": ("lr", "{:.1e}"),
        "loss": ("loss", "{:.3f}"),
        "accuracy": ("train %", "{:.1f}"),
        "val_accuracy": ("val %", "{:.1f}"),
        "val_accuracy_margin": ("val % (margin)", "{:.1f}"),
        "val_map": ("mAP %", "{:.1f}"),
        "val_reconstruction": ("val reconstruction", "{:.4f}"),
        "images_per_second": ("images/s", "{:.1f}"),
        "hours_left": ("hours left", "{:.2f}"),
    }
    scored = [name for name in ("val_accuracy", "val_map") if name in log]
    rows = log.dropna(subset=scored, how="all").tail(last) if scored else log[:0]
    columns = {}
    for name, (title, form) in shown.items():
        if name in rows:
            values = 100 * rows[name] if title.startswith(("train", "val %", "mAP")) else rows[name]
            columns[title] = [form.format(value).replace("nan", "-") for value in values]
        if name == "val_map" and {"val_map_low", "val_map_high"} <= set(rows):
            ends = zip(100 * rows["val_map_low"], 100 * rows["val_map_high"], strict=True)
            columns["95 % interval"] = [f"{low:.1f} to {high:.1f}" for low, high in ends]
    return pd.DataFrame(columns)


def parameter_table(model: ViTGaL) -> pd.DataFrame:
    """Parameters of each part of the network: columns part, parameters, share."""
    backbone = model.backbone
    parts = {
        "patch embedding": (backbone.patch_embed, backbone.pos_embed),
        "XCiT blocks": (backbone.blocks,),
        "multi-atrous block": (model.local_atrous,),
        "class attention": (backbone.cls_attn_blocks, backbone.norm),
    }
    if model.autoencoder is not None:
        parts["autoencoder"] = (model.autoencoder,)
    counts = [
        sum(parameter.numel() for module in modules for parameter in module.parameters())
        for modules in parts.values()
    ]
    shares = [f"{100 * count / sum(counts):.0f} %" for count in counts]
    return pd.DataFrame({"part": list(parts), "parameters": counts, "share": shares})


def validation_photographs(split: Path, image_folder: Path, *, count: int) -> list[np.ndarray]:
    """`count` validation images, (H, W, 3) uint8 RGB each, spread evenly over their list."""
    paths = landmarks.read_split(split, "val")["path"].tolist()
    chosen = np.linspace(0, len(paths) - 1, num=min(count, len(paths)), dtype=int)
    return [images.read_image(Path(image_folder) / paths[index]) for index in chosen]


@torch.no_grad()
def token_maps(
    model: ViTGaL, photographs: Sequence[np.ndarray], *, size: int
) -> dict[str, list[np.ndarray]]:
    """Per photograph (h, w) maps: the codes' reconstruction error, and attention before and after.

    Args:
        photographs: (H, W, 3) uint8 RGB; each is squashed to `size` x `size` pixels.
    Returns:
        "error": mean squared difference of tokens and decoded tokens; "backbone_attention" and
        "attention": the means over heads of the two class attentions.
    """
    maps: dict[str, list[np.ndarray]] = {"error": [], "backbone_attention": [], "attention": []}
    for photograph in photographs:
        found = model.token_features(squashed(photograph, size)[None])
        maps["error"].append((found.decoded - found.tokens).square().mean(2)[0])
        maps["backbone_attention"].append(found.backbone_attention.mean(1)[0])
        maps["attention"].append(found.attention.mean(1)[0])
    grid = (size // 16, size // 16)
    return {key: [one.reshape(grid).numpy() for one in value] for key, value in maps.items()}


@torch.no_grad()
def lost_variance(model: ViTGaL, photographs: Sequence[np.ndarray], *, size: int) -> float:
    """The share of the tokens' variance that the autoencoder loses: 0 is perfect, 1 the mean token.

    photographs: (H, W, 3) uint8 RGB, each squashed to `size` x `size` pixels.
    """
    found = [model.token_features(squashed(photograph, size)[None]) for photograph in photographs]
    tokens = torch.cat([one.tokens[0] for one in found])
    decoded = torch.cat([one.decoded[0] for one in found])
    return float((decoded - tokens).square().sum() / (tokens - tokens.mean(0)).square().sum())


def same_backbone(model: ViTGaL, source: Path) -> bool:
    """Whether every tensor of the model but its autoencoder's is, bit for bit, that of `source`."""
    other = weights.load_model(source).state_dict()
    return all(
        torch.equal(value, other[key])
        for key, value in model.state_dict().items()
        if not key.startswith("autoencoder.")
    )


if __name__ == "__main__":
    sys.exit(main())
