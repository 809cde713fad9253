"""A hundred and more config.json files, field by field as transformers 4.51 and 5 read them, or refused."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from config_worker import FIELDS
from configs import READ, REFUSED, Config, four

from phimr_nemo.errors import UserError
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.longrope import inverse_frequencies

WORKER = Path(__file__).with_name("config_worker.py")
FEWEST = 100
# transformers 4 asks for exactly three fields in rope_scaling and knows no rope_type there; 5 has lost the name "su".
NOT_OF_FOUR = ("must be a dictionary with three fields", "type field must be one of ['longrope'], got None")
NOT_OF_FIVE = "Missing required keys in `rope_parameters`"
OF_FIVE_ONLY = "rope_parameters"
WRITTEN = " as written here"


def as_read_here(arch: Architecture) -> dict[str, Any]:
    """What transformers is asked for, by this project."""
    fields = {name: getattr(arch, name) for name in FIELDS}
    fields["short"] = inverse_frequencies(arch, 1, "always_short").tolist()
    fields["attention_factor"] = arch.attention_factor
    if arch.long_factor is not None:
        fields["original_max_position_embeddings"] = original = arch.original_max_position_embeddings
        long = inverse_frequencies(arch, original + 1, "long_when_max_length_exceeds_original")
        fields["long"] = long.tolist()
    return fields


def as_meant(found: dict[str, Any]) -> dict[str, Any]:
    """What transformers says, with one end token, which also pads where nothing else does (generate() does so)."""
    end = found["eos_token_id"]
    end = end[0] if isinstance(end, list) else end
    pad = found["pad_token_id"]
    return {**found, "eos_token_id": end, "pad_token_id": end if pad is None else pad}


def differing(arch: Architecture, found: dict[str, Any]) -> list[str]:
    """The fields that are not equal, to the last bit."""
    here, there = as_read_here(arch), as_meant(found)
    return sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))


@pytest.fixture(scope="module")
def architectures() -> dict[str, Architecture]:
    return {name: Architecture.from_hf_config(config) for name, config in READ.items()}


def by_transformers(interpreter: Path, architectures: dict[str, Architecture], work: Path) -> dict[str, Any]:
    """Every config, and what is written after reading it, read by an environment's transformers."""
    written = {name + WRITTEN: arch.to_hf_config() for name, arch in architectures.items()}
    jobs = work / "configs.json"
    jobs.write_text(json.dumps({**READ, **written}))
    command = [str(interpreter), str(WORKER), str(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("ANSWER "))
    answer: dict[str, Any] = json.loads(line.removeprefix("ANSWER "))
    return answer


def check_written(architectures: dict[str, Architecture], found: dict[str, Any]) -> None:
    """What is written is read without exception and without difference."""
    for name, arch in architectures.items():
        read = found[name + WRITTEN]
        assert "error" not in read, (name, read)
        assert differing(arch, read) == [], name


def test_there_are_a_hundred() -> None:
    assert len(READ) + len(REFUSED) >= FEWEST


def test_transformers_4_reads_the_same(architectures: dict[str, Architecture], tmp_path: Path) -> None:
    answer = by_transformers(Path(sys.executable), architectures, tmp_path)
    assert answer["version"].startswith("4.51.")
    compared = 0
    for name, arch in architectures.items():
        found = answer["configs"][name]
        if "error" in found:
            assert any(words in found["error"] for words in NOT_OF_FOUR), (name, found)
        elif OF_FIVE_ONLY not in READ[name]:
            assert differing(arch, found) == [], name
            compared += 1
    assert compared > len(READ) // 2
    check_written(architectures, answer["configs"])


@pytest.mark.parametrize("environment", ["vllm", "bridge", "clients"])
def test_transformers_5_reads_the_same(
    environment: str, architectures: dict[str, Architecture], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    answer = by_transformers(request.getfixturevalue(f"{environment}_python"), architectures, tmp_path)
    assert answer["version"].startswith("5.")
    for name, arch in architectures.items():
        found = answer["configs"][name]
        if "error" in found:
            assert NOT_OF_FIVE in found["error"], (name, found)
            assert READ[name]["rope_scaling"]["type"] == "su", name
        else:
            assert differing(arch, found) == [], name
    check_written(architectures, answer["configs"])


@pytest.mark.parametrize(("config", "named"), REFUSED.values(), ids=REFUSED.keys())
def test_contradictions_and_other_models_are_refused(config: Config, named: str) -> None:
    with pytest.raises(UserError) as caught:
        Architecture.from_hf_config(config)
    assert named in caught.value.problem
    assert caught.value.rule
    assert caught.value.remedy


@pytest.mark.parametrize(
    "change",
    [
        {"original_max_position_embeddings": 8192},
        {"rope_theta": 10001.0},
        {"partial_rotary_factor": 0.5, "short_factor": None, "long_factor": None},
        {"long_factor": tuple(1.0 + 0.5000001 * index for index in range(12))},
        {"bos_token_id": 1},
        {"tie_word_embeddings": False},
    ],
    ids=lambda change: " ".join(change),
)
def test_a_field_read_wrongly_would_be_seen(change: dict[str, Any]) -> None:
    """The planted faults."""
    right = Architecture.from_hf_config(four())
    assert differing(right, as_read_here(right)) == []
    assert differing(dataclasses.replace(right, **change), as_read_here(right))
