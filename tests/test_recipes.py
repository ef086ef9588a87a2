"""Names of systems and recipes in a configuration: what overrides what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from headsearch.config import AlternatingScheme, BarlowTwinsObjective, MlpHead, NoHead, TrialConfig, flatten
from headsearch.core.benchmark import noise
from headsearch.core.learner import build_learner
from headsearch.core.optimizers import learning_rate
from headsearch.core.steps import STEPS, Batch
from headsearch.errors import SpecError
from headsearch.recipes import RECIPES
from headsearch.runtime.single import point_of
from headsearch.spec import StudySpec, differences
from headsearch.study_file import load_study, one_point, parse_study
from headsearch.systems import SYSTEMS


def config(**tree: object) -> TrialConfig:
    return TrialConfig.model_validate(tree)


def test_what_is_given_beside_a_name_overrides_it() -> None:
    made = config(system="solo-learn", head={"projection_dim": 8})
    assert made.head == MlpHead(width=2048, projection_dim=8)
    assert config(recipe="lightly-cifar10", views={"jitter_strength": 1.0}).views.jitter_strength == 1.0


def test_system_overrides_recipe() -> None:
    made = config(recipe="lightly-cifar10", system="barlow-twins")
    assert isinstance(made.objective, BarlowTwinsObjective)
    assert made.head.projection_dim == 2048
    assert made.optimizer.learning_rate == 0.12


def test_another_kind_replaces_the_table_whole() -> None:
    assert config(system="solo-learn", head={"kind": "none"}).head == NoHead()
    made = config(system="gupta2022-alternating", scheme={"kind": "joint"})
    assert made.scheme.kind == "joint"
    assert isinstance(config(system="gupta2022-alternating").scheme, AlternatingScheme)


def test_kinds_have_defaults() -> None:
    made = config(head={"width": 7}, objective={"temperature": 0.1}, scheme={"steps_per_batch": 2})
    assert (made.head.kind, made.objective.kind, made.scheme.kind) == ("mlp", "nt-xent", "joint")


@pytest.mark.parametrize("name", SYSTEMS)
def test_written_out_a_system_is_the_same(name: str) -> None:
    made = config(system=name)
    assert TrialConfig.model_validate(made.model_dump(mode="json")) == made


def test_objects_are_taken_as_they_are() -> None:
    assert TrialConfig(head=NoHead(), recipe="lightly-cifar10").head == NoHead()


STUDY = {
    "name": "s",
    "mode": "grid",
    "budget": {"epochs": 20},
    "space": {"system": ["simclr", "barlow-twins"], "head.projection_dim": [8, 16]},
}


def test_a_space_may_vary_the_system() -> None:
    spec = StudySpec.model_validate(STUDY)
    made = [spec.trial_config(params, seed) for params, seed in spec.cells()]
    assert [(one.objective.kind, one.head.projection_dim) for one in made] == [
        ("nt-xent", 8), ("nt-xent", 16), ("barlow-twins", 8), ("barlow-twins", 16),
    ]  # fmt: skip


def test_one_point_takes_another_system() -> None:
    spec = StudySpec.model_validate(STUDY)
    assert one_point(spec, ["system=solo-learn"]).head.width == 2048
    assert one_point(spec, ["head.kind=linear"]).head.kind == "linear"
    assert one_point(spec, ["objective.kind=barlow-twins"]).objective.kind == "barlow-twins"


def test_a_list_makes_new_choices(tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    file.write_text('name="s"\nmode="grid"\nbudget.epochs=2\nspace.system=["simclr"]\n')
    assert load_study(file, ['system=["none", "linear"]']).trials == 2
    assert load_study(file, ["system=none"]).trials == 1


def refused(**changes: object) -> str:
    with pytest.raises(SpecError) as caught:
        parse_study(STUDY | changes, source="file")
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_unknown_names_are_explained() -> None:
    assert "system: 'simclrr' is not one of" in (said := refused(space={"system": ["simclrr"]}))
    assert "did you mean simclr?" in said
    assert "recipe: 'lightly' is not one of" in refused(base={"recipe": "lightly"})


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ({"head": {"levels": 1}}, "head.levels: 1 level holds no information"),
        ({"head": {"kind": "sparse", "latents": 10, "k": 11}}, "head.k: 11 is more than head.latents = 10"),
        ({"head": {"kind": "sparse", "width": 4}}, "head kind 'sparse' has no such field"),
        ({"head": {"width": 0}}, "head.width"),
        ({"head": {"kind": "reweight", "kappa": 1.0}}, "head.kappa: 1.0: input should be greater than 1"),
        (
            {"objective": {"kind": "barlow-twins", "temperature": 1}},
            "objective kind 'barlow-twins' has no such",
        ),
        (
            {"objective": {"kind": "vicreg"}},
            "objective.kind: 'vicreg' is not one of 'nt-xent', 'barlow-twins'",
        ),
        ({"objective": {"bottleneck_weight": -1}}, "objective.bottleneck_weight: -1"),
        ({"scheme": {"kind": "alternate"}}, "scheme.kind: 'alternate' is not one of 'joint', 'alternating'"),
        ({"scheme": {"head_steps": 2}}, "scheme kind 'joint' has no such field"),
        (
            {"scheme": {"kind": "alternating"}, "head": {"kind": "none"}},
            "scheme.kind: 'alternating' trains the head in steps of its own, but this one has none",
        ),
        ({"optimizer": {"warmup_epochs": 20}}, "optimizer.warmup_epochs: 20 is not below the 20 epochs"),
        (
            {"scheme": {"kind": "alternating", "head_optimizer": {"warmup_epochs": 30}}},
            "scheme.head_optimizer.warmup_epochs: 30 is not below the 20 epochs",
        ),
        ({"views": {"hue": 0.6}}, "views.hue: 0.6"),
    ],
)
def test_what_does_not_fit_is_explained(base: dict[str, object], expected: str) -> None:
    assert expected in refused(base=base, space={"data.normalization": ["none", "zscore"]})


@pytest.mark.parametrize("changes", [{"mode": "search"}, {"budget": {"epochs": 4, "rungs": [1]}}])
def test_a_protocol_that_selects_on_test_images_cannot_steer(changes: dict[str, object]) -> None:
    budget = {"epochs": 4, "trials": 4, **changes.get("budget", {})}  # type: ignore[dict-item]
    said = refused(protocol="schliebitz2024", **changes | {"budget": budget})
    assert "protocol: 'schliebitz2024' selects on images of the test split, which must not steer" in said


def test_every_recipe_says_how_long_its_authors_train() -> None:
    assert all(recipe.epochs >= 100 for recipe in RECIPES.values())


def test_presets_do_not_leak_into_each_other() -> None:
    with pytest.raises(ValidationError):
        config(system="none", head={"projection_dim": 3})
    assert config(system="none").head == NoHead()


PUBLISHED_EPOCHS = 100


def dkobak(**parts: object) -> TrialConfig:
    return config(recipe="dkobak-cifar10", **{"training": {"epochs": PUBLISHED_EPOCHS}, **parts})


def test_dkobaks_recipe_has_the_published_views_head_and_loss() -> None:
    """Its README and simclr-cifar10.py (July 2025): ColorJitter(0.4, 0.4, 0.4, 0.1), and no normalisation."""
    made = dkobak()
    views = made.views
    ranges = [views.brightness, views.contrast, views.saturation, views.hue]
    assert [views.jitter_strength * part for part in ranges] == [0.4, 0.4, 0.4, 0.1]
    assert (views.crop_scale_min, views.flip_probability) == (0.2, 0.5)
    assert (views.jitter_probability, views.grayscale_probability) == (0.8, 0.1)
    assert (views.blur_probability, views.solarize_probability) == (0, 0)
    assert made.data.normalization == "none"
    assert made.head == MlpHead(width=1024, projection_dim=128)
    assert (made.objective.kind, made.objective.temperature, made.objective.scale) == ("nt-xent", 0.5, 1)  # type: ignore[union-attr]
    assert (made.training.batch_size, made.training.encode_views) == (512, "apart")


def test_dkobaks_learning_rate_is_torchs_cosine_by_epoch() -> None:
    """CosineAnnealingLR with T_max = epochs, stepped once an epoch, from 0.06 x 512 / 256."""
    made, steps = dkobak(), 97
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.06 * 512 / 256)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=PUBLISHED_EPOCHS)
    for epoch in range(PUBLISHED_EPOCHS):
        expected = optimizer.param_groups[0]["lr"]
        for step in (0, steps - 1):
            rate = learning_rate(
                made.optimizer,
                step=epoch * steps + step,
                steps_per_epoch=steps,
                epochs=PUBLISHED_EPOCHS,
                batch_size=made.training.batch_size,
            )
            assert rate == pytest.approx(expected, rel=1e-9)
        optimizer.step()
        schedule.step()


class PlainSimClr(nn.Module):
    """torchvision's ResNet-18 with the stem for small images, and a head, as the published code builds them."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models import resnet18

        self.network = resnet18(weights=None)
        self.network.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
        self.network.maxpool = nn.Identity()
        self.network.fc = nn.Identity()
        self.head = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 128))

    def forward(self, views: Tensor) -> Tensor:
        projections: Tensor = self.head(self.network(views))
        return projections


