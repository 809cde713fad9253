"""What a rank of this project's own trainer does in the bridge's tests; runs in the trainers' environment."""

from __future__ import annotations

from pathlib import Path

import model_worker
import optimizer_worker
import torch
from safetensors.torch import save_file

from phimr_nemo.config import ParallelConfig
from phimr_nemo.losses.advantages import group_advantages
from phimr_nemo.losses.grpo import PolicyBatch, dapo_loss
from phimr_nemo.model.files.hf import write_hf_directory
from phimr_nemo.model.megatron.convert import export_tensors


def step(source: str, target: str, batch: str) -> float | None:
    """One optimizer step on a batch, which is saved for the other side; the loss before it."""
    ids, labels = model_worker.batch()
    save_file({"ids": ids, "labels": labels}, batch)
    training = optimizer_worker.Training(source, ParallelConfig(), sharded=False, dtype=torch.float32)
    loss = training.step()
    arch = training.model.architecture
    write_hf_directory(Path(target), arch, export_tensors([training.model], arch), tokenizer_from=Path(source))
    return loss


def policy_gradient(
    source: str, prompts: list[list[int]], responses: list[list[int]], rewards: list[float], group: int, heat: float
) -> tuple[float, float, list[float]]:
    """Loss of the first update of a round and its gradient's norm, and the advantages of the responses.

    Args:
        source: the model's directory.
        prompts, responses: token ids of each sample.
        rewards: of each response.
        group: responses of one prompt, next to each other.
        heat: the sampling temperature.
    """
    model = model_worker.build(source, ParallelConfig())
    advantages = group_advantages(torch.tensor(rewards), torch.arange(len(rewards)) // group)
    width = max(map(len, responses))
    logprobs, mask = torch.zeros(len(rewards), width), torch.zeros(len(rewards), width)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        ids = torch.tensor([prompt + response])
        each = -model(ids[:, :-1], labels=ids[:, 1:], temperature=heat)[0, len(prompt) - 1 :]
        logprobs[row, : len(response)] = each
        mask[row, : len(response)] = 1
    batch = PolicyBatch(logprobs, logprobs.detach(), advantages, mask)
    result = dapo_loss(batch, clip_low=0.2, clip_high=0.28)
    loss = result.loss_sum / result.denominator
    loss.backward()
    squares = [parameter.grad.square().sum() for parameter in model.parameters() if parameter.grad is not None]
    return loss.item(), float(torch.stack(squares).sum().sqrt()), advantages.tolist()
