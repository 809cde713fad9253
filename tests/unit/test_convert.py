"""The tensor table: pieces and their inverse, by property and against Megatron's documented order."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from phimr_nemo.config import ParallelConfig
from phimr_nemo.errors import UserError
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.families import FAMILIES
from phimr_nemo.model.megatron.attention import MIN_BUCKET_FILL, SHORT_DOCUMENT, bucket_documents, plan_documents
from phimr_nemo.model.megatron.configuration import check_layout, transformer_config
from phimr_nemo.model.megatron.convert import write_pieces
from phimr_nemo.model.table import Placement, full_tensors, pieces, placement_of

BASE = Architecture.from_preset(
    yaml.safe_load((Path(__file__).parents[2] / "conf/model/tiny.yaml").read_text()),
    vocab_size=512,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[Architecture, int]:
    """A random architecture and a tensor-parallel size that divides it."""
    size = draw(st.sampled_from([1, 2, 3, 4]))
    groups = size * draw(st.integers(1, 3))
    heads = groups * draw(st.integers(1, 3))
    head_dim = draw(st.sampled_from([2, 4]))
    layers = draw(st.integers(1, 3))
    family = draw(st.sampled_from(sorted(FAMILIES)))
    arch = dataclasses.replace(
        BASE,
        vocab_size=size * draw(st.integers(1, 4)),
        hidden_size=heads * head_dim,
        intermediate_size=size * draw(st.integers(1, 5)),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        partial_rotary_factor=1.0,
        short_factor=None,
        long_factor=None,
        tie_word_embeddings=draw(st.booleans()),
        family=family,
        no_rope_layers=(1,) * layers if "no_rope_layers" in FAMILIES[family].has else None,
    )
    return arch, size


def read(full: torch.Tensor, placement: Placement, arch: Architecture, rank: int, size: int) -> torch.Tensor:
    where = pieces(placement, arch, rank, size)
    return torch.cat([full.narrow(where.axis, a, b - a) for a, b in where.ranges], dim=where.axis)


@settings(deadline=None, max_examples=60)
@given(shapes())
def test_writing_the_pieces_inverts_reading_them(case: tuple[Architecture, int]) -> None:
    arch, size = case
    for placement in full_tensors(arch):
        full = torch.arange(torch.Size(placement.shape).numel()).view(placement.shape)
        parts = [read(full, placement, arch, rank, size) for rank in range(size)]
        back = torch.full_like(full, -1)
        for rank, part in enumerate(parts):
            write_pieces(back, part, pieces(placement, arch, rank, size))
        assert torch.equal(back, full), placement.name
        if placement.split != "whole":
            assert sum(part.numel() for part in parts) == full.numel(), "every number on exactly one rank"


def test_query_groups_lie_as_megatron_reads_them() -> None:
    """Megatron views a rank's qkv as [groups, (queries of the group, key, value), head_dim, hidden]."""
    placement = next(p for p in full_tensors(BASE) if p.split == "qkv")
    head, group = BASE.head_dim, BASE.num_attention_heads // BASE.num_key_value_heads
    # Every row carries (kind, head): what it is in Hugging Face's stack of queries, keys, values.
    rows = [("q", h) for h in range(BASE.num_attention_heads) for _ in range(head)]
    rows += [(kind, h) for kind in "kv" for h in range(BASE.num_key_value_heads) for _ in range(head)]
    for rank in range(2):
        where = pieces(placement, BASE, rank, 2)
        found = [rows[i] for a, b in where.ranges for i in range(a, b)][::head]
        wanted = [("q", rank * group + i) for i in range(group)] + [("k", rank), ("v", rank)]
        assert found == wanted


def test_gate_and_up_are_split_each() -> None:
    placement = next(p for p in full_tensors(BASE) if p.split == "gate_up")
    half, quarter = BASE.intermediate_size, BASE.intermediate_size // 2
    assert pieces(placement, BASE, 1, 2).ranges == ((quarter, half), (half + quarter, 2 * half))


@pytest.mark.parametrize(
    ("parameter", "tensor"),
    [
        ("decoder.layers.1.self_attention.linear_qkv.weight", "model.layers.7.self_attn.qkv_proj.weight"),
        ("decoder.layers.0.input_layernorm.weight", "model.layers.3.input_layernorm.weight"),
        # Transformer Engine fuses the norms into the layer that follows.
        (
            "decoder.layers.0.mlp.linear_fc1.layer_norm_weight",
            "model.layers.3.post_attention_layernorm.weight",
        ),
        ("decoder.final_layernorm.weight", "model.norm.weight"),
        ("output_layer.weight", "model.embed_tokens.weight"),
    ],
)
def test_names(parameter: str, tensor: str) -> None:
    placement = placement_of(parameter, [3, 7], BASE)
    assert placement is not None
    assert placement.name == tensor


def test_an_untied_head_is_a_tensor_of_its_own() -> None:
    untied = dataclasses.replace(BASE, tie_word_embeddings=False)
    placement = placement_of("output_layer.weight", [], untied)
    assert placement is not None
    assert placement.name == "lm_head.weight"
    assert placement_of("decoder.layers.0.adapter.weight", [0], BASE) is None


@pytest.mark.parametrize(
    ("layout", "named"),
    [
        (ParallelConfig(tensor=4), "6 attention heads"),
        (ParallelConfig(tensor=3), "2 key/value heads"),
        (ParallelConfig(pipeline=3), "4 layers"),
    ],
)
def test_impossible_layouts_name_value_rule_and_remedy(layout: ParallelConfig, named: str) -> None:
    with pytest.raises(UserError) as caught:
        check_layout(BASE, layout)
    assert named in caught.value.problem
    assert caught.value.remedy


def test_megatron_settings_are_checked() -> None:
    config = transformer_config(BASE, ParallelConfig(), dtype=torch.bfloat16, attention_softmax_in_fp32=False)
    assert config.bf16
    assert config.attention_softmax_in_fp32 is False
    with pytest.raises(UserError, match="hidden_dropuot"):
        transformer_config(BASE, ParallelConfig(), dtype=torch.float32, hidden_dropuot=0.1)
    with pytest.raises(UserError, match="float64"):
        transformer_config(BASE, ParallelConfig(), dtype=torch.float64)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=30))
def test_buckets_hold_every_token_once_with_bounded_padding(lengths: list[int]) -> None:
    for bucket in bucket_documents(lengths):
        longest, shortest = max(lengths[i] for i in bucket), min(lengths[i] for i in bucket)
        assert longest <= SHORT_DOCUMENT or shortest >= MIN_BUCKET_FILL * longest
    plan = plan_documents(torch.tensor(lengths))
    row = torch.arange(sum(lengths))
    assert torch.equal(row[plan.gather][plan.scatter], row)
    starts = {sum(lengths[:i]): n for i, n in enumerate(lengths)}
    parts = row[plan.gather].split([documents * width for documents, width in plan.shapes])
    for (documents, width), part in zip(plan.shapes, parts, strict=True):
        for line in part.view(documents, width).tolist():
            length = starts.pop(line[0])
            assert line == [line[0] + min(i, length - 1) for i in range(width)]
    assert not starts
