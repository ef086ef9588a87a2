from __future__ import annotations

from urllib.error import URLError

import pytest
import torch
import torchvision

from headsearch.config import EncoderConfig
from headsearch.core.encoders import build_encoder, feature_dim
from headsearch.core.randomness import initialisation
from headsearch.errors import StorageError


@pytest.mark.parametrize("size", [4, 8, 28, 31, 32, 96])
@pytest.mark.parametrize("width", [4, 16])
def test_small_resnet_maps_any_size_to_its_feature_dim(size: int, width: int) -> None:
    config = EncoderConfig(width=width)
    encoder = build_encoder(config, size)
    features = encoder(torch.rand(3, 3, size, size))
    assert features.shape == (3, 8 * width)
    assert encoder.feature_dim == feature_dim(config) == 8 * width


@pytest.mark.parametrize(("name", "dim"), [("resnet18", 512), ("resnet34", 512), ("resnet50", 2048)])
def test_torchvision_encoders_end_at_their_pooled_features(name: str, dim: int) -> None:
    encoder = build_encoder(EncoderConfig(name=name), 8)
    assert encoder.eval()(torch.rand(2, 3, 8, 8)).shape == (2, dim)
    assert encoder.feature_dim == dim


def stages(size: int, stem: str) -> list[tuple[int, ...]]:
    """Shape after each of resnet18's first stages, for one image."""
    network = build_encoder(EncoderConfig(name="resnet18", stem=stem), size).network
    seen: list[tuple[int, ...]] = []
    network.layer1.register_forward_hook(lambda _module, _inputs, output: seen.append(tuple(output.shape)))
    network.eval()(torch.rand(1, 3, size, size))
    return seen


@pytest.mark.parametrize(
    ("size", "stem", "side"),
    [(32, "auto", 32), (64, "auto", 64), (65, "auto", 17), (32, "imagenet", 8), (96, "cifar", 96)],
)
def test_stem_decides_the_resolution_of_the_first_stage(size: int, stem: str, side: int) -> None:
    assert stages(size, stem) == [(1, 64, side, side)]


def test_small_resnet_halves_the_stem_from_32_pixels() -> None:
    for size, side in [(31, 31), (32, 16)]:
        stem = build_encoder(EncoderConfig(), size).network[0]
        assert stem(torch.rand(1, 3, size, size)).shape[-1] == side


def test_seed_decides_the_weights_and_the_global_stream_goes_on() -> None:
    def build(seed: int) -> torch.Tensor:
        with initialisation(seed, "encoder"):
            return torch.cat([p.flatten() for p in build_encoder(EncoderConfig(width=4), 8).parameters()])

    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = build(0)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first, build(0))
    assert not torch.equal(first, build(1))


def test_failed_download_is_one_line_that_names_the_field(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", refuse)
    with pytest.raises(StorageError, match=r"^encoder\.pretrained: .*resnet18.*no route to host") as caught:
        build_encoder(EncoderConfig(name="resnet18", pretrained=True, stem="imagenet"), 32)
    assert "\n" not in str(caught.value)


def test_pretrained_takes_the_weights_that_torchvision_fetches(monkeypatch: pytest.MonkeyPatch) -> None:
    source = torchvision.models.resnet18()
    monkeypatch.setattr(
        torchvision.models._api, "load_state_dict_from_url", lambda *_args, **_options: source.state_dict()
    )
    encoder = build_encoder(EncoderConfig(name="resnet18", pretrained=True, stem="imagenet"), 32)
    assert torch.equal(encoder.network.conv1.weight, source.conv1.weight)
    assert torch.equal(encoder.network.layer4[1].conv2.weight, source.layer4[1].conv2.weight)
    assert encoder.eval()(torch.rand(1, 3, 32, 32)).shape == (1, 512)


def built(seed: int = 0, **changes: object) -> torch.nn.Module:
    with initialisation(seed, "encoder"):
        return build_encoder(EncoderConfig(name="resnet18", stem="cifar-pad2", **changes), 32).network


def spread(weight: torch.Tensor) -> tuple[float, float]:
    """Deviation and largest value, times the root of fan-in."""
    root = weight[0].numel() ** 0.5
    return float(weight.std()) * root, float(weight.abs().max()) * root


def test_initialisations_have_their_sources_spread() -> None:
    layer = {name: built(initialisation=name).layer3[1].conv1.weight.detach() for name in (
        "fan-out", "fan-out-but-stem", "torch", "fan-in-truncated",
    )}  # fmt: skip
    assert torch.equal(layer["fan-out"], layer["fan-out-but-stem"])
    assert spread(layer["fan-out"])[0] == pytest.approx(2**0.5, rel=0.01)
    # uniform in ±1 / sqrt(fan-in)
    assert spread(layer["torch"])[0] == pytest.approx(3**-0.5, rel=0.01)
    assert spread(layer["torch"])[1] == pytest.approx(1.0, rel=0.01)
    # a normal of deviation 1 after the cut at 2 of its deviations before
    assert spread(layer["fan-in-truncated"])[0] == pytest.approx(1.0, rel=0.01)
    assert spread(layer["fan-in-truncated"])[1] == pytest.approx(2 / 0.8796256610, rel=0.01)


def test_solo_learns_stem_is_torchs_own() -> None:
    """fan-in 27: uniform up to 1 / sqrt(27)."""
    weight = built(initialisation="fan-out-but-stem").conv1.weight.detach()
    assert spread(weight)[1] == pytest.approx(1.0, rel=0.02)
    assert spread(built().conv1.weight.detach())[1] > 1.0


def test_blocks_may_start_as_identities() -> None:
    network = built(zero_last_norm=True).eval()
    for block in network.layer1:
        x = torch.rand(2, 64, 4, 4)
        assert torch.equal(block(x), x)
    zeros = sum(int((m.weight == 0).all()) for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert zeros == 8


def test_first_stage_may_begin_with_a_projection() -> None:
    plain, projected = (
        sum(p.numel() for p in built(first_shortcut=kind).parameters()) for kind in ("identity", "projection")
    )
    assert projected - plain == 64 * 64 + 2 * 64


@pytest.mark.parametrize("change", [{"initialisation": "torch"}, {"zero_last_norm": True}])
def test_pretrained_weights_are_not_drawn(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"encoder\.pretrained: weights come from ImageNet"):
        EncoderConfig(name="resnet34", stem="imagenet", pretrained=True, **change)
