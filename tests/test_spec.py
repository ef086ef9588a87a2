"""Study specs and files: what is accepted, what is refused and how, hashes, overrides."""

from __future__ import annotations

import json
import tomllib

import pytest
from pydantic import ValidationError

from headsearch.config import AutoencoderHead, LinearHead, MlpHead, TrialConfig
from headsearch.errors import SpecError
from headsearch.resilience import WorkerSpec
from headsearch.spec import StudySpec, differences
from headsearch.study_file import load_study, one_point, parse_study

TEXT = """
name = "small"

[budget]
trials = 8
epochs = 9
rungs = [1, 3]

[base]
data.name = "digits"
optimizer.learning_rate = 0.1

[space]
head.kind = ["mlp", "autoencoder", "linear"]
head.width = { low = 16, high = 256, log = true, when = { "head.kind" = "mlp" } }
head.projection_dim = [2, 4, 8, 16]
head.frozen = { choices = [true, false], when = { head.kind = "autoencoder" } }
data.normalization = ["none", "zscore"]
"""


def spec_of(text: str = TEXT) -> StudySpec:
    return parse_study(tomllib.loads(text), source="study.toml")


def test_a_point_becomes_a_trial_config():
    config = spec_of().trial_config(
        {"head.kind": "autoencoder", "head.frozen": False, "head.projection_dim": 4}, 3
    )
    assert config.head == AutoencoderHead(frozen=False, projection_dim=4)
    assert (config.seed, config.training.epochs, config.optimizer.learning_rate) == (3, 9, 0.1)


def test_dotted_keys_mean_the_same_with_and_without_quotes():
    quoted = TEXT.replace("head.kind =", '"head.kind" =').replace("head.width =", '"head.width" =')
    assert spec_of(quoted).hash == spec_of().hash


def test_the_hash_survives_the_database_and_names_every_change():
    spec = spec_of()
    stored = StudySpec.model_validate(json.loads(json.dumps(spec.to_json())))
    assert stored == spec
    assert stored.hash == spec.hash
    assert list(stored.space) == list(spec.space)
    other = spec_of(TEXT.replace("trials = 8", "trials = 12").replace("[2, 4, 8, 16]", "[2, 4, 8]"))
    assert other.hash != spec.hash
    assert differences(spec, other) == [
        "budget.trials: 8 -> 12",
        "space.head.projection_dim.choices: [2, 4, 8, 16] -> [2, 4, 8]",
    ]


def test_a_grid_counts_its_cells_and_trains_every_point_before_the_next_seed():
    grid = spec_of(
        'name = "g"\nmode = "grid"\nseeds = [0, 1]\n[budget]\nepochs = 2\n[space]\nhead.kind = ["mlp", "linear"]\n'
        'head.width = { choices = [8, 16], when = { head.kind = "mlp" } }\n'
    )
    assert grid.trials == 6
    assert [seed for _, seed in grid.cells()] == [0, 0, 0, 1, 1, 1]
    assert [point["head.kind"] for point, _ in grid.cells()[:3]] == ["mlp", "mlp", "linear"]


def test_fields_of_the_default_head_need_no_kind():
    spec = spec_of('name = "w"\n[budget]\ntrials = 2\nepochs = 2\n[space]\nhead.width = [8, 16]\n')
    assert spec.trial_config({"head.width": 8}, 0).head == MlpHead(width=8)


