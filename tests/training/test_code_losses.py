"""The losses on codes, each against a value worked out by hand."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from tests.training_runs import AUTOENCODER, fit_autoencoder, rows
from vitgal import runs
from vitgal.models import weights
from vitgal.settings import AutoencoderSettings
from vitgal.training import code_losses

STILL = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])  # the map of a view that is the picture


def test_spread_by_hand():
    # Second moments: diag(1, 0, 0), a third of the identity, diag(3/4, 1/4).
    assert code_losses.spread(torch.tensor([[5.0, 0, 0], [-2, 0, 0]])).item() == pytest.approx(2)
    assert code_losses.spread(3 * torch.eye(3)).item() == pytest.approx(0, abs=1e-6)
    uneven = torch.tensor([[[1.0, 0], [2, 0]], [[-1, 0], [0, 1]]])  # (B, N, C)
    assert code_losses.spread(uneven).item() == pytest.approx(2 * (9 / 16 + 1 / 16) - 1)
    assert math.isfinite(code_losses.spread(torch.zeros(4, 3)).item())


def test_spread_is_the_mean_squared_cosine():
    codes = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) + 1
    cosines = F.cosine_similarity(codes[:, None], codes[None], dim=2)
    expected = 6 * cosines.square().mean() - 1
    assert code_losses.spread(codes).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_second_view_shows_what_its_map_says():
    size = 64
    axis = (2 * torch.arange(size) + 1) / size - 1  # pixel centres, edges at -1 and 1
    x, y = torch.meshgrid(axis, axis, indexing="xy")
    pictures = torch.stack([x, y, torch.ones(size, size)]).repeat(3, 1, 1, 1)
    torch.manual_seed(4)
    views, maps = code_losses.second_view(pictures)
    torch.manual_seed(4)
    offset, again = code_losses.second_view(torch.zeros_like(pictures))
    assert torch.equal(maps, again) and not torch.equal(maps[0], maps[1])
    for view, moved, change in zip(views, offset, maps.double(), strict=True):
        gain = (view[2] - moved[2])[size // 2, size // 2]
        assert 0.7 <= gain <= 1.3 and abs(moved[0, 0, 0]) <= 0.3
        points = torch.stack([x, y, torch.ones_like(x)], 2).double()
        expected = points @ change.T  # (S, S, 2)
        inside = (expected.abs() < 0.95).all(2)
        result = ((view - moved) / gain)[:2].permute(1, 2, 0).double()
        torch.testing.assert_close(result[inside], expected[inside], atol=1e-4, rtol=0)
        # a turn of at most 20 degrees and a zoom of at most 1.4
        zoom = change[:, :2].det().sqrt()
        assert 1 / 1.4 <= zoom <= 1.4 and abs(change[0, 1]) <= zoom * math.sin(math.radians(20))


def test_contrast_by_hand():
    # Four places with codes at right angles: a cosine of 1 with the own place, 0 with the others.
    codes = torch.eye(4)[None]
    grid, label = (2, 2), torch.tensor([0])
    right = code_losses.contrast(codes, 2 * codes, STILL, grid, label)
    assert right.item() == pytest.approx(math.log(1 + 3 * math.exp(-10)), rel=1e-3)
    wrong = code_losses.contrast(codes, codes.roll(1, 1), STILL, grid, label)
    assert wrong.item() == pytest.approx(10 + math.log(1 + 3 * math.exp(-10)), rel=1e-5)


def test_a_place_is_found_where_the_view_shows_it():
    # The view is the picture moved by one patch of three: (x, y) of the view is x + 2/3 there.
    codes = torch.eye(9)[None]
    moved = STILL + torch.tensor([[0.0, 0, 2 / 3], [0, 0, 0]])
    views = codes.view(1, 3, 3, 9).roll(-1, 2).flatten(1, 2)
    result = code_losses.contrast(codes, views, moved, (3, 3), torch.tensor([0]))
    # six of the nine places are in the picture
    assert result.item() == pytest.approx(math.log(1 + 5 * math.exp(-10)), rel=1e-3)
    away = STILL + torch.tensor([[0.0, 0, 5], [0, 0, 0]])
    codes.requires_grad_()
    none = code_losses.contrast(codes, views, away, (3, 3), torch.tensor([0]))
    none.backward()
    assert none.item() == 0 and codes.grad.abs().max() == 0


def test_other_pictures_of_a_landmark_are_no_wrong_answer():
    codes, maps = torch.eye(4).repeat(2, 1, 1), STILL.repeat(2, 1, 1)
    same = code_losses.contrast(codes, codes, maps, (2, 2), torch.tensor([3, 3]))
    assert same.item() == pytest.approx(math.log(1 + 3 * math.exp(-10)), rel=1e-3)
    other = code_losses.contrast(codes, codes, maps, (2, 2), torch.tensor([3, 4]))
    # the same code twice among eight
    assert other.item() == pytest.approx(math.log(2 + 6 * math.exp(-10)), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["whitened", "contrastive"])
def test_a_run_lowers_the_loss_of_its_codes(name, trained, images):
    settings = replace(AUTOENCODER, code_loss=name, code_loss_weight=2.0, image_size=64, epochs=8)
    folder = fit_autoencoder(trained, images, settings)
    log = rows(folder)
    assert log[-1]["codes"] < log[0]["codes"]
    parameters = runs.read_json(folder / "stage.json")["parameters"]
    assert (parameters["code_loss"], parameters["code_loss_weight"]) == (name, 2.0)
    model = weights.load_model(folder / "model.safetensors")
    before = weights.load_model(trained / "retrieval" / "model.safetensors").state_dict()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_the_published_loss_is_the_default():
    assert "code_loss" not in AutoencoderSettings().compared()
    with pytest.raises(ValueError, match="unknown code_loss 'mine'; known: published, whitened"):
        AutoencoderSettings(code_loss="mine")
    with pytest.raises(ValueError, match="code_loss_weight"):
        AutoencoderSettings(code_loss_weight=0.0)
