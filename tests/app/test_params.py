"""Every file in params/ against the notebooks that read it, and against the published values."""

import functools
from pathlib import Path

import pytest

from vitgal import runs
from vitgal.app import pipeline
from vitgal.data.demo import photographs
from vitgal.data.download import sources
from vitgal.models.network import outline
from vitgal.settings import reader, sections
from vitgal.settings.section import conform

TOP = Path(__file__).resolve().parents[2]
FILES = {path.stem: path for path in sorted((TOP / "params").glob("*.yaml"))}
NOTEBOOKS = sorted((TOP / "notebooks").glob(pipeline.CHAIN))
TRAIN = ["s12_train", "s24_train"]
# As TRAIN and TEST, with another backbone.
ON_TIMM = ["dinov2_train", "dinov2_frozen_train"]
TEST_ON_TIMM = ["dinov2_roxford5k", "dinov2_rparis6k"]
TEST = [
    f"{model}_{dataset}{distractors}"
    for model in ("s12", "s24")
    for dataset in ("roxford5k", "rparis6k")
    for distractors in ("", "_r1m")
]
BOUNDS = {"min_train_gain", "max_reconstruction", "min_medium_map", "min_gain", "min_rerank_gain"}


def read(name: str) -> dict:
    """A file's settings, those of the files it extends included."""
    return dict(reader.read_file(FILES[name]).without("notebooks").values)


@functools.cache
def effective(name: str) -> dict:
    """What the notebooks that a file is made for run with, by flat name."""
    values = reader.read_file(FILES[name])
    chosen = pipeline.select(NOTEBOOKS, between=pipeline.notebook_range(values))
    _, injected = pipeline.plan(values, NOTEBOOKS, chosen)
    result = {}
    for path in chosen:
        whole = pipeline.settings_in(path, injected[path])
        for section in sections.NOTEBOOKS[path.stem]:
            built = whole.section(section)
            result = flat_values(built) | result  # code_dim: of training, before that of 05
    return result


def flat_values(section) -> dict:
    """The values of a section by flat name; tuples as lists, as YAML has them."""
    parts = [section]
    if isinstance(section, sections.RerankingSettings):
        parts += [section.verification, section.matching]
    values = {}
    for part in parts:
        for name, entry in type(part).flat().items():
            if hasattr(part, entry.name):
                value = getattr(part, entry.name)
                values[name] = list(value) if isinstance(value, tuple) else value
    return values


def differing(one: str, other: str) -> set[str]:
    """The names whose values differ between two files."""
    a, b = effective(one), effective(other)
    return {name for name in a.keys() | b.keys() if a.get(name) != b.get(name)}


def test_the_files_are_those_that_are_documented():
    assert set(FILES) == {
        *(*TRAIN, *ON_TIMM, *TEST, *TEST_ON_TIMM),
        *("demo", "tiny", "distilled_nano", "published", "lite0_head"),
    }


@pytest.mark.parametrize("name", FILES)
def test_every_setting_is_known_and_of_its_type(name):
    folder, _ = pipeline.plan(reader.read_file(FILES[name]), NOTEBOOKS, NOTEBOOKS)
    if name != "published":  # names no run: the files that extend it do
        assert folder.name == name.removesuffix("_train")


@pytest.mark.parametrize("path", sorted((TOP / "params").glob("*/*.yaml")), ids=lambda p: p.stem)
def test_recipes_hold_training_and_machines_hold_speed(path):
    values = reader.read_file(path).values
    kinds = {"recipes": (sections.TrainingSettings, sections.AutoencoderSettings)}
    kinds |= {"machines": (sections.MachineSettings,)}
    names = {name for kind in kinds[path.parent.name] for name in kind.flat()}
    if path.parent.name == "recipes":
        names.add("num_processes")  # batch_size counts for each of them
    else:
        names |= {"inference_precision", "shard_size"}  # what a GPU needs to be fast
    assert set(values) <= names
    reader.settings_of(reader.checked(reader.Values.of(values, path.name)))


@pytest.mark.parametrize("name", FILES)
def test_a_real_file_names_its_notebooks(name):
    # Without it, an evaluation would first train the demo, and a week's training end in an error.
    wanted = (None, None)
    if name in (*TRAIN, *ON_TIMM, "distilled_nano", "lite0_head"):
        wanted = ("01", "03")
    if name in (*TEST, *TEST_ON_TIMM):
        wanted = ("04", "07")
    assert pipeline.notebook_range(reader.read_file(FILES[name])) == wanted


def test_the_demo_changes_no_notebook():
    _, injected = pipeline.plan(reader.read_file(FILES["demo"]), NOTEBOOKS, NOTEBOOKS)
    assert not any(injected.values())


def test_run_folders_are_distinct():
    folders = [read(name)["run_dir"] for name in FILES if name != "published"]
    assert len(set(folders)) == len(folders)


def test_an_evaluation_says_little():
    for name in TEST:
        lines = [line for line in FILES[name].read_text().splitlines() if line[:1] not in ("", "#")]
        assert len(lines) <= 12, name


