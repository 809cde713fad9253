"""A model trained with one set of LongRoPE's factors and used with the other is noticed."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from phimr_nemo.config import LongRopePolicy
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.regime import other_regime, regime_name, training_of, warn_of_other_regime

ORIGINAL = 4096
DEFAULT: LongRopePolicy = "long_when_max_length_exceeds_original"


@pytest.fixture
def phi4mini(repository: Path) -> Architecture:
    return Architecture.from_preset(yaml.safe_load((repository / "conf/model/phi4mini.yaml").read_text()))


def trained(run: Path, length: int, policy: str = DEFAULT) -> Path:
    """The directory of a model as a stage leaves it beside its configuration."""
    (run / "hf").mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump({"sequence_length": length, "model": {"longrope": policy}}))
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
    assert training_of(model) == (length, policy)
    found = other_regime(phi4mini, model, used, used_policy)
    assert (found is not None) is is_wrong
    if found is not None:
        for part in (str(model), str(length), str(used), str(ORIGINAL)):
            assert part in found


def test_nothing_to_say_about_models_from_elsewhere_or_without_longrope(
    tmp_path: Path, phi4mini: Architecture
) -> None:
    import dataclasses

    (tmp_path / "hub" / "hf").mkdir(parents=True)
    assert training_of(tmp_path / "hub" / "hf") is None
    for text in ("{", "[]", "sequence_length: x\nmodel: {longrope: always_short}", "sequence_length: 3\nmodel: 4"):
        (tmp_path / "hub" / "config.yaml").write_text(text)
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


def test_it_is_a_warning(tmp_path: Path, phi4mini: Architecture, caplog: pytest.LogCaptureFixture) -> None:
    model = trained(tmp_path / "run", 16384)
    with caplog.at_level(logging.WARNING):
        warn_of_other_regime(phi4mini, model, 8192, DEFAULT)
        assert not caplog.records
        warn_of_other_regime(phi4mini, model, 4000, DEFAULT)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "trained with LongRoPE's long factors" in caplog.text


def test_it_needs_no_torch() -> None:
    code = "import sys, phimr_nemo.model.regime; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