def test_dkobaks_steps_are_plain_torchs(tmp_path: Path) -> None:
    """Three steps in two epochs from the same weights on the same views, beside the published loop in plain torch."""
    size, images = 16, noise(32, 32)
    made = dkobak(training={"epochs": 4, "batch_size": size, "channels_last": False, "precision": "fp32"})
    learner = build_learner(made, images, torch.device("cpu"), tmp_path)
    plain = PlainSimClr()
    plain.network.load_state_dict(
        {name.removeprefix("network."): value for name, value in learner.encoder.state_dict().items()}
    )
    plain.head.load_state_dict(learner.head.state_dict())
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.06 * size / 256, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    learner.encoder.train()
    learner.head.train()
    draws = torch.Generator().manual_seed(0)
    for number in range(3):
        pair = torch.rand(2 * size, 3, 32, 32, generator=draws)
        ours = STEPS["joint"](Batch(learner, "fp32", pair, images.train.labels[:size], number, 2))
        rows = F.normalize(torch.cat([plain(view) for view in pair.chunk(2)]))
        similar = (rows @ rows.T / 0.5).fill_diagonal_(-torch.inf)
        theirs = F.cross_entropy(similar, torch.arange(2 * size).roll(size))
        optimizer.zero_grad()
        theirs.backward()
        optimizer.step()
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-5)
        if number == 1:
            schedule.step()
    for name, value in plain.network.state_dict().items():
        torch.testing.assert_close(
            learner.encoder.state_dict()[f"network.{name}"], value, rtol=1e-4, atol=1e-5, msg=name
        )
    for name, value in plain.head.state_dict().items():
        torch.testing.assert_close(learner.head.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)


