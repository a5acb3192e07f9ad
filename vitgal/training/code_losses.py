"""Losses on the autoencoder's codes, so that a limit on distances separates true and false matches.

The published loss trains codes to give the landmark and to reconstruct the tokens. It does not
control how they spread: most can lie close together, and every feature then has a neighbour within
any limit.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

TURN, ZOOM, SHIFT, LIGHT = 20.0, 1.4, 0.25, 0.3  # of the second view: see `second_view`
PLACES = 16  # of each picture, that `contrast` compares
TEMPERATURE = 0.1


def spread(codes: Tensor) -> Tensor:
    """Computes how unevenly codes of shape (..., C) spread over directions, from 0 to C - 1.

    It is C times the mean squared cosine of two random codes, less 1: 0 where the normalised codes'
    second moment is the identity over C (whitened), C - 1 where all have one direction.
    """
    unit = F.normalize(codes.float().flatten(0, -2), dim=1)
    moment = unit.T @ unit / len(unit)
    return unit.shape[1] * moment.square().sum() - 1


def second_view(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Draws another view of pictures (B, 3, S, S), from torch's generator on the CPU.

    Turned by up to TURN degrees, zoomed by up to ZOOM, shifted by up to SHIFT of half the side, and
    with values scaled and moved by up to LIGHT.

    Returns the views (B, 3, S, S), zero outside the picture, and the maps (B, 2, 3) from their
    coordinates to the picture's; both run from -1 to 1 between the outer edges.
    """
    count = len(pictures)
    turn, zoom, x, y, gain, offset = (2 * torch.rand(6, count) - 1).to(pictures.device)
    turn, zoom = turn * math.radians(TURN), ZOOM**zoom
    cosine, sine = turn.cos() * zoom, turn.sin() * zoom
    maps = torch.stack([cosine, -sine, SHIFT * x, sine, cosine, SHIFT * y], 1).view(count, 2, 3)
    places = F.affine_grid(maps, list(pictures.shape), align_corners=False)
    views = F.grid_sample(pictures, places, align_corners=False)
    gain, offset = (LIGHT * value.view(count, 1, 1, 1) for value in (gain, offset))
    return views * (1 + gain) + offset, maps


def contrast(
    codes: Tensor, views: Tensor, maps: Tensor, grid: tuple[int, int], labels: Tensor
) -> Tensor:
    """Computes a contrastive loss on the codes of one place in two views, a scalar.

    The cross-entropy of a softmax over cosines (InfoNCE: van den Oord et al., 2018) between PLACES
    random places of each second view and the places that they show in the pictures. Places outside
    the picture are left out, as are other pictures of the same label; 0 where no place is left.

    Args:
        codes, views: (B, N, C) of the pictures and of their second views.
        maps: (B, 2, 3) as `second_view` gives them.  grid: (h, w) of both, N = h * w.
        labels: (B,) int64 of the pictures.
    """
    batch, count, width = codes.shape
    draws = torch.rand(batch, count).to(codes.device)
    chosen = draws.argsort(1)[:, :PLACES, None]  # (B, P, 1)
    places = F.affine_grid(maps, [batch, 1, *grid], align_corners=False).flatten(1, 2)
    places = places.gather(1, chosen.expand(-1, -1, 2))
    images = codes.float().transpose(1, 2).unflatten(2, grid)  # (B, C, h, w)
    seen = F.grid_sample(images, places[:, None], padding_mode="border", align_corners=False)
    inside = (places.abs() < 1).all(2).flatten()
    seen = F.normalize(seen[:, :, 0].transpose(1, 2).flatten(0, 1)[inside], dim=1)
    anchors = views.float().gather(1, chosen.expand(-1, -1, width)).flatten(0, 1)[inside]
    cosines = F.normalize(anchors, dim=1) @ seen.T / TEMPERATURE
    if not len(cosines):
        return codes.sum() * 0
    image = torch.arange(batch, device=inside.device).repeat_interleave(chosen.shape[1])[inside]
    label = labels[image]
    same = (label[:, None] == label) & (image[:, None] != image)
    cosines = cosines.masked_fill(same, -math.inf)
    return F.cross_entropy(cosines, torch.arange(len(cosines), device=cosines.device))
