"""The FLOPs formula counts what torch counts, and what the paper's throughput implies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from phimr_nemo.config import BaseConfig, load_config
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.base import run_base
from phimr_nemo.model.flops import causal_pairs, matmul_parameters, model_flops, model_flops_per_token, peak_flops

LENGTH = 24


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("base")
    run_base(load_config(BaseConfig, Path("conf/base/tiny.yaml"), [f"run.output={root}"]))
    return root / "hf"


def test_forward_and_backward_equal_torch_s_own_counter(directory: Path) -> None:
    """transformers' eager attention computes all L x L pairs, which the formula takes as `pairs`."""
    from transformers import Phi3ForCausalLM

    arch = Architecture.from_directory(directory)
    model = Phi3ForCausalLM.from_pretrained(directory, attn_implementation="eager")
    ids = torch.randint(0, arch.vocab_size, (1, LENGTH))
    with FlopCounterMode(display=False) as counter:
        model(ids).logits.sum().backward()
    # The rotary angles are one product of no consequence: positions x frequencies, forward only.
    angles = 2 * LENGTH * arch.rotary_dim // 2
    assert counter.get_total_flops() - angles == model_flops(arch, LENGTH, LENGTH**2)


def test_pairs_and_weights_by_brute_force(directory: Path) -> None:
    from transformers import Phi3ForCausalLM

    arch = Architecture.from_directory(directory)
    assert causal_pairs(LENGTH) == sum(key <= query for query in range(LENGTH) for key in range(LENGTH))
    model = Phi3ForCausalLM.from_pretrained(directory)
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert matmul_parameters(arch) == linear
    documents = [3, 9, 12]
    per_document = sum(length * model_flops_per_token(arch, length) for length in documents)
    whole = model_flops(arch, sum(documents), sum(map(causal_pairs, documents)))
    assert per_document == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("some other card", None),
    ],
)
def test_peak_by_device_name(name: str, expected: float | None) -> None:
    assert peak_flops(name) == expected