FORMER: dict[int, dict[str, dict[str, Any]]] = {
    edition: json.loads((Path(__file__).parent / f"recipes_of_edition_{edition}.json").read_text())
    for edition in (1, 2)
}
"""What each recipe of a former edition set; and, under no name, the whole default configuration."""


@pytest.mark.parametrize(
    ("edition", "name"), [(edition, name) for edition in FORMER for name in FORMER[edition]]
)
def test_a_former_edition_is_what_stored_studies_meant(edition: int, name: str) -> None:
    former = FORMER[edition]
    default = former[""]
    if not name:
        made = flatten(config(protocol="ouyang2025", edition=edition).model_dump(mode="json"))
        assert {path: made[path] for path in default} == default
        return
    # The first edition was not written down.
    base = {"recipe": name, **({"edition": edition} if edition > 1 else {})}
    epochs = former[name].get("training.epochs", 12)
    spec = StudySpec.model_validate(
        {**STUDY, "base": base, "space": {"head.dropout": [0.0]}, "budget": {"epochs": epochs}}
    )
    made = flatten(spec.trial_config({}, 0).model_dump(mode="json"))
    assert made["edition"] == edition
    assert {path: made[path] for path in former[name]} == former[name]
    others = default.keys() - former[name].keys() - {"protocol"}
    kept = {path for path in others if path in made and made[path] != default[path]}
    assert not kept
    assert made["probe.online_warmup_start"] == "scaled"
    if edition == 1:
        assert made["optimizer.lars_form"] == "you2017"
        assert made["views.blur_kernel"] == "tenth"


@pytest.mark.parametrize("name", RECIPES)
def test_todays_edition_differs_from_the_second_in_the_start_of_a_warm_up(name: str) -> None:
    second, third = (
        flatten(config(recipe=name, edition=edition, training={"epochs": 20}).model_dump(mode="json"))
        for edition in (2, 3)
    )
    changed = {path: (second[path], third[path]) for path in third if second[path] != third[path]}
    starts = {"probe.online_warmup_start": ("scaled", "same")} if "online" in str(RECIPES[name].tree) else {}
    assert changed == {"edition": (2, 3), **starts}


def new_study(**changes: Any) -> StudySpec:
    return parse_study({**STUDY, **changes}, source="file")


