"""From a name to a network: our own, timm's, random weights and stored ones."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from eurosat_mlops.core import EurosatError
from eurosat_mlops.models import build_model, channel_statistics, check_arch

STATISTICS = ((90.0, 95.0, 100.0), (50.0, 35.0, 30.0))


def tiles(n=2, size=64):
    return torch.randint(0, 256, (n, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("arch", ["tilenet_s", "resnet18", "mobilenetv2_035", "vit_tiny_patch16_224"])
def test_any_timm_network_takes_bytes_and_gives_logits(arch):
    model = build_model(arch, 7, *STATISTICS).eval()
    with torch.inference_mode():
        assert model(tiles()).shape == (2, 7) and model.embed(tiles()).ndim == 2


def test_logits_are_the_classifier_of_the_embedding():
    model = build_model("resnet18", 5, *STATISTICS).eval()
    with torch.inference_mode():
        x = (tiles().permute(0, 3, 1, 2).float() - model.mean) / model.std
        assert torch.allclose(model(tiles()), model.trunk(x), atol=1e-4)


def test_lower_precision_stays_near_and_gives_float32():
    model = build_model("tilenet_s", 5, *STATISTICS).eval()
    with torch.inference_mode():
        exact = model(tiles())
        model.precision = torch.bfloat16
        near = model(tiles())
    assert near.dtype == torch.float32 and not torch.equal(near, exact) and torch.allclose(near, exact, atol=0.05)


def test_an_unknown_name_gets_the_nearest_known():
    with pytest.raises(EurosatError, match="resnet18"):
        check_arch("resnet_18")
    with pytest.raises(EurosatError, match="list_models"):
        check_arch("§§§")


def test_stored_weights_come_back_with_another_head(tmp_path):
    torch.manual_seed(0)
    first = build_model("tilenet_s", 10, *STATISTICS)
    save_file({n: v.contiguous() for n, v in first.trunk.state_dict().items()}, tmp_path / "w.safetensors")
    torch.save(first.trunk.state_dict(), tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        again = build_model("tilenet_s", 3, *STATISTICS, weights=str(tmp_path / name))
        assert torch.equal(again.trunk.stem[0].weight, first.trunk.stem[0].weight)
        assert again(tiles()).shape == (2, 3)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    save_file({"nonsense": torch.zeros(1)}, tmp_path / "other.safetensors")
    torch.save({"run": Path}, tmp_path / "code.pth")
    (tmp_path / "text.safetensors").write_text("no tensors")
    wrong = {"other.safetensors": "architecture", "code.pth": "plain tensors", "text.safetensors": "plain tensors"}
    for name, word in wrong.items():
        with pytest.raises(EurosatError, match=word):
            build_model("tilenet_s", 10, *STATISTICS, weights=str(tmp_path / name))
    with pytest.raises(EurosatError, match="no file"):
        build_model("tilenet_s", 10, *STATISTICS, weights=str(tmp_path / "none.pth"))


def test_pretrained_never_means_random():
    with pytest.raises(EurosatError, match="tilenet_s has none"):
        build_model("tilenet_s", 10, *STATISTICS, weights="pretrained")


def test_statistics_are_exact_and_never_zero():
    sample = tiles(50, 16)
    mean, std = channel_statistics(sample)
    assert torch.allclose(torch.tensor(mean), sample.float().mean((0, 1, 2)), atol=1e-3)
    assert torch.allclose(torch.tensor(std), sample.float().std((0, 1, 2), correction=0), atol=1e-3)
    assert channel_statistics(torch.zeros(2, 4, 4, 3, dtype=torch.uint8))[1] == (1.0, 1.0, 1.0)
