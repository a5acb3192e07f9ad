"""One query against its candidates, matched and verified."""

import dataclasses

from tests.retrieval_cases import image_pair
from vitgal.retrieval.verification import inspect_pair, inspect_shortlist
from vitgal.settings import MatchingSettings, RerankingSettings, VerificationSettings

SETTINGS = RerankingSettings(matching=MatchingSettings(max_distance=0.5))


def test_inspect_pair_matches_then_verifies():
    query, database = image_pair(20, 30)
    result = inspect_pair(query, database, SETTINGS)
    assert result.matches.tolist() == [[i, i] for i in range(20)]
    assert result.verification.count == 20
    changed = dataclasses.replace(
        SETTINGS,
        matching=MatchingSettings(max_distance=0.5, max_keypoints=7),
        verification=VerificationSettings(estimator="magsac"),
    )
    fewer = inspect_pair(query, database, changed)
    assert fewer.matches.tolist() == [[i, i] for i in range(7)]
    nothing = inspect_pair(query.subset([]), database, SETTINGS)
    assert nothing.matches.shape == (0, 2) and nothing.verification.count == 0


def test_inspect_shortlist_equals_pair_by_pair():
    query, first = image_pair(20, 30)
    candidates = [first, image_pair(8, 5, 1)[1], query.subset([]), query]
    pairs = inspect_shortlist(query, iter(candidates), SETTINGS)
    counts = [pair.verification.count for pair in pairs]
    alone = [inspect_pair(query, image, SETTINGS) for image in candidates]
    assert counts == [pair.verification.count for pair in alone]
    assert counts[2:] == [0, 50] and list(inspect_shortlist(query, [], SETTINGS)) == []
