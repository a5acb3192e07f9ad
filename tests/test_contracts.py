"""What users' scripts rely on: names importable from `vitgal`, the order of arguments, defaults."""

import dataclasses
import inspect

import pytest

import vitgal
from vitgal.settings import SelectionSettings

# Each as it is written in a script that gives everything by position, with the defaults.
SIGNATURES = {
    "load_model": {"source": ..., "device": "cpu"},
    "initial_weights": {"model": ..., "source": ...},
    "extract_global": {
        "model": ...,
        "images": ...,
        "boxes": None,
        "size": 512,
        "resize": "squash",
        "scales": (1.0,),
        "batch_size": 16,
    },
    "extract_local": {"model": ..., "image": ..., "box": None},
    "match": {"query_descriptors": ..., "gallery_descriptors": ..., "max_distance": 0.82},
    "verify": {
        "query_points": ...,
        "gallery_points": ...,
        "estimator": "degensac",
        "threshold": 16.0,
        "iterations": 2000,
        "confidence": 1.0,
        "seed": 0,
    },
    "load_ground_truth": {"path": ...},
    "evaluate": {"ranking": ..., "ground_truth": ..., "kappas": (1, 5, 10)},
}
FIELDS = {
    "TokenFeatures": "codes attention backbone_attention tokens decoded grid",
    "LocalFeatures": "keypoints descriptors scores scales input_size box image_size",
    "Verification": "inliers homography",
    "GroundTruth": "name database queries boxes easy hard junk",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_functions_have_the_documented_parameters_in_order(name):
    result = inspect.signature(getattr(vitgal, name)).parameters
    wanted = SIGNATURES[name]
    assert list(result)[: len(wanted)] == list(wanted)
    for key, default in wanted.items():
        assert result[key].kind == inspect.Parameter.POSITIONAL_OR_KEYWORD, key
        assert result[key].default == (inspect.Parameter.empty if default is ... else default), key
    # Whatever else there is has a default.
    for parameter in list(result.values())[len(wanted) :]:
        named = parameter.kind == inspect.Parameter.KEYWORD_ONLY
        assert parameter.kind == inspect.Parameter.VAR_KEYWORD or (
            named and parameter.default is not inspect.Parameter.empty
        ), parameter


@pytest.mark.parametrize("name", FIELDS)
def test_results_have_the_fields_they_promise(name):
    fields = {field.name for field in dataclasses.fields(getattr(vitgal, name))}
    assert set(FIELDS[name].split()) <= fields


def test_what_is_asked_of_objects():
    assert isinstance(vitgal.Verification.count, property)
    for owner, names in (
        ("ViTGaL", "global_features token_features embed_dim code_dim"),
        ("LocalFeatures", "original_keypoints"),
        ("FeatureStore", "open raw keys __getitem__"),
        ("Positions", "from_ranks"),
    ):
        for name in names.split():
            assert hasattr(getattr(vitgal, owner), name), f"{owner}.{name}"


def test_local_options_are_the_published_ones():
    published = {
        "scales": (0.3535, 0.5, 0.7071, 1.0, 1.4142),
        "max_keypoints": 1000,
        "nms_candidates": 1200,
        "nms_overlap": 0.5,
        "target_per_scale": 400,
        "ladder": tuple(60 / 2**step for step in range(7)),  # down to 0.9375
    }
    defaults = SelectionSettings()
    assert {name: getattr(defaults, name) for name in published} == published
    assert inspect.signature(vitgal.extract_local).parameters["size"].default == 512
