"""What distillation optimises: the reverse KL from the teacher, of sampled tokens or whole vocabularies."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from phimr_nemo.align.distill.teacher import DirectoryTeacher, Teacher
from phimr_nemo.align.grpo.objective import RoundsObjective, SampledTokens
from phimr_nemo.align.microbatch import MicroBatch
from phimr_nemo.config import DistillConfig
from phimr_nemo.config.sampled.distill import SampledLoss
from phimr_nemo.losses import PolicyLoss, reverse_kl_loss, sampled_reverse_kl_loss


class DistillObjective(RoundsObjective):
    """The configured divergence.

    Args:
        config: of the stage.
        teacher: scores; for whole distributions one in this process.
        layout: as for :class:`RoundsObjective`.
    """

    def __init__(self, config: DistillConfig, teacher: Teacher, **layout: int) -> None:
        super().__init__(config, **layout)
        self.config, self.teacher = config.loss, teacher

    def micro_batches(self, batch: Mapping[str, Tensor]) -> list[MicroBatch]:
        """Those of all rounds; with the teacher's states where the loss is of them (collective)."""
        micros = self.plain_micro_batches(batch)
        if isinstance(self.config, SampledLoss):
            return micros
        assert isinstance(self.teacher, DirectoryTeacher)
        return self.teacher.taught(micros)

    def plain_micro_batches(self, batch: Mapping[str, Tensor]) -> list[MicroBatch]:
        """The same without the teacher's states."""
        return super().micro_batches(batch)

    def _loss_of(self, tokens: SampledTokens) -> PolicyLoss:
        if isinstance(self.config, SampledLoss):
            return sampled_reverse_kl_loss(
                tokens.logprobs,
                tokens.old_logprobs,
                tokens.extras["teacher_logprobs"],
                tokens.mask,
                clip_low=self.config.clip_low,
                clip_high=self.config.clip_high,
                importance_weights=tokens.weights,
            )
        assert tokens.besides is not None
        return reverse_kl_loss(tokens.besides, tokens.mask)