def test_a_new_study_writes_its_edition_down_where_it_matters() -> None:
    assert "edition" not in new_study().base
    assert new_study(base={"recipe": "lightly-cifar10"}).base["edition"] == 3
    assert new_study(space={"recipe": ["lightly-cifar10"]}).base["edition"] == 3
    assert new_study(protocol="ouyang2025").base["edition"] == 3
    points = [{"recipe": "lightly-cifar10"}, {"recipe": "solo-learn-cifar"}]
    assert new_study(mode="points", points=points, space={}).base["edition"] == 3
    assert new_study(base={"recipe": "lightly-cifar10", "edition": 1}).base["edition"] == 1
    arrays = {"data": {"name": "stl10", "image_size": 64}}
    assert new_study(base=arrays).base["edition"] == 3
    assert new_study(base={"data.name": "stl10", "data.image_size": 64}).base["edition"] == 3
    assert new_study(base={"recipe": "lightly-cifar10", **arrays}).base["edition"] == 3
    assert new_study(space={"data": {"image_size": [8, 12]}}).base["edition"] == 3
    assert new_study(space={"data.image_size": {"choices": [8, 12]}}).base["edition"] == 3
    assert new_study(mode="points", points=[{"data.image_size": 12}], space={}).base["edition"] == 3
    assert "edition" not in new_study(base={"data": {"name": "stl10", "image_size": 96}}).base
    assert "edition" not in new_study(base={"data": {"name": "imagenette", "image_size": 96}}).base
    assert new_study(base={"edition": 2, **arrays}).trial_config({}, 0).data.resize_first
    spec = new_study(base={"recipe": "lightly-cifar10"})
    assert StudySpec.model_validate(spec.to_json()) == spec
    assert spec.trial_config({}, 0).encoder.initialisation == "torch"
    assert spec.trial_config({}, 0).data.normalization == "imagenet"


def test_a_stored_study_and_the_same_file_today_differ_by_the_edition_alone() -> None:
    tree = {**STUDY, "base": {"recipe": "solo-learn-cifar"}}
    assert differences(StudySpec.model_validate(tree), parse_study(tree, source="file")) == [
        "base.edition: (none) -> 3"
    ]


ARRAYS = {"data": {"name": "cifar10", "image_size": 48}}


@pytest.mark.parametrize(
    "named", [{}, {"recipe": "lightly-cifar10"}, {"recipe": "lightly-cifar10", "edition": 2}]
)
def test_stored_studies_go_on_resizing_arrays_before_they_are_cropped(named: dict[str, Any]) -> None:
    stored = StudySpec.model_validate({**STUDY, "base": {**named, **ARRAYS}})
    assert stored.trial_config({}, 0).data.resize_first
    today = {key: value for key, value in named.items() if key != "edition"}
    assert not new_study(base={**today, **ARRAYS}).trial_config({}, 0).data.resize_first


@pytest.mark.parametrize("data", [{"name": "cifar10", "image_size": 32}, {"name": "cifar10"}, {}])
def test_where_nothing_is_resized_all_editions_have_the_same_images(data: dict[str, Any]) -> None:
    stored = StudySpec.model_validate({**STUDY, "base": {"data": data}}).trial_config({}, 0)
    assert stored == new_study(base={"data": data}).trial_config({}, 0)
    made = config(edition=2, recipe="lightly-cifar10", data=data)
    assert made.data == config(recipe="lightly-cifar10", data=data).data


def test_a_stored_study_that_varies_the_size_resizes_what_is_not_stored_at_it() -> None:
    spec = StudySpec.model_validate({**STUDY, "space": {"data.image_size": [8, 12]}})
    assert [spec.trial_config({"data.image_size": size}, 0).data.resize_first for size in (8, 12)] == [
        False,
        True,
    ]
    chosen = spec.trial_config({"data.image_size": 12}, 0)
    assert TrialConfig.model_validate(chosen.model_dump(mode="json")) == chosen


def test_one_training_of_a_study_crops_first_at_a_size_that_is_set_for_it(tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    file.write_text(
        'name = "s"\nmode = "grid"\n[budget]\nepochs = 20\n[base]\nrecipe = "lightly-cifar10"\n'
        'data.name = "cifar10"\n[space]\nhead.dropout = [0.0]\n'
    )
    made = point_of(file, ["data.image_size=48"])
    assert (made.edition, made.data.image_size, made.data.resize_first) == (3, 48, False)
    assert made.data.normalization == "imagenet"
