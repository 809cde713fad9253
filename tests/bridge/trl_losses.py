"""TRL's own policy loss on given numbers: trl_losses.py CASES FILE (a JSON list; loss and gradient of each case)."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from trl import GRPOTrainer


def evaluated(case: dict[str, Any]) -> dict[str, Any]:
    """Loss and its gradient by the log-probabilities; what the method asks of a trainer is given by hand."""
    tensors = {name: torch.tensor(values, dtype=torch.float64) for name, values in case["tensors"].items()}
    logprobs = tensors["logprobs"].requires_grad_()
    rows, columns = logprobs.shape
    kept: dict[str, Any] = {"train": defaultdict(list)}
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros(rows, columns), None),
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(gather=lambda value: value, num_processes=1, reduce=lambda value, **_: value),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=case["weighted_kl"], steps_per_generation=1),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=case["beta"],
        loss_type=case["loss_type"],
        epsilon_low=case["epsilon_low"],
        epsilon_high=case["epsilon_high"],
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        use_adaptive_entropy=False,
        _metrics=kept,
    )
    inputs = {
        "prompt_ids": torch.zeros(rows, 1, dtype=torch.int64),
        "prompt_mask": torch.ones(rows, 1),
        "completion_ids": torch.zeros(rows, columns, dtype=torch.int64),
        "completion_mask": tensors["mask"],
        "advantages": tensors["advantages"],
        "old_per_token_logps": tensors["old"],
        "ref_per_token_logps": tensors["reference"],
        "importance_sampling_ratio": tensors["weights"],
        "num_items_in_batch": tensors["mask"].sum(),
    }
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return {"loss": loss.item(), "gradient": gradient.tolist()}


if __name__ == "__main__":
    cases = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    Path(sys.argv[2]).write_text(json.dumps([evaluated(case) for case in cases]), "utf-8")
