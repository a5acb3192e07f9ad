"""Precision and recall, against values worked out by hand and by scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import precision_recall_curve

from tests.viz.tiny_run import ranking_of, truth_of
from vitgal.evaluation import protocol


def test_ranks_of_right_images_leave_out_what_is_ignored_and_queries_without():
    truth = truth_of(2)  # query 0: a easy, b hard, c junk; query 1: nothing
    order = np.array([[3, 0], [2, 1], [1, 2], [0, 3]], np.int32)  # d c b a
    ranking = ranking_of(order, truth)
    assert [row.tolist() for row in protocol.positive_ranks(ranking, truth, "medium")] == [[1, 2]]
    assert [row.tolist() for row in protocol.positive_ranks(ranking, truth, "hard")] == [[1]]


def test_precision_is_the_best_at_this_recall_or_a_higher_one():
    # right at ranks 0 and 3: precision 1 up to recall 0.5, then 2 / 4; the second query 1 / 2
    ranks = [np.array([0, 3]), np.array([1])]
    levels = protocol.mean_precision(ranks, levels=5)
    assert levels == pytest.approx([0.75, 0.75, 0.75, 0.5, 0.5])
    assert np.isnan(protocol.mean_precision([], levels=3)).all()


def test_precision_equals_scikit_learn():
    labels = np.random.default_rng(0).random(60) < 0.2
    ours = protocol.mean_precision([np.flatnonzero(labels)])
    precision, recall, _ = precision_recall_curve(labels, -np.arange(60))
    expected = [precision[recall >= level - 1e-9].max() for level in np.linspace(0, 1, 101)]
    assert ours[1:] == pytest.approx(expected[1:])  # at 0 scikit-learn adds a precision of 1


def test_recall_is_the_share_within_a_list():
    ranks = [np.array([0, 3]), np.array([1])]
    assert protocol.mean_recall(ranks, np.array([1, 2, 4])) == pytest.approx([0.25, 0.75, 1])
    assert np.isnan(protocol.mean_recall([], np.array([1, 2]))).all()
