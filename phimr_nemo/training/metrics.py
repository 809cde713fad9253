"""The names of metrics that more than one module speaks of."""

from __future__ import annotations

from typing import Final

DPO_NAMES: Final = (
    "loss",
    "accuracy",
    "margin",
    "chosen_reward",
    "rejected_reward",
    "chosen_logprob",
    "rejected_logprob",
    "kl_to_reference",
    "chosen_shift",
    "length_difference",
    "length_margin_correlation",
    "nll",
    "lr",
    "step_time",
)
"""`nll` with the RPO loss only."""

PASS_RATE_BINS: Final = ("none", "below_25", "below_50", "below_75", "below_100", "all")
"""Of groups, by their share of right responses: none, up to a quarter, up to a half, up to three quarters, fewer than
all, all."""
PASS_RATE_NAMES: Final = tuple(f"groups_{name}" for name in PASS_RATE_BINS)
PASS_RATE_MIDDLES: Final = (0.0, 0.125, 0.375, 0.625, 0.875, 1.0)
"""What stands for a bin's groups in a histogram."""
