"""A decoder for inference in plain PyTorch: weights by their Hugging Face names, a static key-value cache whose slot
is the position, grouped queries without expanding keys and values.

It repeats the arithmetic of transformers' models of all families (pre-norm RMSNorm, SwiGLU, rotary embedding; where a
family has them biases and norms of queries and keys) with stacked matrices, and is tested against them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from phimr_nemo.errors import UserError
from phimr_nemo.generate.local.matrices import Matrix, takes_copies
from phimr_nemo.losses.device import sent
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.table import EMBEDDING, HEAD, full_tensors, parts_of, tensor_shapes


@dataclass(frozen=True)
class _LayerWeights:
    attention_norm: Tensor
    qkv: Matrix
    attention_out: Matrix
    mlp_norm: Tensor
    gate_up: Matrix
    down: Matrix
    qkv_bias: Tensor | None
    query_norm: Tensor | None
    key_norm: Tensor | None
    is_rotated: bool


@dataclass(frozen=True)
class Weights:
    """A checked, complete set of weights owned by the sampler (never a view of the trainer's parameters)."""

    embedding: Tensor
    layers: tuple[_LayerWeights, ...]
    final_norm: Tensor
    head: Matrix


def own_weights(
    arch: Architecture,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Weights:
    """Copy a full set of named tensors.

    Args:
        arch: decides which names and shapes there must be.
        tensors: (Hugging Face name, tensor), in any order. With tied embeddings a `lm_head.weight` is refused,
            because a head that differs from the embedding would silently be ignored.
        dtype: the dtype to compute in.
        device: where to compute.

    Raises:
        UserError: a tensor is missing, unknown, repeated or of another shape.
    """
    shapes = tensor_shapes(arch)
    copies: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if name not in shapes or name in copies or tuple(tensor.shape) != shapes[name]:
            problem = "repeated" if name in copies else f"of shape {list(tensor.shape)}"
            wanted = f"expected shape {list(shapes[name])}" if name in shapes else "no such tensor is expected"
            raise UserError(
                f"weight {name!r} is {problem}; {wanted}",
                rule="the sampler takes exactly the tensors of its architecture, once each",
                remedy="send the tensors of the same model, as exported under their Hugging Face names",
            )
        copies[name] = tensor.detach().to(device=device, dtype=dtype, copy=True).contiguous()
    missing = sorted(set(shapes) - set(copies))
    if missing:
        raise UserError(
            f"{len(missing)} weights are missing, the first is {missing[0]!r}",
            rule="the sampler takes exactly the tensors of its architecture, once each",
            remedy="send the whole model; a partial update would mix old and new weights",
        )
    return _arrange(arch, copies)


def _arrange(arch: Architecture, copies: dict[str, Tensor]) -> Weights:
    """Put the tensors in their places; what a family keeps in parts is put together, and the parts let go."""
    named = {}
    for full in full_tensors(arch):
        parts = [copies.pop(part.name) for part in parts_of(full)]
        named[full.name] = parts[0] if len(parts) == 1 else torch.cat(parts)
    numbers = sum(tensor.numel() for tensor in named.values())
    as_matrix = functools.partial(Matrix, copied=takes_copies(named[EMBEDDING], numbers))
    layers = []
    for layer, is_rotated in enumerate(arch.rotated_layers):
        prefix = f"model.layers.{layer}."
        layers.append(
            _LayerWeights(
                attention_norm=named[prefix + "input_layernorm.weight"],
                qkv=as_matrix(named[prefix + "self_attn.qkv_proj.weight"]),
                attention_out=as_matrix(named[prefix + "self_attn.o_proj.weight"]),
                mlp_norm=named[prefix + "post_attention_layernorm.weight"],
                gate_up=as_matrix(named[prefix + "mlp.gate_up_proj.weight"]),
                down=as_matrix(named[prefix + "mlp.down_proj.weight"]),
                qkv_bias=named.get(prefix + "self_attn.qkv_proj.bias"),
                query_norm=named.get(prefix + "self_attn.q_norm.weight"),
                key_norm=named.get(prefix + "self_attn.k_norm.weight"),
                is_rotated=is_rotated,
            )
        )
    embedding = named[EMBEDDING]
    head = as_matrix(named.get(HEAD, embedding))
    return Weights(embedding, tuple(layers), named["model.norm.weight"], head)


def cache_bytes_a_position(arch: Architecture, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one token in all layers."""
    return 2 * arch.num_hidden_layers * arch.num_key_value_heads * arch.head_dim * dtype.itemsize


class KVCache:
    """Keys and values of a number of sequences; slot s of a row holds position s.

    Capacity grows by doubling up to its limit, so short responses under a large limit stay cheap.

    Args:
        arch: gives layers, key-value heads and head size.
        rows: sequences that fit.
        capacity: positions to reserve at first.
        limit: positions that may ever be needed.
        like: a tensor of the dtype and device to use.
    """

    def __init__(self, arch: Architecture, *, rows: int, capacity: int, limit: int, like: Tensor) -> None:
        self._limit = limit
        shape = (2, rows, arch.num_key_value_heads, min(capacity, limit), arch.head_dim)
        # Zeros, not empty: a masked slot has weight 0, and 0 times a stray NaN would still be NaN.
        self.layers = [like.new_zeros(shape) for _ in range(arch.num_hidden_layers)]

    @property
    def capacity(self) -> int:
        """Positions reserved for each row."""
        return int(self.layers[0].shape[3])

    def reserve(self, positions: int) -> None:
        """Make room for `positions` positions a row."""
        if positions <= self.capacity:
            return
        capacity = min(max(positions, 2 * self.capacity), self._limit)
        for index, old in enumerate(self.layers):
            grown = old.new_zeros((*old.shape[:3], capacity, old.shape[4]))
            grown[:, :, :, : old.shape[3]] = old
            self.layers[index] = grown

    def copy_rows(self, source: KVCache, source_rows: Tensor, rows: Tensor, positions: int) -> None:
        """Copy the first `positions` positions of rows of `source` (which may be this cache) into rows here."""
        self.reserve(positions)
        for mine, theirs in zip(self.layers, source.layers, strict=True):
            mine[:, rows, :, :positions] = theirs[:, source_rows, :, :positions]


class Decoder:
    """The forward passes of the model: whole prompts, and one token a row.

    Args:
        arch: the model's architecture.
        weights: its weights.
        inverse_frequencies: [rotary_dim / 2] float32, as the run's LongRoPE policy gives them.
        max_length: the largest sequence in tokens.
    """

    def __init__(self, arch: Architecture, weights: Weights, inverse_frequencies: Tensor, max_length: int) -> None:
        self.arch, self.weights, self._max_length = arch, weights, max_length
        self._heads, self._groups, self._head_dim = (
            arch.num_attention_heads,
            arch.num_key_value_heads,
            arch.head_dim,
        )
        self._rotary_dim = arch.rotary_dim
        like = weights.embedding
        positions = torch.arange(max_length, dtype=torch.float32)
        angles = torch.outer(positions, inverse_frequencies.float().cpu())
        angles = torch.cat((angles, angles), dim=-1)
        self._cos = (angles.cos() * arch.attention_factor).to(like)
        self._sin = (angles.sin() * arch.attention_factor).to(like)

    def prefill(self, prompts: Sequence[tuple[int, ...]]) -> tuple[KVCache, Tensor]:
        """Run whole prompts.

        Args:
            prompts: token ids of each.

        Returns:
            A cache with one row a prompt, and the logits [prompts, vocab] that follow each prompt.
        """
        device = self.weights.embedding.device
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        longest = int(lengths.max())
        cache = KVCache(self.arch, rows=len(prompts), capacity=longest, limit=longest, like=self.weights.embedding)
        # Prompts differ in length by much; all but attention is computed for their tokens alone, one after the other.
        tokens = sent(torch.tensor([token for prompt in prompts for token in prompt]), device)
        rows = sent(torch.arange(len(prompts)).repeat_interleave(lengths), device)
        positions = sent(torch.cat([torch.arange(len(prompt)) for prompt in prompts]), device)
        hidden = F.embedding(tokens, self.weights.embedding)[None]
        cos, sin = self._cos[positions], self._sin[positions]
        queries = hidden.new_zeros(len(prompts), self._heads, longest, self._head_dim)
        for layer, stored in zip(self.weights.layers, cache.layers, strict=True):
            query, key, value = self._project(layer, hidden)
            if layer.is_rotated:
                query, key = self._rotate(query, cos, sin), self._rotate(key, cos, sin)
            for padded, one_by_one in ((queries, query), (stored[0], key), (stored[1], value)):
                padded[rows, :, positions] = one_by_one[0].transpose(0, 1)
            # Padding is on the right, so causality alone keeps it out of every real position.
            attended = F.scaled_dot_product_attention(
                queries, stored[0], stored[1], is_causal=True, enable_gqa=self._heads != self._groups
            )
            hidden = self._finish_layer(layer, hidden, attended[rows, :, positions].transpose(0, 1)[None])
        last = sent(lengths.cumsum(dim=0) - 1, device)
        return cache, self._logits(hidden[0, last])

    def step(self, cache: KVCache, tokens: Tensor, positions: Tensor, longest: int) -> Tensor:
        """Feed one token to each of the first rows of the cache.

        Args:
            cache: holds the positions before; gets this one.
            tokens: [batch] ids, for rows 0..batch-1.
            positions: [batch] the position of each token.
            longest: largest of `positions`, plus one.

        Returns:
            Logits [batch, vocab].
        """
        batch = tokens.shape[0]
        cache.reserve(longest)
        rows = torch.arange(batch, device=tokens.device)
        hidden = F.embedding(tokens, self.weights.embedding)[:, None]
        cos, sin = self._cos[positions][:, None, None], self._sin[positions][:, None, None]
        visible = torch.arange(longest, device=tokens.device)[None] <= positions[:, None]
        mask = torch.zeros_like(visible, dtype=hidden.dtype).masked_fill_(~visible, float("-inf"))
        mask = mask[:, None, None]
        for layer, stored in zip(self.weights.layers, cache.layers, strict=True):
            query, key, value = self._project(layer, hidden)
            if layer.is_rotated:
                query, key = self._rotate(query, cos, sin), self._rotate(key, cos, sin)
            stored[0][rows, :, positions], stored[1][rows, :, positions] = key[:, :, 0], value[:, :, 0]
            # The queries that share a key-value head become the query positions of that head.
            grouped = query.reshape(batch, self._groups, self._heads // self._groups, self._head_dim)
            attended = F.scaled_dot_product_attention(
                grouped, stored[0, :batch, :, :longest], stored[1, :batch, :, :longest], attn_mask=mask
            )
            hidden = self._finish_layer(layer, hidden, attended.reshape(batch, self._heads, 1, -1))
        return self._logits(hidden[:, 0])

    def _project(self, layer: _LayerWeights, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[batch, sequence, hidden] -> query, key, value [batch, heads or groups, sequence, head_dim]."""
        batch, sequence, _ = hidden.shape
        joint = layer.qkv(self._norm(hidden, layer.attention_norm), layer.qkv_bias)
        joint = joint.view(batch, sequence, -1, self._head_dim).transpose(1, 2)
        query, key, value = joint.split((self._heads, self._groups, self._groups), dim=1)
        if layer.query_norm is not None and layer.key_norm is not None:
            query, key = self._norm(query, layer.query_norm), self._norm(key, layer.key_norm)
        return query, key, value

    def _finish_layer(self, layer: _LayerWeights, hidden: Tensor, attended: Tensor) -> Tensor:
        batch, sequence, _ = hidden.shape
        attended = attended.transpose(1, 2).reshape(batch, sequence, -1)
        hidden = hidden + layer.attention_out(attended)
        gate, up = layer.gate_up(self._norm(hidden, layer.mlp_norm)).chunk(2, dim=-1)
        return hidden + layer.down(F.silu(gate) * up)

    def _rotate(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate the first `rotary_dim` entries of each head, pairing entry i with i + rotary_dim / 2."""
        half = self._rotary_dim // 2
        rotary = heads[..., : self._rotary_dim]
        turned = torch.cat((-rotary[..., half:], rotary[..., :half]), dim=-1)
        return torch.cat((rotary * cos + turned * sin, heads[..., self._rotary_dim :]), dim=-1)

    def _norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(hidden, weight.shape, weight, self.arch.rms_norm_eps)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.weights.head(self._norm(hidden, self.weights.final_norm))