def test_points_are_a_study_too():
    listed = spec_of(
        'name = "p"\nmode = "points"\n[budget]\nepochs = 2\n[[points]]\nhead.kind = "none"\n'
        '[[points]]\nhead.kind = "mlp"\nhead.width = 8\n'
    )
    assert listed.trials == 2
    assert isinstance(listed.trial_config(listed.cells()[1][0], 0).head, MlpHead)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("trials = 8", "trials = 0", "budget.trials: 0"),
        (
            "trials = 8",
            "trails = 8",
            "budget.trails: unknown key; budget takes epochs, rungs, trials; did you mean trials?",
        ),
        ("[budget]", "[bugdet]", "did you mean budget"),
        ("rungs = [1, 3]", "rungs = [1, 9]", "budget.rungs: 9 is not below budget.epochs = 9"),
        ("rungs = [1, 3]", "rungs = [3, 1]", "budget.rungs: [3, 1] must rise"),
        ('name = "small"', 'name = "Small Study"', "name: 'Small Study'"),
        ('name = "small"', 'name = "small"\nseeds = [1, 1]', "seeds: [1, 1] must all differ"),
        (
            'name = "small"',
            'name = "small"\nseeds = [1, 2, 3]',
            "budget.trials: 8 is not a multiple of the 3 seeds",
        ),
        ('name = "small"', 'name = "small"\nobjectives = ["projection_dim"]', "objectives: each once"),
        (
            'name = "small"',
            'name = "small"\nobjectives = ["accuracy"]',
            "objectives.0: 'accuracy' is not one of",
        ),
        ('name = "small"', 'name = "small"\nmode = "sweep"', "mode: 'sweep' is not one of"),
        ('name = "small"', 'name = "small"\nprotocol = "cheat"', "protocol: 'cheat' is not one of"),
        ('"mlp", "autoencoder"', '"mlp", "autoencodr"', "head.kind: 'autoencodr' is not one of"),
        ("low = 16, high = 256", "low = 300, high = 256", "space.head.width.low: 300 is not below high"),
        ("low = 16, high = 256", "low = 16", "space.head.width.high: missing"),
        (
            '{ "head.kind" = "mlp" }',
            '{ "head.kid" = "mlp" }',
            "space.head.width.when: head.kid is not a parameter",
        ),
        (', when = { "head.kind" = "mlp" }', "", "head.width: head kind 'autoencoder' has no such field"),
        ("[2, 4, 8, 16]", "[0, 4, 8, 16]", "head.projection_dim: 0"),
        ("[2, 4, 8, 16]", "{ step = 2 }", "space.head.projection_dim: give choices, low and high, or value"),
        ("head.projection_dim", "head.projecton_dim", "did you mean projection_dim?"),
        ("data.normalization = ", "encoder = ", "space.encoder: names a table"),
        ("data.normalization", "data.limit", "space.data.limit: trials of a study must be measured alike"),
        ("data.normalization = ", "seed = ", "seed: not here; seeds sets it"),
        ("data.normalization = ", "data.name = ", "space.data.name"),
        ('data.name = "digits"', 'data.name = "digit"', "data.name: 'digit' is not one of"),
        ('data.name = "digits"', 'data.name = "folder"', "data.root: name the folder"),
        ('data.name = "digits"', "training.epochs = 3", "training.epochs: not here; budget.epochs sets it"),
        (
            'data.name = "digits"',
            'data.normalization = "none"',
            "space.data.normalization: also set under base",
        ),
        ("learning_rate = 0.1", "learning_rate = -0.1", "optimizer.learning_rate: -0.1"),
        ("learning_rate = 0.1", "warmup_epochs = 9", "optimizer.warmup_epochs: 9 is not below the 9 epochs"),
        ("learning_rate = 0.1", "learning_rat = 0.1", "did you mean learning_rate?"),
    ],
)
def test_what_a_study_refuses_in_one_line_that_names_the_field(old, new, says):
    assert TEXT.count(old) >= 1
    with pytest.raises(SpecError) as caught:
        spec_of(TEXT.replace(old, new, 1))
    message = str(caught.value)
    assert says in message
    assert "\n" not in message
    assert message.startswith("study.toml: ")


def test_a_search_larger_than_its_space_is_refused():
    small = TEXT.replace("head.width = { low", "# head.width = { low").replace("trials = 8", "trials = 40")
    with pytest.raises(SpecError, match="the space has 32 points and 1 seeds; at most 32"):
        spec_of(small)


def test_overrides_reach_study_base_and_space(tmp_path):
    path = tmp_path / "s.toml"
    path.write_text(TEXT)
    spec = load_study(path, ["budget.trials=4", "data.limit=100", "head.kind=linear", "encoder.width=8"])
    assert spec.trials == 4
    configs = [spec.trial_config(point, 0) for point in ({"head.kind": "linear", "head.projection_dim": 2},)]
    assert configs[0].data.limit == 100
    assert configs[0].encoder.width == 8
    assert spec.space["head.kind"].values == ("linear",)
    for wrong, says in [("budget", "dotted.path=value"), ("bugdet.trials=3", "did you mean budget")]:
        with pytest.raises(SpecError, match=says):
            load_study(path, [wrong])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"name = ", "not a TOML file"),
        (b"\xff\xfe", "not UTF-8"),
        (None, "no such study file"),
    ],
)
def test_files_that_are_not_studies(tmp_path, content, says):
    path = tmp_path / "s.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SpecError, match=says):
        load_study(path)
    with pytest.raises(SpecError, match="a folder, not a study file"):
        load_study(tmp_path)


