"""AdamW in the form of TE's and apex's FusedAdam, for machines that have neither.

Megatron's distributed optimizer saves and loads that form: the step count and the bias correction in the parameter
group, without which FusedAdam cannot go on from it, and nothing but the two moments per parameter. With torch's AdamW
its checkpoints cannot be loaded into a fresh optimizer. The arithmetic is torch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


class FusedFormAdam(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101), decoupled weight decay, bias-corrected."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        numbers = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**numbers, "bias_correction": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Update every parameter that has a gradient. `closure` is not supported: Megatron never passes one."""
        if closure is not None:
            raise ValueError("FusedFormAdam.step takes no closure")
        for group in self.param_groups:
            group["step"] = int(group.get("step", 0)) + 1
            params = [p for p in group["params"] if p.grad is not None and p.numel() > 0]
            if params:
                self._update(group, params)

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for param in params:
            if not self.state[param]:
                self.state[param]["exp_avg"] = torch.zeros_like(param)
                self.state[param]["exp_avg_sq"] = torch.zeros_like(param)
        beta1, beta2 = group["betas"]
        adamw(
            params,
            [param.grad for param in params if param.grad is not None],
            [self.state[param]["exp_avg"] for param in params],
            [self.state[param]["exp_avg_sq"] for param in params],
            [],
            # torch counts the step up itself, in one tensor per parameter.
            [torch.tensor(float(group["step"] - 1)) for _ in params],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def install() -> None:
    """Let Megatron-Core use this class where it would use FusedAdam."""
    import megatron.core.optimizer as optimizers
    from megatron.core.optimizer import distrib_optimizer

    optimizers.Adam = FusedFormAdam
    distrib_optimizer.Adam = FusedFormAdam
    # True to its name for the checkpoint form, which is all the flag decides.
    distrib_optimizer.HAVE_APEX_OR_TE = True
