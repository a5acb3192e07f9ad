"""Every file in params/ against the notebooks that read it, and against the published values."""

from pathlib import Path

import pytest

from vitgal import runs
from vitgal.app import parameters, pipeline
from vitgal.data.demo import photographs
from vitgal.data.download import sources

TOP = Path(__file__).resolve().parents[2]
FILES = {path.stem: path for path in sorted((TOP / "params").glob("*.yaml"))}
NOTEBOOKS = sorted((TOP / "notebooks").glob(parameters.CHAIN))
TRAIN = ["s12_train", "s24_train"]
TEST = [
    f"{model}_{dataset}{distractors}"
    for model in ("s12", "s24")
    for dataset in ("roxford5k", "rparis6k")
    for distractors in ("", "_r1m")
]
# What says how to run and not what comes out, and what only the demo data has.
MACHINE = {"overwrite", "workers", "threads", "data_workers", "batch_size_inference"}
MACHINE |= {"engine", "ray_address", "checkpoint_minutes", "timeout_minutes", "dry_run"}
MACHINE |= {"match_device", "read_threads", "local_batch_size", "worker", "worker_count"}
DEMO = {"demo_views", "demo_view_size"}


def read(name: str) -> dict:
    return parameters.own_range(parameters.read_params(FILES[name]))[0]


def differing(one: str, other: str) -> set[str]:
    """The names whose values differ between two files."""
    a, b = read(one), read(other)
    return {name for name in a.keys() | b.keys() if a.get(name) != b.get(name)}


def test_the_files_are_those_that_are_documented():
    assert set(FILES) == {*TRAIN, *TEST, "demo", "tiny", "small_weights"}


@pytest.mark.parametrize("name", FILES)
def test_every_parameter_is_declared_and_of_its_type(name):
    folder, _ = pipeline.plan(read(name), NOTEBOOKS, NOTEBOOKS, overrides={}, source=name)
    assert folder.name == name.removesuffix("_train")


@pytest.mark.parametrize("name", FILES)
def test_a_real_file_names_the_notebooks_it_is_made_for(name):
    # Without it, an evaluation would first train the demo, and a week's training end in an error.
    _, first, last = parameters.own_range(parameters.read_params(FILES[name]))
    training = [*TRAIN, "small_weights"]
    wanted = ("01", "03") if name in training else ("04", "07") if name in TEST else (None, None)
    assert (first, last) == wanted


def test_the_demo_changes_no_notebook():
    _, taken = pipeline.plan(read("demo"), NOTEBOOKS, NOTEBOOKS, overrides={})
    assert not any(taken.values())


def test_run_folders_are_distinct():
    folders = [read(name)["run_dir"] for name in FILES]
    assert len(set(folders)) == len(folders)


def test_notebooks_agree_on_what_they_share():
    # One file feeds them all, and a run of the defaults must find its own earlier stages.
    found: dict[str, parameters.Declaration] = {}
    for path in NOTEBOOKS:
        for name, declaration in parameters.declared(path).items():
            first = found.setdefault(name, declaration)
            assert (declaration.kind, declaration.default) == (first.kind, first.default), (
                f"{name} in {declaration.notebook} and in {first.notebook}"
            )
    assert found["run_dir"].default == read("demo")["run_dir"]


@pytest.mark.parametrize("name", [*TRAIN, *TEST])
def test_a_real_file_leaves_nothing_to_the_demo(name):
    numbers = ("01", "02", "03") if name in TRAIN else ("04", "05", "06", "07")
    declared = set()
    for path in NOTEBOOKS:
        if path.name.startswith(numbers):
            declared |= parameters.declared(path).keys()
    # Distractors are for _r1m alone, and their absence is the notebook's default.
    assert declared - set(read(name)) - MACHINE - DEMO <= {"distractors"}


@pytest.mark.parametrize("name", [*TRAIN, *TEST])
def test_data_paths_are_what_download_brings(name):
    paths = {key: value for key, value in read(name).items() if parameters.is_path(key) and value}
    assert paths
    for key, value in paths.items():
        assert value.startswith("data/"), key
        assert sources.hint(runs.resolve(value)), f"{key}: {value}"
    data = {key for key, value in read(name).items() if str(value).startswith("data/")}
    assert data == set(paths)


