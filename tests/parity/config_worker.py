"""Reads config.json files with this environment's transformers: `python config_worker.py CONFIGS` (name -> config).

Prints one line `ANSWER {json}`: the version, and for each config its fields as transformers has them, with the rotary
frequencies that its model computes with; or the error that transformers raises.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "tie_word_embeddings",
    "max_position_embeddings",
    "sliding_window",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "initializer_range",
)


def read(config: dict[str, Any]) -> dict[str, Any]:
    """A config's fields and rotary frequencies (radians per token) by transformers."""
    from transformers import Phi3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    found = Phi3Config.from_dict(config)
    rotary = Phi3RotaryEmbedding(config=found)
    fields = {name: getattr(found, name) for name in FIELDS}
    fields["short"] = rotary.inv_freq.tolist()
    fields["attention_factor"] = float(rotary.attention_scaling)
    if rotary.rope_type == "longrope":
        scaling = found.rope_scaling
        # transformers 4 looks beside rope_scaling, transformers 5 has moved it into that.
        original = scaling.get("original_max_position_embeddings", found.original_max_position_embeddings)
        fields["original_max_position_embeddings"] = original
        fields["long"] = ROPE_INIT_FUNCTIONS["longrope"](found, "cpu", seq_len=original + 1)[0].tolist()
    return fields


def main() -> None:
    """Read every config of the file."""
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()
    configs = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    answer: dict[str, Any] = {}
    for name, config in configs.items():
        try:
            answer[name] = read(config)
        # Whatever it is, it is what a user of transformers would see.
        except Exception as error:  # noqa: BLE001
            answer[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
    print("ANSWER " + json.dumps({"version": transformers.__version__, "configs": answer}))


if __name__ == "__main__":
    main()