def test_notebooks_agree_on_what_they_share():
    # One file feeds them all, and a run of the defaults must find its own earlier stages.
    first: dict[str, pipeline.Declaration] = {}
    for path in NOTEBOOKS:
        for name, declaration in pipeline.declared(path).items():
            assert first.setdefault(name, declaration) == declaration, f"{name} in {path.stem}"
    assert first["run_dir"].default == read("demo")["run_dir"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_cell_repeats_no_default_and_leaves_recipes_alone(path):
    """None, True and False say only that something is on, off or left to the setting's default."""
    files = [path for path in sorted((TOP / "params").glob("*/*.yaml"))]
    layered = {name for file in files for name in reader.read_file(file).values}
    for name, line in pipeline.declared(path).items():
        (kind, *_) = [k for k in sections.NOTEBOOKS[path.stem] if name in k.flat()]
        assert name not in layered, f"{name} would beat every recipe and machine"
        default = kind.flat()[name].default
        plain = list(default) if isinstance(default, tuple) else default
        assert line.default in (None, True, False) or line.default != plain, name
        conform(name, line.default, kind.flat()[name].type)  # raises for another type


@pytest.mark.parametrize("name", [*TRAIN, *ON_TIMM, *TEST, *TEST_ON_TIMM])
def test_a_real_file_leaves_nothing_to_the_demo(name):
    values = reader.read_file(FILES[name])
    for path in pipeline.select(NOTEBOOKS, between=pipeline.notebook_range(values)):
        for setting, line in pipeline.declared(path).items():
            (kind, *_) = [k for k in sections.NOTEBOOKS[path.stem] if setting in k.flat()]
            default = kind.flat()[setting].default
            demo = line.default != (list(default) if isinstance(default, tuple) else default)
            assert not demo or setting in values.values, f"{setting} of {path.stem}"


@pytest.mark.parametrize("name", [*TRAIN, *ON_TIMM, *TEST])
def test_data_paths_are_what_download_brings(name):
    result = effective(name)
    paths = {key: value for key, value in result.items() if sections.is_path(key) and value}
    if name in ON_TIMM:
        assert paths.pop("initial_weights") == "pretrained"
    assert paths
    for key, value in paths.items():
        assert value.startswith("data/"), key
        assert sources.source_of(runs.resolve(value)), f"{key}: {value}"
    data = {key for key, value in result.items() if str(value).startswith("data/")}
    assert data == set(paths)


@pytest.mark.parametrize("model", ["s12", "s24"])
def test_training_is_as_published(model):
    result = effective(f"{model}_train")
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
    assert {name: result.get(name) for name in published} == published
    assert result["initial_weights"].endswith(f"/{result['architecture']}.pth")


@pytest.mark.parametrize("name", TEST)
def test_evaluation_is_as_published(name):
    result = effective(name)
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
        "matching": "one_way",
        "count": "inliers",
        "order": "inliers",
    }
    assert {key: result.get(key) for key in published} == published
    model, dataset = name.split("_")[:2]
    assert result["weights"] == f"data/weights/vitgal_{model}.pth"
    assert (result["dataset"], result["dataset_dir"]) == (dataset, f"data/{dataset}")
    assert result.get("distractors") == ("data/revisitop1m" if name.endswith("_r1m") else None)


def test_the_small_weights_never_saw_what_the_demo_tests_or_tunes_on():
    # the held-out landmarks follow from seed and number alone, notebook 06 tunes on them
    small, demo = effective("lite0_head"), effective("demo")
    for name in ("seed", "held_out_classes", "code_dim", "exclude", "train_table"):
        assert small[name] == demo[name]
    assert {"notre_dame_paris", "arc_du_carrousel"} <= photographs.BENCHMARK_LANDMARKS


def test_variants_differ_in_nothing_else():
    assert differing(*TRAIN) == {"run_dir", "recipe", "architecture", "initial_weights"}
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


@pytest.mark.parametrize("name", [*ON_TIMM, "lite0_head"])
def test_a_backbone_takes_the_sizes_of_its_file(name):
    result = effective(name)
    shape = outline(result["architecture"], embed_dim=result["embed_dim"])
    for size in (result["image_size"], result["ae_image_size"], 2 * result["ae_image_size"]):
        shape.check_size(size, size)
    assert result["code_dim"] < shape.embed_dim
    assert differing("dinov2_train", "dinov2_frozen_train") == {
        *("run_dir", "recipe", "freeze_backbone", "layer_decay", "drop_path", "epochs"),
        *("lr", "warmup_lr", "min_lr"),
    }


def test_dinov2_is_evaluated_as_the_others_but_for_its_size():
    for name, published in zip(TEST_ON_TIMM, ("s12_roxford5k", "s12_rparis6k"), strict=True):
        assert differing(name, published) == {"run_dir", "weights", "global_size", "local_size"}
        result = effective(name)
        shape = outline(effective("dinov2_train")["architecture"])
        shape.check_size(result["global_size"], result["global_size"])
        assert result["local_size"] % shape.multiple == 0
        trained = f"{effective('dinov2_train')['run_dir']}/autoencoder/model.safetensors"
        assert result["weights"] == f"runs/{trained}"


def test_only_the_demo_checks_scores():
    cells = [line for path in NOTEBOOKS for line in pipeline.declared(path).values()]
    bounds = {line.name for line in cells if line.name in BOUNDS}
    assert bounds == BOUNDS
    assert all(line.default is not None for line in cells if line.name in bounds)
    for file in ("tiny", *TRAIN, *ON_TIMM, *TEST, *TEST_ON_TIMM):
        result = effective(file)
        assert all(result[name] is None for name in bounds), file
