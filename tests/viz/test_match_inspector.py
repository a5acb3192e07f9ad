"""The match inspector: what each control changes, and what the network adds."""

import numpy as np
import pytest

from vitgal.data import revisited
from vitgal.models.network import build_model
from vitgal.models.weights import save_model
from vitgal.settings import RerankingSettings
from vitgal.stages import inspection
from vitgal.viz.match_inspector import MatchInspector


def settings(**values: object) -> RerankingSettings:
    return RerankingSettings.build(values)


@pytest.fixture
def match_inspector(inspected_run) -> MatchInspector:
    benchmark = revisited.open_dataset("tiny", inspected_run)
    inspector = inspection.Inspector(
        inspected_run, benchmark, weights=str(inspected_run / "model.safetensors")
    )
    return MatchInspector(inspector, 0, None, settings(max_distance=1.0))


def seen(match_inspector) -> tuple[list[bytes], str]:
    return [
        bytes(image.value) for image in match_inspector.output.pictures.children
    ], match_inspector.output.words.value


def test_the_inspector_begins_with_the_best_hard_image(match_inspector):
    assert [label for label, _ in match_inspector.image.list.options] == [
        "a  (easy, 9 inliers)",
        "b  (hard, 6 inliers)",
        "d  (negative, 4 inliers)",
        "c  (junk, 0 inliers)",
    ]
    assert match_inspector.image.value == 1
    (picture,), words = seen(match_inspector)
    assert picture.startswith(b"\x89PNG")
    pair = match_inspector.inspector.pair(0, 1, settings(max_distance=1.0))
    assert pair.sentence() in words


def test_every_knob_changes_the_pair_as_it_stands(match_inspector):
    match_inspector.image.list.value = 0
    whole = match_inspector.pair()
    assert len(whole.result.matches) == whole.result.verification.count == 40  # the same photograph
    match_inspector.count.value = 20
    assert len(match_inspector.pair().query) == 20
    match_inspector.hidden_scales.value = (0.7071,)
    assert set(match_inspector.pair().query.scales) == {1.0}
    assert "not extracted anew" in seen(match_inspector)[1] and "0.707" in seen(match_inspector)[1]
    match_inspector.hidden_scales.value = ()
    match_inspector.image.list.value = 1
    before, _ = seen(match_inspector)
    match_inspector.distance.value = 0.0
    after, words = seen(match_inspector)
    assert before != after and len(match_inspector.pair().result.matches) < 5
    assert "below 5 no homography" in words
    (
        match_inspector.estimator.value,
        match_inspector.distance.value,
        match_inspector.threshold.value,
    ) = "magsac", 1.2, 3.0
    wanted = match_inspector.inspector.pair(
        0, 1, settings(max_distance=1.2, match_keypoints=20, estimator="magsac", threshold=3.0)
    )
    np.testing.assert_array_equal(
        match_inspector.pair().result.verification.inliers, wanted.result.verification.inliers
    )


def test_the_way_of_matching_is_a_knob(match_inspector):
    assert match_inspector.matching.value == "one_way"
    match_inspector.matching.value = "mutual"
    partners = match_inspector.pair().result.matches[:, 1].tolist()
    assert len(set(partners)) == len(partners) > 0


def test_one_pass_a_photograph_shows_attention_and_dropped_features(match_inspector):
    assert len(match_inspector.attention.options) == 1 and not match_inspector.inspector.selections
    plain, _ = seen(match_inspector)
    match_inspector.button.click()
    assert set(match_inspector.inspector.selections) == {("query", 0), ("database", 1)}
    heated, _ = seen(match_inspector)
    assert heated != plain
    assert len(match_inspector.attention.options) == 1 + 2 * (
        1 + 4
    )  # none; two scales, all heads and each of four
    first = dict(match_inspector.inspector.selections)
    match_inspector.attention.value = (0.7071, 2)
    assert seen(match_inspector)[0] != heated
    match_inspector.button.click()
    assert all(
        match_inspector.inspector.selections[side] is selection for side, selection in first.items()
    )
    match_inspector.image.list.value = 0  # not looked at yet: said, and drawn without
    assert "press the button" in seen(match_inspector)[1] and len(seen(match_inspector)[0]) == 1


def test_any_database_image_by_name_or_index(match_inspector):
    match_inspector.other_image.value = "z"
    assert (
        "there is no database image &#x27;z&#x27;" in seen(match_inspector)[1]
        and seen(match_inspector)[0] == []
    )
    match_inspector.other_image.value = "7"
    assert "there is no database image 7: tiny has 0 to 4" in seen(match_inspector)[1]
    match_inspector.other_image.value = "3"
    assert match_inspector.image.value == 3 and len(seen(match_inspector)[0]) == 1
    match_inspector.other_image.value = "e"
    assert "on no short list" in seen(match_inspector)[1] and seen(match_inspector)[0] == []
    match_inspector.button.click()  # the pass gives its features too
    assert len(seen(match_inspector)[0]) == 1


def test_a_query_without_verified_images(match_inspector):
    match_inspector.query.list.value = 1
    assert "no verified image: type any database image" in seen(match_inspector)[1]
    match_inspector.other_image.value = "a"
    assert len(seen(match_inspector)[0]) == 1
    match_inspector.query.list.value = 0
    assert match_inspector.image.value == 0 and len(match_inspector.image.list.options) == 4


def test_other_weights_are_refused(match_inspector, inspected_run, tmp_path):
    other = tmp_path / "other.safetensors"
    save_model(build_model("xcit_nano_12_p16_224", code_dim=8, seed=1), other)
    benchmark = revisited.open_dataset("tiny", inspected_run)
    inspector = inspection.Inspector(inspected_run, benchmark, weights=str(other))
    with pytest.raises(inspection.InspectionError, match=r"other\.safetensors is not the model"):
        inspector.selection("query", 0)
    with pytest.raises(inspection.InspectionError, match="no query 5: tiny has 0 to 1"):
        inspector.image("query", 5)
