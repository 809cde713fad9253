"""Every file under conf/ loads into its dataclass, and what a preset leaves open is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from phimr_nemo.config import (
    STAGES,
    GenerationPlanConfig,
    QuickstartConfig,
    TrainingPlanConfig,
    load_config,
    parse_config,
    to_dict,
    to_yaml,
)
from phimr_nemo.config.ablations import (
    DirectSFTConfig,
    DPONegativesConfig,
    ForgettingConfig,
    GraderErrorsConfig,
    GRPORemediesConfig,
    GRPOSizesConfig,
    MidtrainPackingConfig,
    MidtrainScalingConfig,
    MismatchConfig,
    Recipe2026Config,
    RepetitionConfig,
    SecondDomainConfig,
    SolutionsConfig,
    StoppingConfig,
    TeachersConfig,
)
from phimr_nemo.errors import UserError
from phimr_nemo.model.architecture import Architecture

CONF = Path(__file__).resolve().parents[2] / "conf"
SCHEMAS: dict[str, type[Any]] = {**STAGES, "quickstart": QuickstartConfig}
PLANS: dict[str, type[Any]] = {
    **dict.fromkeys(("midtrain", "sft", "dpo", "grpo", "distill"), TrainingPlanConfig),
    "generate": GenerationPlanConfig,
}
OTHERS = ("model", "cluster", "plan", "ablations")
ABLATIONS: dict[str, type[Any]] = {
    "dpo_negatives": DPONegativesConfig,
    "forgetting": ForgettingConfig,
    "grader_errors": GraderErrorsConfig,
    "grpo_remedies": GRPORemediesConfig,
    "grpo_sizes": GRPOSizesConfig,
    "stopping": StoppingConfig,
    "mismatch": MismatchConfig,
    "recipe2026": Recipe2026Config,
    "repetition": RepetitionConfig,
    "midtrain_scaling": MidtrainScalingConfig,
    "midtrain_packing": MidtrainPackingConfig,
    "direct_sft": DirectSFTConfig,
    "second_domain": SecondDomainConfig,
    "solutions": SolutionsConfig,
    "teachers": TeachersConfig,
}
LEFT_TO_THE_USER = "???"


def files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (CONF / folder).rglob("*.yaml"))


def open_keys(values: Any, prefix: str = "") -> list[str]:
    """Dotted keys whose value a preset leaves to the user."""
    if isinstance(values, dict):
        return [key for name, value in values.items() for key in open_keys(value, f"{prefix}{name}.")]
    return [prefix[:-1]] if values == LEFT_TO_THE_USER else []


def written(path: Path) -> dict[str, Any]:
    """A file's values over those of the file that it extends."""
    values: dict[str, Any] = yaml.safe_load(path.read_text("utf-8"))
    below = values.pop("extends", None)
    return values if below is None else {**written(path.parent / below), **values}


def named(path: Path) -> str:
    return str(path.relative_to(CONF))


def test_every_folder_is_known_and_every_stage_has_a_paper_preset() -> None:
    assert {path.name for path in CONF.iterdir()} <= {*SCHEMAS, *OTHERS}
    for stage in set(STAGES) - {"base"}:
        assert (CONF / stage / "paper.yaml").is_file(), f"conf/{stage}/paper.yaml is absent"


@pytest.mark.parametrize("path", files(*SCHEMAS), ids=named)
def test_preset_loads_and_survives_a_round_trip(path: Path) -> None:
    schema = SCHEMAS[path.parent.name]
    answers = [f"{key}=given/by/user" for key in open_keys(written(path))]
    config = load_config(schema, path, answers)
    assert parse_config(schema, to_dict(config)) == config
    assert parse_config(schema, yaml.safe_load(to_yaml(config))) == config


@pytest.mark.parametrize("path", files(*SCHEMAS), ids=named)
def test_what_a_preset_leaves_open_is_asked_for(path: Path) -> None:
    keys = open_keys(written(path))
    if not keys:
        load_config(SCHEMAS[path.parent.name], path)
        return
    with pytest.raises(UserError) as caught:
        load_config(SCHEMAS[path.parent.name], path)
    for key in keys:
        assert key.split(".")[-1] in str(caught.value)


@pytest.mark.parametrize("path", files(*SCHEMAS), ids=named)
def test_a_misspelt_key_is_refused_with_a_suggestion(path: Path) -> None:
    schema = SCHEMAS[path.parent.name]
    answers = [f"{key}=given/by/user" for key in open_keys(written(path))]
    with pytest.raises(UserError, match=r"run\.sed.*run\.seed"):
        load_config(schema, path, [*answers, "run.sed=1"])


@pytest.mark.parametrize("path", files("ablations"), ids=named)
def test_ablation_preset_loads(path: Path) -> None:
    config = load_config(ABLATIONS[path.stem], path)
    assert parse_config(ABLATIONS[path.stem], to_dict(config)) == config


@pytest.mark.parametrize("path", files("model"), ids=named)
def test_model_preset_is_an_architecture(path: Path) -> None:
    values = yaml.safe_load(path.read_text("utf-8"))
    tokens = {"vocab_size": 512, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    filled = {name: value for name, value in tokens.items() if values.get(name) is None}
    architecture = Architecture.from_preset(values, **filled)
    assert architecture.hidden_size == values["hidden_size"]
    assert Architecture.from_hf_config(architecture.to_hf_config()) == architecture


@pytest.mark.parametrize("path", files("plan"), ids=named)
def test_plan_preset_is_of_the_stage_that_it_is_named_for(path: Path) -> None:
    config = load_config(PLANS[path.stem], path)
    assert to_dict(config)["stage"] == path.stem
