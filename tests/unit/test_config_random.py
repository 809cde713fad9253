"""What parses is not refused later for a reason that needs no disk and no machine: random overrides of each stage."""

from __future__ import annotations

import dataclasses
import math
import typing
from pathlib import Path
from typing import Any, Final, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stage_settings import load

from phimr_nemo.config import STAGES, parse_config, to_dict
from phimr_nemo.config.rules import KIND
from phimr_nemo.errors import UserError

NUMBERS: Final = (-1, 0, 1, 2, 3, 4, 5, 8, 64, 96, 255, 256, 300, 1024, 10**6, 2**32, 2**60)
FLOATS: Final = (math.nan, math.inf, -math.inf, -1.0, 0.0, 1e-9, 0.1, 0.5, 0.999, 1.0, 1.5, 2.0, 1e9)


def options_of(hint: Any) -> list[Any]:
    """The types that a field may have, without what `Annotated` says of them."""
    if typing.get_origin(hint) is typing.Annotated:
        return options_of(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (typing.Union, type(int | str)):
        return [one for option in typing.get_args(hint) for one in options_of(option)]
    return [hint]


def leaves(schema: Any, values: Any, prefix: str = "") -> list[tuple[str, list[Any]]]:
    """Dotted keys of the sections that a configuration has, each with its types."""
    found = []
    hints = typing.get_type_hints(schema, include_extras=True)
    for item in dataclasses.fields(schema):
        value = values.get(item.name)
        sections = [one for one in options_of(hints[item.name]) if dataclasses.is_dataclass(one)]
        chosen = [one for one in sections if isinstance(value, dict) and one_of(one, value)]
        if chosen:
            found += leaves(chosen[0], value, f"{prefix}{item.name}.")
        elif item.name != KIND:
            found.append((prefix + item.name, options_of(hints[item.name])))
    return found


def one_of(schema: Any, value: dict[str, Any]) -> bool:
    return KIND not in value or value[KIND] in typing.get_args(typing.get_type_hints(schema)[KIND])


def drawn_value(types: list[Any]) -> st.SearchStrategy[str]:
    choices: list[Any] = []
    for one in types:
        if one is int:
            choices += NUMBERS
        elif one is float:
            choices += ["." + str(v).replace("-", "") if not math.isfinite(v) else v for v in FLOATS]
            choices.append("-.inf")
        elif one is bool:
            choices += ["true", "false"]
        elif one is type(None):
            choices.append("null")
        elif typing.get_origin(one) is Literal:
            choices += typing.get_args(one)
        elif one is Path:
            choices.append("some/where")
    return st.sampled_from([str(choice) for choice in choices] or ["null"])


@pytest.mark.parametrize("stage", STAGES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_what_parses_is_not_refused_later_without_disk_and_machine(stage: str, data: st.DataObject) -> None:
    keys = leaves(STAGES[stage], to_dict(load(stage)))
    chosen = data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=4, unique_by=lambda pair: pair[0]))
    overrides = [f"{key}={data.draw(drawn_value(types), label=key)}" for key, types in chosen]
    try:
        config = load(stage, *overrides)
    except UserError as refused:
        config, said = None, (refused.problem, refused.rule, refused.remedy)
    if config is None:
        assert all(said)
        return
    assert parse_config(STAGES[stage], to_dict(config)) == config
    LATER[stage](config)


def later_base(config: Any) -> None:
    from phimr_nemo.model.base import tiny_architecture

    architecture = tiny_architecture(config, end_of_text=0)
    assert math.isfinite(architecture.attention_factor)


def later_training(config: Any) -> None:
    from phimr_nemo.jobs.preflight import derived_numbers
    from phimr_nemo.training.schedule import learning_rate

    for stage, schema in STAGES.items():
        if type(config) is schema:
            derived_numbers(stage, config)
    steps = 7
    for step in range(steps):
        assert 0.0 <= learning_rate(step, steps, config.optim) <= config.optim.lr * (1 + 1e-9)


def later_supervised(config: Any) -> None:
    later_training(config)
    if config.evaluation is not None:
        later_sampled(config.evaluation)


def later_rounds(config: Any) -> None:
    from phimr_nemo.align.grpo.stabilisers import annealed_temperature
    from phimr_nemo.align.grpo.stage import _trainer_options
    from phimr_nemo.generate.sampler import SamplingParams

    later_training(config)
    steps = config.steps
    for step in {0, 1, steps // 2, steps - 1}:
        SamplingParams(annealed_temperature(step, steps, config.temperature), 1.0, config.max_new_tokens)
    batch = _trainer_options(config).model_gbs
    assert batch * config.inner_batches == config.prompts_per_step * config.group_size
    assert batch % config.parallel.data == 0


def later_sampled(config: Any) -> None:
    from phimr_nemo.generate.engines import params_of

    params_of(config)
    assert config.prompt.replace("{question}", "q") != config.prompt


def later_generate(config: Any) -> None:
    from phimr_nemo.config import ModelTeacher

    if isinstance(config.teacher, ModelTeacher):
        later_sampled(config.teacher)
    assert list(range(9))[config.shard.index :: config.shard.count] is not None
    assert config.problems is not None or config.teacher.kind == "recorded"


def later_verify(config: Any) -> None:
    from phimr_nemo.verify.answer import Grader

    Grader(workers=1, deadline_seconds=config.deadline_seconds)


def nothing_later(_: Any) -> None:
    """All else that such a stage refuses is in its data."""


LATER: Final[dict[str, Any]] = {
    **dict.fromkeys(STAGES, nothing_later),
    "base": later_base,
    "midtrain": later_supervised,
    "sft": later_supervised,
    "dpo": later_training,
    "grpo": later_rounds,
    "distill": later_rounds,
    "generate": later_generate,
    "evaluate": later_sampled,
    "verify": later_verify,
}


# --- every field ----------------------------------------------------------------------------------------------


def numeric_fields(schema: type, seen: set[type]) -> list[tuple[type, str]]:
    if schema in seen:
        return []
    seen.add(schema)
    found = []
    for name, hint in typing.get_type_hints(schema, include_extras=True).items():
        for one in options_of(hint):
            if one in (int, float):
                found.append((schema, name))
            elif dataclasses.is_dataclass(one) and isinstance(one, type):
                found += numeric_fields(one, seen)
    return found


SEEN: Final[set[type]] = set()
NUMERIC: Final = [pair for schema in STAGES.values() for pair in numeric_fields(schema, SEEN)]


@pytest.mark.parametrize(("schema", "name"), NUMERIC, ids=[f"{s.__name__}.{n}" for s, n in NUMERIC])
def test_no_number_is_nan_infinite_or_a_truth_value(schema: type, name: str) -> None:
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    hint = typing.get_type_hints(schema, include_extras=True)[name]
    adapter = TypeAdapter(hint, config=ConfigDict(allow_inf_nan=False))
    for value in (math.nan, math.inf, -math.inf, True):
        with pytest.raises(ValidationError):
            adapter.validate_python(value)