def test_one_point_follows_its_overrides():
    spec = spec_of()
    assert one_point(spec).head == MlpHead(width=16, projection_dim=2)
    config = one_point(spec, ["head.kind=linear", "head.projection_dim=8", "training.epochs=0"], seed=5)
    assert config.head == LinearHead(projection_dim=8)
    assert (config.seed, config.training.epochs) == (5, 0)
    with pytest.raises(SpecError, match="no such field"):
        one_point(spec, ["head.kind=linear", "head.width=8"])
    for wrong, says in [
        ("head.kind=bogus", r"--set head\.kind: 'bogus' is not one of"),
        ("head.projection_dim=0", r"--set head\.projection_dim: 0"),
        ("data.normalization=z", r"--set data\.normalization: 'z' is not one of"),
    ]:
        with pytest.raises(SpecError, match=says):
            one_point(spec, [wrong])


def test_the_schema_documents_every_field():
    for model in (StudySpec, TrialConfig):
        schema = model.model_json_schema()
        for definition in (schema, *schema["$defs"].values()):
            for name, field in definition.get("properties", {}).items():
                assert field.get("description"), f"{definition.get('title')}.{name}"


@pytest.mark.parametrize(
    "store", ["file:///x?y", "file:///x#y", "file:///a%00b", "s3://bucket/x?versionId=1"]
)
def test_a_store_without_a_plain_place_is_refused(store):
    with pytest.raises(ValidationError, match=r"worker\.checkpoint_store: .* has \?, # or a NUL"):
        WorkerSpec(checkpoint_store=store)
    assert WorkerSpec(checkpoint_store="file:///a%20b").checkpoint_store == "file:///a%20b"


POINTS = """
name = "listed"
mode = "points"
[budget]
epochs = 9
[base]
data.train_on = "training+validation"
[[points]]
head.projection_dim = 4
"""


def refusal(text: str) -> str:
    with pytest.raises(SpecError) as caught:
        spec_of(text)
    said = str(caught.value)
    assert "\n" not in said
    return said


def test_what_trains_on_validation_images_is_a_grid_or_a_list_without_rungs():
    spec = spec_of(POINTS)
    assert (spec.train_on, spec.trains_on_validation) == ("training+validation", True)
    assert spec.trial_config({"head.projection_dim": 4}, 0).data.trains_on_validation
    assert not spec_of().trains_on_validation
    grid = POINTS.replace('"points"', '"grid"').split("[[points]]")[0]
    assert spec_of(f"{grid}[space]\nhead.projection_dim = [2, 4]").trials == 2
    search = grid.replace('"grid"', '"search"').replace("epochs = 9", "epochs = 9\ntrials = 2")
    for text in (
        f"{search}[space]\nhead.projection_dim = [2, 4]",
        POINTS.replace("epochs = 9", "epochs = 9\nrungs = [3]"),
    ):
        assert "data.train_on: 'training+validation' trains on the validation images" in refusal(text)
        assert "mode 'grid' or 'points', without budget.rungs" in refusal(text)


def test_train_on_is_the_same_for_all_trials_and_needs_no_held_out_images():
    plain = POINTS.replace('data.train_on = "training+validation"', "data.limit = 100")
    listed = f'{plain}data.train_on = "training+validation"\n'
    assert "data.train_on: trials of a study must be measured alike" in refusal(listed)
    space = TEXT.replace("data.normalization =", 'data.train_on = ["training"]\ndata.normalization =')
    assert "space.data.train_on: trials of a study must be measured alike" in refusal(space)
    assert "data.train_on: 'all' is not one of" in refusal(POINTS.replace("training+validation", "all"))
    best = POINTS.replace("[[points]]", 'training.keep = "best_validation_loss"\n[[points]]')
    assert "set training.keep = 'last', or data.train_on = 'training'" in refusal(best)
    papers = POINTS.replace('mode = "points"', 'mode = "points"\nprotocol = "schliebitz2024"')
    assert "protocol 'schliebitz2024' has validation images held out" in refusal(papers)


def test_a_study_without_train_on_has_the_hash_that_it_had():
    """Stored specs are compared by hash: a field with a default must not reach those that do not give it."""
    assert "train_on" not in json.dumps(spec_of().to_json())
