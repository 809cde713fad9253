"""SmolLM3 by the transformers of this environment: `python smollm3_worker.py MODEL INPUTS OUT PRESET`.

INPUTS and OUT are safetensors; PRESET is a config.json whose parameters are counted.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM


def main(model: str, inputs: str, out: str, preset: str) -> None:
    """Logits of the ids, gradients of the labels' mean loss by their tensors' names, and the preset's parameters."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    assert type(network).__name__ == "SmolLM3ForCausalLM"
    given = load_file(Path(inputs))
    logits = network(given["ids"]).logits
    functional.cross_entropy(logits.flatten(0, 1), given["labels"].flatten(), ignore_index=-100).backward()
    gradients = {name: tensor.grad for name, tensor in network.named_parameters() if tensor.grad is not None}
    with torch.device("meta"):
        large = AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(Path(preset).read_text("utf-8"))))
    parameters = torch.tensor(sum(tensor.numel() for tensor in large.parameters()))
    save_file({"logits": logits.detach(), "parameters": parameters, **gradients}, Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
