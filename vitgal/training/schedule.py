"""The learning rate of every epoch."""

import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

from vitgal.settings import Recipe


def learning_rates(settings: Recipe) -> list[float]:
    """Returns the learning rate of every epoch: timm's cosine, one epoch late as published.

    The published loop steps its schedule with the number of the epoch that has just ended. The
    first value is therefore used twice, and one warm-up epoch becomes the paper's two.
    """
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=settings.lr)
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=settings.epochs,
        lr_min=settings.min_lr,
        warmup_t=settings.warmup_epochs,
        warmup_lr_init=settings.warmup_lr,
    )
    return [schedule._get_lr(max(epoch - 1, 0))[0] for epoch in range(settings.epochs)]
