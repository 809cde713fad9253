"""Which rollouts of a round are trained on, and how many prompts were left out, by reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from phimr_nemo.align.grpo.rollouts import Rollout, groups_of
from phimr_nemo.align.grpo.stabilisers import group_fate, rebalanced_group
from phimr_nemo.config import GRPOConfig
from phimr_nemo.store.content import content_seed


@dataclass(frozen=True)
class Selection:
    """What a step trains on.

    Attributes:
        kept: rollout numbers, by slot and sample.
        prompts: groups that they are of.
        easy, impossible: groups left out because too many responses were right, or none was.
        surplus: groups left out because the step was full.
    """

    kept: Sequence[int]
    prompts: int
    easy: int
    impossible: int
    surplus: int

    def metrics(self, rollouts: int) -> dict[str, float]:
        """What is logged of a step; `kept` is a share of the `rollouts`, the others are numbers of prompts."""
        return {
            "kept": len(self.kept) / rollouts,
            "trained_prompts": self.prompts,
            "dropped_easy": self.easy,
            "dropped_impossible": self.impossible,
            "dropped_surplus": self.surplus,
        }


def selected(rollouts: Sequence[Rollout], config: GRPOConfig, step: int) -> Selection:
    """Rebalance every group; the first `prompts_per_step` groups that keep any response are trained on.

    Args:
        rollouts: of whole groups, by slot and sample.
        config: of the stage.
        step: the round; with the run's seed and the slot it decides which negatives are kept.
    """
    kept: list[int] = []
    left_out = {"easy": 0, "impossible": 0}
    prompts = surplus = 0
    for whole in groups_of(rollouts):
        graded = [i for i in whole if rollouts[i].is_graded]
        group = [i for i in graded if not (config.overlong.kind == "mask" and rollouts[i].is_truncated)]
        correct = [rollouts[i].is_correct for i in group]
        fate = group_fate(correct, config.rebalance) if group else "impossible"
        if fate != "kept":
            left_out[fate] += 1
        elif prompts == config.prompts_per_step:
            surplus += 1
        else:
            prompts += 1
            seed = content_seed("rebalance", str(config.run.seed), str(step), str(rollouts[group[0]].slot))
            kept.extend(group[i] for i in rebalanced_group(correct, config.rebalance, seed))
    return Selection(kept, prompts, left_out["easy"], left_out["impossible"], surplus)
