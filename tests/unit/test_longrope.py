"""LongRoPE: frequencies and attention factor against transformers, policies, packed angles by brute force."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from phimr_nemo.errors import UserError
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.longrope import LongRopePolicy, LongRotaryEmbedding, inverse_frequencies, uses_long_factors
from phimr_nemo.plan.request import find_model

DEFAULT: LongRopePolicy = "long_when_max_length_exceeds_original"
ORIGINAL = 4096


@pytest.fixture
def phi4mini(repository: Path) -> Architecture:
    return Architecture.from_preset(yaml.safe_load((repository / "conf/model/phi4mini.yaml").read_text()))


@pytest.mark.parametrize("preset", ["phi4mini", "phi3.5-mini"])
@pytest.mark.parametrize("length", [1, ORIGINAL, ORIGINAL + 1, 131072])
def test_frequencies_and_factor_equal_transformers_bit_for_bit(preset: str, length: int) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    arch = find_model(preset)
    config = transformers.Phi3Config(**arch.to_hf_config())
    wanted, factor = ROPE_INIT_FUNCTIONS["longrope"](config, "cpu", seq_len=length)
    assert torch.equal(inverse_frequencies(arch, length, "per_sequence", length), wanted)
    assert arch.attention_factor == factor


@pytest.mark.parametrize(
    ("policy", "max_length", "sequence_length", "is_long"),
    [
        (DEFAULT, ORIGINAL, ORIGINAL, False),
        (DEFAULT, ORIGINAL + 1, 1, True),
        ("per_sequence", 2 * ORIGINAL, ORIGINAL, False),
        ("per_sequence", 2 * ORIGINAL, ORIGINAL + 1, True),
        ("always_short", 2 * ORIGINAL, 2 * ORIGINAL, False),
    ],
)
def test_policies(
    phi4mini: Architecture, policy: LongRopePolicy, max_length: int, sequence_length: int, is_long: bool
) -> None:
    assert uses_long_factors(phi4mini, max_length, policy, sequence_length) is is_long
    factors = phi4mini.long_factor if is_long else phi4mini.short_factor
    assert factors is not None
    # By the formula, in double precision: 1 / (factor_i * theta^(2i / 96))
    wanted = [1.0 / (factor * 10000.0 ** (2 * i / 96)) for i, factor in enumerate(factors)]
    found = inverse_frequencies(phi4mini, max_length, policy, sequence_length)
    torch.testing.assert_close(found.double(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-6, atol=0)


def test_plain_rotary_has_no_regimes(phi4mini: Architecture) -> None:
    import dataclasses

    plain = dataclasses.replace(phi4mini, short_factor=None, long_factor=None)
    short, long = (inverse_frequencies(plain, 2 * ORIGINAL, "per_sequence", n) for n in (1, 2 * ORIGINAL))
    assert torch.equal(short, long)
    assert plain.attention_factor == 1.0


def test_policy_mistakes_are_named(phi4mini: Architecture) -> None:
    with pytest.raises(UserError, match="per_sequence"):
        inverse_frequencies(phi4mini, ORIGINAL, "per_sequence")
    with pytest.raises(UserError, match="sometimes"):
        inverse_frequencies(phi4mini, ORIGINAL, "sometimes")  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", [DEFAULT, "per_sequence", "always_short"])
def test_packed_angles_are_those_of_each_document_alone(phi4mini: Architecture, policy: LongRopePolicy) -> None:
    lengths = [3, ORIGINAL + 2, 1, 40]
    rotary = LongRotaryEmbedding(phi4mini, 2 * ORIGINAL, policy)
    found = rotary.for_documents(torch.tensor(lengths))
    alone = [rotary.for_length(n, torch.device("cpu")) for n in lengths]
    assert torch.equal(found, torch.cat(alone)[:, 0])
    # Any choice of positions has the angles of the whole.
    some = torch.tensor([5, 0, ORIGINAL + 1])
    assert torch.equal(rotary.for_positions(some, lengths[1]), alone[1][some])
    # And each of them is position x frequency, in both halves.
    inverse = inverse_frequencies(phi4mini, 2 * ORIGINAL, policy, lengths[1])
    assert torch.equal(alone[1][7, 0, 0], torch.cat((7.0 * inverse, 7.0 * inverse)))


def test_angles_stay_float32_in_a_bfloat16_model(phi4mini: Architecture) -> None:
    rotary = LongRotaryEmbedding(phi4mini, 2 * ORIGINAL, DEFAULT)
    before = rotary.for_length(5, torch.device("cpu"))
    after = rotary.bfloat16().for_length(5, torch.device("cpu"))
    assert after.dtype == torch.float32
    assert torch.equal(before, after)
