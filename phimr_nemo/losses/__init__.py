"""Losses as pure functions of tensors.

All of them return sums and the counts to divide by; dividing by the global count is the caller's part.
"""

from phimr_nemo.losses.advantages import centered_advantages, group_advantages
from phimr_nemo.losses.dpo import (
    dpo_loss,
    ipo_loss,
    label_smoothed_dpo_loss,
    length_normalized_dpo_loss,
    length_normalized_ipo_loss,
    rpo_loss,
)
from phimr_nemo.losses.grpo import (
    PolicyBatch,
    PolicyLoss,
    dapo_loss,
    dr_grpo_loss,
    grpo_loss,
    gspo_loss,
    k3_kl,
    truncated_importance_weights,
)
from phimr_nemo.losses.logprobs import IGNORED_LABEL, token_logprobs, token_logprobs_and_entropy
from phimr_nemo.losses.sequences import sequence_logprobs
from phimr_nemo.losses.sft import sft_loss
