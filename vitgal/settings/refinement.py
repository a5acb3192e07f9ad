"""Steps that refine a global ranking, written as short texts: `whitening power=0.25`.

A text is a step's name and any of its options, `name=value`, separated by spaces. Steps are applied
in order: descriptors change first (whitening, augmentation, expansion), then the first images of
each ranking are put in another order (superglobal, diffusion, k_reciprocal).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from vitgal.runs.errors import short
from vitgal.settings.section import Section, SettingsError, alternatives, guess, setting

EXAMPLE = '["whitening power=0.25", "expansion neighbours=10 alpha=3"]'


@dataclass(frozen=True)
class Step(Section):
    """One step of a refinement."""

    NAME: ClassVar[str]
    STAGE: ClassVar[int]  # steps of a chain have rising stages; equal ones come in any order
    WHY: ClassVar[str]  # a step of a lower stage may not follow

    @classmethod
    def read(cls, text: str) -> "Step":
        """Reads the options of a step; SettingsError names one that is unknown or out of range."""
        values = {}
        for option in text.split():
            name, equals, value = option.partition("=")
            if name not in cls.flat() or not equals:
                names = ", ".join(cls.flat())
                raise SettingsError(f"{cls.NAME} has no option {short(option)}; it has {names}")
            if name in values:
                raise SettingsError(f"{cls.NAME} has the option {name} twice")
            number = int if int in alternatives(cls.flat()[name].type) else float
            try:
                values[name] = number(value)
            except ValueError:
                raise SettingsError(f"{name} is {short(value)}, not a number of its type") from None
        return cls.build(values)


@dataclass(frozen=True)
class Whitening(Step):
    """PCA whitening, learnt from images without labels."""

    NAME, STAGE, WHY = "whitening", 0, "it changes the descriptors that other steps compare"

    dimensions: int | None = setting(None, "components that are kept; None: all", low=1)
    power: float = setting(
        0.5, "of the variance by which a component is divided; 0.5: to variance 1", low=0, high=1
    )
    shrinkage: float = setting(0.0, "weight of the mean variance", low=0, high=1)


@dataclass(frozen=True)
class LearnedWhitening(Step):
    """Whitening learnt from pairs of images of one landmark."""

    NAME, STAGE, WHY = "learned_whitening", 0, Whitening.WHY

    dimensions: int | None = setting(None, "components that are kept; None: all", low=1)


@dataclass(frozen=True)
class Augmentation(Step):
    """Database augmentation: each database image moves towards its nearest ones."""

    NAME, STAGE, WHY = "augmentation", 1, "queries are expanded in the augmented database"

    neighbours: int = setting(10, "nearest images that are added", low=1)
    alpha: float = setting(3.0, "power of the similarity that is their weight", low=0)


@dataclass(frozen=True)
class Expansion(Step):
    """Query expansion: each query moves towards its first images; alpha=0 is their average."""

    NAME, STAGE, WHY = "expansion", 2, "a ranking that is in another order is not expanded"

    neighbours: int = setting(10, "first images that are added", low=1)
    alpha: float = setting(3.0, "power of the similarity that is their weight", low=0)


@dataclass(frozen=True)
class Reordering(Step):
    """A step that puts the first images of each ranking in another order."""

    STAGE, WHY = 3, Expansion.WHY


@dataclass(frozen=True)
class SuperGlobal(Reordering):
    """SuperGlobal's refinement of the first images, query and database alike."""

    NAME = "superglobal"

    depth: int = setting(400, "first images that are put in another order", low=1)
    neighbours: int = setting(9, "images that refine each descriptor", low=1)
    beta: float = setting(0.15, "weight of their similarities", low=0)


@dataclass(frozen=True)
class Diffusion(Reordering):
    """Diffusion of similarity over a graph of mutual nearest neighbours."""

    NAME = "diffusion"

    depth: int = setting(10_000, "first images that are put in another order", low=1, high=100_000)
    neighbours: int = setting(50, "of each image in the graph, where mutual", low=1)
    seeds: int = setting(10, "first images at which a query enters the graph", low=1)
    gamma: float = setting(3.0, "power of a similarity that is an edge's weight", low=0)
    alpha: float = setting(0.99, "share that moves on in each step", above=0, below=1)


@dataclass(frozen=True)
class KReciprocal(Reordering):
    """k-reciprocal re-ranking: images that have neighbours in common are near."""

    NAME = "k_reciprocal"

    depth: int = setting(400, "first images that are put in another order", low=1, high=5_000)
    k1: int = setting(20, "nearest images among which neighbours are mutual", low=1)
    k2: int = setting(6, "nearest images whose neighbourhoods are averaged", low=1)
    weight: float = setting(0.3, "of the original distance", low=0, high=1)


STEPS: dict[str, type[Step]] = {
    step.NAME: step
    for step in (
        *(Whitening, LearnedWhitening, Augmentation, Expansion),
        *(SuperGlobal, Diffusion, KReciprocal),
    )
}


def read_chain(texts: Sequence[str]) -> tuple[Step, ...]:
    """Reads the steps of a refinement, in order; none for no text.

    Raises SettingsError for an unknown step or option, a value out of range, or an order of steps
    that makes no sense.
    """
    steps = []
    for text in texts:
        name, _, options = text.strip().partition(" ")
        try:
            if name not in STEPS:
                hint = guess(name, STEPS) or f"; there are {', '.join(STEPS)}"
                raise SettingsError(f"there is no step {short(name)}{hint}; for example {EXAMPLE}")
            steps.append(STEPS[name].read(options))
        except SettingsError as error:
            raise SettingsError(f"refine: {error}") from None
    for before, after in itertools.pairwise(steps):
        if after.STAGE < before.STAGE:
            raise SettingsError(
                f"refine: {after.NAME} cannot follow {before.NAME}: {after.WHY}; put it first"
            )
    for first, second in itertools.combinations(steps, 2):
        if first.NAME == second.NAME or first.STAGE == second.STAGE < Reordering.STAGE:
            names = dict.fromkeys((first.NAME, second.NAME))
            raise SettingsError(f"refine: {' and '.join(names)} would be applied twice; keep one")
    return tuple(steps)
