"""Chains of refinement steps as texts."""

import pytest

from vitgal.settings import GlobalSettings, SettingsError, read_chain
from vitgal.settings.refinement import (
    STEPS,
    Augmentation,
    Diffusion,
    Expansion,
    KReciprocal,
    Whitening,
)


def test_steps_are_read_in_order_with_their_options():
    texts = ["whitening power=0.25  dimensions=64", "augmentation", " expansion alpha=0"]
    assert read_chain(texts) == (
        Whitening(dimensions=64, power=0.25),
        Augmentation(),
        Expansion(alpha=0.0),
    )
    assert read_chain([]) == ()
    # Two steps that put the first images in another order may follow each other, either way.
    for texts in (["diffusion", "k_reciprocal"], ["k_reciprocal", "diffusion"]):
        assert [step.NAME for step in read_chain(texts)] == texts
    assert {type(step) for step in read_chain(["diffusion", "k_reciprocal"])} == {
        Diffusion,
        KReciprocal,
    }


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["diffusion", "diffusion"], "refine: diffusion would be applied twice"),
        (["whitening", "learned_whitening"], "whitening and learned_whitening would be applied t"),
        (["expansion", "augmentation"], "augmentation cannot follow expansion: queries are exp"),
        (["k_reciprocal", "expansion"], "expansion cannot follow k_reciprocal"),
        (["augmentation", "whitening"], "whitening cannot follow augmentation"),
        (["whiten"], "no step 'whiten'; did you mean whitening"),
        ([""], "no step ''; there are whitening, learned_whitening, augmentation"),
        (["expansion neighbors=3"], "expansion has no option 'neighbors=3'; it has neighbours, al"),
        (["expansion 10"], "expansion has no option '10'"),
        (["expansion alpha=1 alpha=2"], "has the option alpha twice"),
        (["expansion neighbours=2.5"], "neighbours is '2.5', not a number of its type"),
        (["expansion alpha=much"], "alpha is 'much', not a number"),
        (["expansion alpha=nan"], "alpha: nan is float"),
        (["expansion neighbours=0"], "neighbours is 0; it must be at least 1"),
        (["whitening power=2"], "power is 2.0; it must be at least 0 and at most 1"),
        (["diffusion alpha=1"], "alpha is 1.0; it must be above 0 and below 1"),
        (["diffusion depth=1000000"], "depth is 1000000"),
    ],
)
def test_a_chain_that_makes_no_sense_is_refused(texts, message):
    with pytest.raises(SettingsError, match="refine: ") as refusal:
        GlobalSettings(refine=tuple(texts))
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_published_manifests_do_not_change():
    assert "refine" not in GlobalSettings().compared()
    assert "refine_images" not in GlobalSettings().compared()
    assert GlobalSettings(refine=("expansion",)).compared()["refine"] == ("expansion",)


def test_every_step_and_option_is_documented():
    from vitgal import runs

    text = (runs.checkout() / "docs" / "refinement.md").read_text()
    for name, step in STEPS.items():
        assert f"`{name}`" in text
        for option, entry in step.flat().items():
            default = "all" if entry.default is None else f"{entry.default:g}"
            assert f"`{option}` {default}" in text, (name, option)
