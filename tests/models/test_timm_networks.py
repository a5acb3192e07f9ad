"""Networks of timm for other image sizes than their own. Weights are random."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from vitgal.models.teacher import Teacher
from vitgal.models.timm_networks import TimmSource, for_size, open_network

# Small ones of the families that take one size: DINOv2, SigLIP, EVA-02, Swin, BEiT, DeiT III.
SMALL = {
    "vit_small_patch14_dinov2": dict(depth=1, embed_dim=96, num_heads=3),
    "vit_base_patch16_siglip_224": dict(depth=1, embed_dim=96, num_heads=3),
    "eva02_tiny_patch14_224": dict(depth=1),
    "swin_tiny_patch4_window7_224": dict(depths=(1, 1, 1, 1), embed_dim=24, num_heads=(1, 2, 3, 4)),
    "beit_base_patch16_224": dict(depth=1, embed_dim=96, num_heads=3),
    "deit3_small_patch16_224": dict(depth=1, embed_dim=96, num_heads=3),
    "resnet10t": {},
    "xcit_nano_12_p16_224": dict(depth=1),
}


def timm_network(name, size, file=None, **options):
    return for_size(open_network(TimmSource(name, file), options), name, size, options)


@pytest.mark.parametrize("name", SMALL)
def test_a_network_takes_another_size_with_its_own_weights(name, tmp_path):
    options = SMALL[name] | {"num_classes": 0}
    torch.manual_seed(0)
    trained = timm.create_model(name, **SMALL[name])
    save_file(trained.state_dict(), tmp_path / "net.safetensors")
    size = (224, 112)
    network = timm_network(name, size, tmp_path / "net.safetensors", **options)
    assert not network.training
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        rows = network(images)
    assert rows.shape == (2, network.num_features) and rows.isfinite().all() and rows.std() > 0
    # As timm reads the file for this size.
    if timm.get_pretrained_cfg(name).fixed_input_size:
        options["img_size"] = size
    overlay = {"file": str(tmp_path / "net.safetensors"), "custom_load": False}
    timms = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    with torch.inference_mode():
        assert torch.equal(timms.eval()(images), rows)
    # At its own size nothing changes.
    own = timm.get_pretrained_cfg(name).input_size[1:]
    network = timm_network(name, own, tmp_path / "net.safetensors", **SMALL[name])
    for key, value in trained.state_dict().items():
        assert torch.equal(network.state_dict()[key], value)


def test_unsupported_sizes_are_refused_with_the_supported_ones():
    vit = SMALL["vit_small_patch14_dinov2"]
    with pytest.raises(
        ValueError, match=r"512 x 512 pixels, only .*multiples of 14, as \(518, 518"
    ):
        timm_network("vit_small_patch14_dinov2", (512, 512), **vit)
    with pytest.raises(ValueError, match=r"192 x 192 pixels, only 224 x 224"):
        timm_network("mixer_s32_224", (192, 192))
    with pytest.raises(ValueError, match=r"timm has no network 'vit_of_mine'"):
        timm_network("vit_of_mine", (224, 224))


def test_a_teacher_of_one_size_is_built_for_the_training_images(tmp_path):
    for name in ("test_vit", "test_vit2"):
        save_file(timm.create_model(name).state_dict(), tmp_path / "net.safetensors")
        teacher = Teacher(name, tmp_path / "net.safetensors", (96, 96))
        assert teacher.describe(torch.zeros(2, 3, 96, 96)).shape == (2, teacher.dim)
        with pytest.raises(ValueError, match=f"{name} takes no images of 100 x 100 pixels, only"):
            Teacher(name, tmp_path / "net.safetensors", (100, 100))
