"""A model trained with one set of LongRoPE's factors and used with the other is noticed."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from phimr_nemo.config import LongRopePolicy
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.origin import Origin, read_origin
from phimr_nemo.model.regime import (
    opening_as_trained,
    other_regime,
    regime_name,
    uses_long_factors,
    warn_of_other_regime,
)

ORIGINAL = 4096
DEFAULT: LongRopePolicy = "long_when_max_length_exceeds_original"


@pytest.fixture
def phi4mini(repository: Path) -> Architecture:
    return Architecture.from_preset(yaml.safe_load((repository / "conf/model/phi4mini.yaml").read_text()))


def trained(run: Path, length: int, policy: LongRopePolicy = DEFAULT) -> Path:
    """The directory of a model as a stage leaves it, as far as it tells of its training."""
    (run / "hf").mkdir(parents=True)
    (run / "hf" / "config.json").write_text(json.dumps(Origin(length, policy).to_config()))
    return run / "hf"


@pytest.mark.parametrize(
    ("length", "policy", "used", "used_policy", "is_wrong"),
    [
        (16384, DEFAULT, 4000, DEFAULT, True),  # trained long, evaluated short
        (4096, DEFAULT, 4097, DEFAULT, True),  # and the other way round
        (16384, DEFAULT, 4097, DEFAULT, False),
        (2048, DEFAULT, 4096, DEFAULT, False),
        (16384, "always_short", 16384, DEFAULT, True),
        (16384, "always_short", 4096, DEFAULT, False),
        (16384, "per_sequence", 16384, DEFAULT, False),
    ],
)
def test_the_two_sides_of_the_original_length(
    length: int,
    policy: LongRopePolicy,
    used: int,
    used_policy: LongRopePolicy,
    is_wrong: bool,
    tmp_path: Path,
    phi4mini: Architecture,
) -> None:
    model = trained(tmp_path / "run", length, policy)
    assert read_origin(model) == Origin(length, policy)
    found = other_regime(phi4mini, model, used, used_policy)
    assert (found is not None) is is_wrong
    if found is not None:
        for part in (str(model), str(length), str(used), str(ORIGINAL)):
            assert part in found


def test_nothing_to_say_about_models_from_elsewhere_or_without_longrope(
    tmp_path: Path, phi4mini: Architecture
) -> None:
    (tmp_path / "hub" / "hf").mkdir(parents=True)
    assert read_origin(tmp_path / "hub" / "hf") == Origin()
    strange = [
        {"sequence_length": "x", "longrope": "always_short"},
        {"sequence_length": True, "longrope": "always_short"},
        {"sequence_length": 16384, "longrope": ["always_short"]},
        {"sequence_length": -1, "longrope": DEFAULT},
        {"single_turn": 1, "knows": ["x"]},
        [16384],
        None,
    ]
    for text in ("{", "[]", "[" * 100_000, *(json.dumps({"phimr_nemo": value}) for value in strange)):
        (tmp_path / "hub" / "hf" / "config.json").write_text(text)
        assert other_regime(phi4mini, tmp_path / "hub" / "hf", 5000, DEFAULT) is None
    plain = dataclasses.replace(phi4mini, short_factor=None, long_factor=None)
    assert other_regime(plain, trained(tmp_path / "run", 16384), 100, DEFAULT) is None


@pytest.mark.parametrize(
    ("length", "policy", "words"),
    [
        (16384, DEFAULT, "long: 16,384 tokens are more than 4,096"),
        (4096, DEFAULT, "short: 4,096 tokens are not more than 4,096"),
        (16384, "always_short", "short: the policy is always_short"),
        (16384, "per_sequence", "short up to 4,096 tokens, long beyond, sequence by sequence"),
        (4096, "per_sequence", "short: 4,096 tokens are not more than 4,096"),
    ],
)
def test_the_regime_in_words(length: int, policy: LongRopePolicy, words: str, phi4mini: Architecture) -> None:
    assert regime_name(phi4mini, length, policy) == words


@pytest.mark.parametrize(
    ("length", "policy", "asked", "opened"),
    [
        (1024, DEFAULT, None, 4096),  # trained short: as far as its training's factors go
        (1024, DEFAULT, 100, 100),
        (1024, DEFAULT, 5000, 5000),
        (16384, "always_short", None, 16384),
        (16384, DEFAULT, None, 131072),  # trained long: the whole context
        (16384, DEFAULT, 4096, 4097),  # the shortest that has the long factors
        (16384, DEFAULT, 5000, 5000),
        (16384, "per_sequence", None, 131072),
    ],
)
def test_a_model_is_opened_with_the_factors_of_its_training(
    length: int, policy: LongRopePolicy, asked: int | None, opened: int, phi4mini: Architecture
) -> None:
    opening = opening_as_trained(phi4mini, Origin(length, policy), asked)
    assert opening.max_length == opened
    was_long = uses_long_factors(phi4mini, length, policy, length)
    assert uses_long_factors(phi4mini, opening.max_length, opening.policy, opening.max_length) is was_long
    # Whatever differs from what was asked for, or from what was trained, is said.
    is_beyond = asked is not None and not was_long and asked > max(length, ORIGINAL)
    assert bool(opening.notes) is (is_beyond or (asked is not None and opened != asked))


@pytest.mark.parametrize("asked", [None, 100, 5000])
def test_a_model_from_elsewhere_is_opened_as_the_engines_do(asked: int | None, phi4mini: Architecture) -> None:
    opening = opening_as_trained(phi4mini, Origin(), asked)
    assert (opening.max_length, opening.policy, opening.notes) == (asked or 131072, DEFAULT, ())
    plain = dataclasses.replace(phi4mini, short_factor=None, long_factor=None)
    assert opening_as_trained(plain, Origin(16384, "always_short"), asked).max_length == (asked or 131072)


def test_it_is_a_warning(tmp_path: Path, phi4mini: Architecture, caplog: pytest.LogCaptureFixture) -> None:
    model = trained(tmp_path / "run", 16384)
    with caplog.at_level(logging.WARNING):
        warn_of_other_regime(phi4mini, model, 8192, DEFAULT)
        assert not caplog.records
        warn_of_other_regime(phi4mini, model, 4000, DEFAULT)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "trained with LongRoPE's long factors" in caplog.text


def test_engines_that_choose_by_length_warn(
    tmp_path: Path, phi4mini: Architecture, caplog: pytest.LogCaptureFixture
) -> None:
    """vLLM and TensorRT-LLM, in the process and served."""
    from phimr_nemo.generate.serving.vllm import check_longrope

    origin = Origin(1024, DEFAULT)
    (tmp_path / "config.json").write_text(json.dumps({**phi4mini.to_hf_config(), **origin.to_config()}))
    with caplog.at_level(logging.WARNING):
        check_longrope(tmp_path, DEFAULT, 4096)
        assert not caplog.records
        check_longrope(tmp_path, DEFAULT, 8192)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "short factors" in caplog.text


def test_it_needs_no_torch() -> None:
    code = "import sys, phimr_nemo.model.regime; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
