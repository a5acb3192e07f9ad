"""CUDA graphs: results are those of the plain computation; what cannot be recorded runs plainly."""

import warnings

import pytest
import torch

from vitgal.models import graphs as module
from vitgal.models.graphs import Graphs

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def squares(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    return inputs * inputs, inputs.sum(dim=1), inputs.shape[1]


def test_on_a_cpu_everything_runs_as_it_is():
    graphs = Graphs(squares)
    for value in (1.0, 2.0, 3.0):
        inputs = torch.full((2, 3), value)
        products, sums, width = graphs(inputs)
        assert products.tolist() == [[value**2] * 3] * 2 and sums.tolist() == [3 * value] * 2
        assert width == 3


@on_gpu
def test_recorded_results_are_the_plain_ones(monkeypatch):
    monkeypatch.setattr(module, "KEPT", 2)
    graphs, generator = Graphs(squares), torch.Generator("cuda").manual_seed(0)
    kept = []
    for size in (3, 3, 4, 3, 4, 5, 5, 6, 6, 3, 3):  # more shapes than are kept
        inputs = torch.rand(2, size, device="cuda", generator=generator)
        kept.append((graphs(inputs), squares(inputs)))
    for (products, sums, width), expected in kept:  # no later run has overwritten them
        assert torch.equal(products, expected[0]) and torch.equal(sums, expected[1])
        assert width == expected[2]


@on_gpu
def test_a_computation_that_waits_runs_as_it_is():
    def waits(inputs):
        return inputs * float(inputs.sum()), None

    graphs, inputs = Graphs(waits), torch.ones(2, device="cuda")
    graphs(inputs)
    with pytest.warns(UserWarning, match="CUDA graphs are not used"):
        assert graphs(inputs)[0].tolist() == [2, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert graphs(inputs)[0].tolist() == [2, 2]
