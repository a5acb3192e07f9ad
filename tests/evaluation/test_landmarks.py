"""Which queries show one landmark: label sets written by hand, and the real ones' eleven."""

from pathlib import Path

import numpy as np
import pytest

from vitgal.data.revisited import GroundTruth, load_ground_truth
from vitgal.evaluation import landmarks
from vitgal.evaluation.scores import resampled, scores_document

REVISITED = Path(__file__).parents[2].parent / "shared" / "data" / "revisited"


def truth(easy, hard=None, junk=None, queries=None) -> GroundTruth:
    count = len(easy)
    return GroundTruth(
        name="small",
        database=[str(index) for index in range(20)],
        queries=queries or [f"q{index}" for index in range(count)],
        boxes=np.tile([0.0, 0, 1, 1], (count, 1)),
        easy=[np.array(images, np.int64) for images in easy],
        hard=[np.array(images, np.int64) for images in hard or [[]] * count],
        junk=[np.array(images, np.int64) for images in junk or [[]] * count],
    )


def test_queries_that_share_labelled_images_show_one_landmark():
    # 0 and 1 share 3 of 5; 2 shares 1 of 7 with 0 and stays alone; 3 and 4 share all, by junk.
    found = landmarks.find_landmarks(
        truth(
            easy=[[0, 1, 2], [0, 1], [3, 10, 11, 12], [15], []],
            hard=[[3], [2, 4], [], [], [15]],
            junk=[[], [], [], [16], [16]],
        )
    )
    assert found.groups.tolist() == [0, 0, 1, 2, 2]
    assert (found.source, found.count) == ("labels", 3)
    assert str(found).startswith("intervals and tests resample 3 landmarks (queries that share")


def test_a_query_between_two_connects_them():
    # Neighbours share 2 of 4 images, the ends share none.
    found = landmarks.find_landmarks(truth([[0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5]]))
    assert found.groups.tolist() == [0, 0, 0, 0]
    assert str(found).endswith(": one alone has no interval")


@pytest.mark.parametrize("easy", [[[], []], [[0], [1]], [[]], []])
def test_queries_that_share_nothing_are_their_own(easy):
    found = landmarks.find_landmarks(truth(easy))
    assert found.groups.tolist() == list(range(len(easy)))
    assert found.source == "queries"
    assert "each is taken for a landmark of its own" in str(found)


def test_names_tell_landmarks_where_all_follow_the_pattern():
    found = landmarks.landmarks_by_names(["all_souls_000013", "keble_000245", "all_souls_000026"])
    assert (found.groups.tolist(), found.source) == ([0, 1, 0], "names")
    assert ": with two, an interval reaches from the one's mean to the other's" in str(found)
    for names in (
        ["all_souls_000013", "all_souls_000026", "x"],
        ["query_1", "query_2"],
        ["a_1", "b_2"],
    ):
        found = landmarks.landmarks_by_names(names)
        assert (found.groups.tolist(), found.source) == ([*range(len(names))], "queries")


def test_record_decides_before_names_and_another_result_helps_out():
    scores = {"medium": {"map": 0.5, "mp_at": {}, "ap": np.array([0.5, 0.25, 1.0])}}
    names = ["a_1", "b_2", "a_3"]
    record = scores_document(
        scores,
        protocol={},
        parameters={},
        inputs={},
        ground_truth=truth([[0], [0], [1]], queries=names),
    )
    assert record["bootstrap"]["landmarks"] == [0, 0, 1]
    assert record["bootstrap"]["landmarks_from"] == "labels"
    # Means of landmarks: 3/8 and 1; both queries of the one and the other: 7/12.
    assert record["medium"]["interval"] == [0.375, 1.0]
    assert resampled(record).groups.tolist() == [0, 0, 1]
    assert resampled(scores, record).source == "labels"
    assert resampled({**scores, "queries": names}).source == "names"
    assert resampled(scores).source == "queries"
    with pytest.raises(ValueError, match="no scores of easy, medium, hard"):
        resampled({})


@pytest.mark.parametrize("name", ["roxford5k", "rparis6k"])
@pytest.mark.skipif(not REVISITED.is_dir(), reason=f"needs {REVISITED}")
def test_revisited_sets_have_eleven_landmarks(name):
    # As published: five queries of each of eleven landmarks, then fifteen more of five of them.
    more = {"roxford5k": (0, 1, 4, 6, 10), "rparis6k": (0, 1, 6, 7, 10)}[name]
    wanted = [*np.repeat(np.arange(11), 5), *np.repeat(more, 3)]
    found = landmarks.find_landmarks(load_ground_truth(REVISITED / f"gnd_{name}.pkl"))
    assert found.groups.tolist() == wanted