@pytest.mark.parametrize("model", ["s12", "s24"])
def test_training_is_as_published(model):
    found = read(f"{model}_train")
    # The paper's section 4 and the published command lines; where they differ, the code's value.
    published = {
        "architecture": f"xcit_small_{model[1:]}_p16_224",
        "image_size": 512,
        "epochs": 40,
        "warmup_epochs": 1,
        "batch_size": 64,
        "num_processes": 2,
        "lr": 5e-5,
        "warmup_lr": 3e-5,
        "min_lr": 1e-7,
        "weight_decay": 0.005,
        "drop_path": 0.1,
        "margin": 0.15,
        "scale": 30.0,
        "augment": "published",
        "precision": "fp16",
        "validate_every": 4,
        "ae_epochs": 25,
        "ae_lr": 5e-5,
        "reconstruction_weight": 10.0,
        "code_dim": 128,
        "val_share": 0.2,
        "held_out_classes": 0,
        "expected_images": 1_580_470,
        "expected_classes": 81_313,
        "clip_grad": None,
        "ae_warmup_lr": 3e-5,
        "ae_min_lr": 1e-7,
        "ae_weight_decay": 0.005,
        "accumulate": 1,
        "ema_decay": None,
        "layer_decay": None,
        "rand_augment": 0,
        "balanced": False,
        "label_smoothing": 0.0,
        "sub_centres": 1,
        "sampled_classes": None,
        "teacher": None,
        "teacher_weights": None,
    }
    assert {name: found.get(name) for name in published} == published
    assert found["initial_weights"].endswith(f"/{found['architecture']}.pth")


@pytest.mark.parametrize("name", TEST)
def test_evaluation_is_as_published(name):
    found = read(name)
    published = {
        "global_size": 512,
        "global_resize": "squash",
        "global_scales": [1.0],
        "crop_queries": True,
        "top": 100,
        "local_size": 512,
        "local_scales": [0.3535, 0.5, 0.7071, 1.0, 1.4142],
        "max_keypoints": 1000,
        "nms_candidates": 1200,
        "nms_overlap": 0.5,
        "target_per_scale": 400,
        "inference_precision": "fp32",
        "estimator": "degensac",
        "threshold": 16.0,
        "iterations": 2000,
        "confidence": 1.0,
        "max_distance": 0.79 if name.startswith("s24") else 0.82,  # RParis: nothing is published
    }
    assert {key: found.get(key) for key in published} == published
    model, dataset = name.split("_")[:2]
    assert found["weights"] == f"data/weights/vitgal_{model}.pth"
    assert (found["dataset"], found["dataset_dir"]) == (dataset, f"data/{dataset}")
    assert found.get("distractors") == ("data/revisitop1m" if name.endswith("_r1m") else None)


def test_the_small_weights_never_saw_what_the_demo_tests_or_tunes_on():
    # the held-out landmarks follow from seed and number alone, notebook 06 tunes on them
    found, every = read("small_weights"), {}
    for path in NOTEBOOKS:
        every |= {name: line.default for name, line in parameters.declared(path).items()}
    for name in ("seed", "held_out_classes", "code_dim", "architecture", "exclude", "train_table"):
        assert found.get(name, every[name]) == every[name]
    assert {"notre_dame_paris", "arc_du_carrousel"} <= set(photographs.BENCHMARK_LANDMARKS)


def test_variants_differ_in_nothing_else():
    assert differing(*TRAIN) == {"run_dir", "architecture", "initial_weights"}
    for name in TEST[::2]:
        assert differing(name, f"{name}_r1m") == {"run_dir", "distractors"}
    for dataset in ("roxford5k", "rparis6k"):
        assert differing(f"s12_{dataset}", f"s24_{dataset}") == {
            "run_dir",
            "weights",
            "max_distance",
        }
    datasets = {"run_dir", "dataset", "dataset_dir"}
    for model in ("s12", "s24"):
        assert differing(f"{model}_roxford5k", f"{model}_rparis6k") == datasets


def test_only_the_demo_checks_scores():
    every = {name: d for path in NOTEBOOKS for name, d in parameters.declared(path).items()}
    bounds = {
        name
        for name, declaration in every.items()
        if declaration.kind == "float | None" and declaration.default is not None
    }
    assert len(bounds) >= 3  # Medium mAP, its gain by training, Hard mAP's gain by reranking
    for file in ("tiny", "s12_train", "s12_roxford5k"):
        found = read(file)
        assert all(found[name] is None for name in bounds & found.keys())
    assert bounds <= read("tiny").keys()
