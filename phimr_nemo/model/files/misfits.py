"""Tensors of other names than the architecture's: what was saved in place of the model, and the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from phimr_nemo.model.architecture import CONFIG_FILE
from phimr_nemo.model.table import EMBEDDING, HEAD

ADAPTED: Final = "base_model."
"""How PEFT's names begin."""
VALUE_HEADS: Final = ("v_head.", "value_head.", "score.")
QUANTISED: Final = (
    *("_scale", "_scale_inv", "_packed", ".qweight", ".qzeros", ".scales", ".absmax", "_nf4", "_fp4", ".SCB"),
)
"""How the names of tensors end that quantised weights are kept in."""
TO_BFLOAT16: Final = "convert the weights to bfloat16 first"


def misfit_remedy(missing: Sequence[str], extra: Sequence[str]) -> str:
    """What to do with tensors of other names than the architecture's."""
    if any(name.endswith(QUANTISED) for name in extra):
        return f"{TO_BFLOAT16}: in transformers model.dequantize(), or take the repository that is not quantised"
    if missing == [HEAD] and not extra:
        return f'if its embedding is its output layer, write "tie_word_embeddings": true into {CONFIG_FILE}'
    outer = next((name for name in extra if name.endswith(EMBEDDING.removeprefix("model."))), None)
    if outer is not None and EMBEDDING in missing and not outer.startswith(ADAPTED):
        return (
            f"save the causal language model itself ({outer} would be {EMBEDDING}): without the module around it, as "
            "accelerator.unwrap_model(model).save_pretrained(...) does, and opened by AutoModelForCausalLM"
        )
    if extra and not missing and all(name.startswith(VALUE_HEADS) for name in extra):
        return "save the policy without its value head: in TRL model.pretrained_model.save_pretrained(...)"
    if any(name.startswith(ADAPTED) for name in extra):
        return "merge the adapter into its base and save that: in PEFT model.merge_and_unload().save_pretrained(...)"
    if any(name.endswith((".q_proj.weight", ".qkv_proj.weight")) for name in extra):
        return (
            f"write the model_type into {CONFIG_FILE} that these names belong to: phi3 stacks q, k and v, others not"
        )
    return "use the config.json that belongs to these weights, and all of their shards"
