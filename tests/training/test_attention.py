"""The attention of training beside timm's."""

import copy

import pytest
import torch
from timm.models.xcit import XCA

from vitgal.models.network import build_model
from vitgal.training.attention import TrainedAttention, replace_attention


def pair(dim: int = 24, heads: int = 3) -> tuple[XCA, XCA]:
    torch.manual_seed(0)
    plain = XCA(dim, num_heads=heads, qkv_bias=True).double()
    plain.temperature.data = torch.rand(heads, 1, 1).double() + 0.5
    other = copy.deepcopy(plain)
    replace_attention(other)
    return plain, other


@pytest.mark.parametrize("shape", [(2, 9, 24), (1, 1, 24), (3, 50, 24), (0, 9, 24)])
def test_outputs_and_gradients_are_timm_s(shape):
    tokens = torch.randn(shape, dtype=torch.float64)
    results = []
    for module in pair():
        inputs = tokens.clone().requires_grad_()
        outputs = module.train()(inputs)
        outputs.square().sum().backward()
        gradients = [parameter.grad for parameter in module.parameters()]
        results.append([outputs.detach(), inputs.grad, *gradients])
    assert results[0][0].shape == shape
    for expected, mine in zip(*results, strict=True):
        # Another order of the same operations in float64, which rounds at 1.1e-16.
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-12)


def test_tokens_of_zeros_give_finite_gradients():
    module = pair()[1].train()
    module.qkv.bias.data.zero_()
    tokens = torch.zeros(1, 4, 24, dtype=torch.float64, requires_grad=True)
    module(tokens).sum().backward()
    assert torch.isfinite(tokens.grad).all()


def test_eval_mode_gives_timm_s_bits():
    tokens = torch.randn(2, 9, 24, dtype=torch.float64)
    plain, other = (module.eval()(tokens) for module in pair())
    assert torch.equal(plain, other)


def test_float16_does_not_overflow():
    module = pair()[1].float().train()
    tokens = torch.full((1, 2000, 24), 30.0)
    with torch.autocast("cpu", torch.float16):
        assert torch.isfinite(module(tokens)).all()


def test_every_attention_of_a_network_is_replaced_and_its_weights_stay():
    model = build_model("xcit_nano_12_p16_224", seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    replace_attention(model)
    assert sum(isinstance(module, TrainedAttention) for module in model.modules()) == 12
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    replace_attention(torch.nn.Linear(2, 2))  # has none
