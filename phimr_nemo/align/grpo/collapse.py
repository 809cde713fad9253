"""Whether a GRPO run is collapsing, from what it logs: loops, cut-off responses, entropy, accuracy.

Every rule looks at means over the last `window` steps, so that one unlucky round is no alarm, and at the run's own
past where a healthy value depends on model, prompts and length limit. Such a rule compares with the best that the run
has had, not with its start: a run may collapse after it has improved.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Final

from phimr_nemo.config.evaluation import MonitorConfig

WATCHED: Final = ("pass_rate", "repetitive", "truncated", "entropy")
RISING: Final = ("repetitive", "truncated")
REMEDIES: Final[Mapping[str, str]] = {
    "repetition": "the model loops: go back to a checkpoint from before, lower optim.lr or set kl above 0",
    "overlong": "responses run into max_new_tokens: look at some; if they are good raise the limit, if they loop go "
    "back to a checkpoint from before and lower optim.lr",
    "entropy gone": "the model always says the same and no longer learns from it: raise the temperature or "
    "loss.clip_high",
    "entropy explosion": "the samples are close to noise: lower the temperature or optim.lr, go back to a checkpoint "
    "from before",
    "grader": "grade a prompt's answer with `phimr verify` to see why; these responses take part in nothing",
    "accuracy": "go back to a checkpoint from before and lower optim.lr, or set kl above 0",
}
"""Kind of collapse -> what to do."""


class CollapseWatch:
    """Reads the rows of a run in order.

    Args:
        config: window and thresholds.
        past: rows of an interrupted run that continues; what they show is not reported again.

    Attributes:
        found: kind of collapse -> the first step at which it was seen.
    """

    def __init__(self, config: MonitorConfig, past: Iterable[Mapping[str, float]] = ()) -> None:
        self._config = config
        self._rows: deque[Mapping[str, float]] = deque(maxlen=config.window)
        self._best_pass_rate = 0.0
        self._lowest = dict.fromkeys(RISING, 1.0)
        self._highest_entropy = 0.0
        self.found: dict[str, int] = {}
        for row in past:
            self.observe(int(row["step"]), row)

    def observe(self, step: int, row: Mapping[str, float]) -> list[str]:
        """Take in one step.

        Args:
            step: its number.
            row: its metrics; one that lacks what the rules need, as an older run's may, is passed over.

        Returns:
            A message for each kind of collapse that shows for the first time.
        """
        if not all(name in row for name in WATCHED):
            return []
        self._rows.append(row)
        means = {name: fmean(row[name] for row in self._rows) for name in WATCHED}
        means["ungraded"] = fmean(row.get("ungraded", 0.0) for row in self._rows)
        self._best_pass_rate = max(self._best_pass_rate, means["pass_rate"])
        self._lowest = {name: min(lowest, means[name]) for name, lowest in self._lowest.items()}
        self._highest_entropy = max(self._highest_entropy, means["entropy"])
        # The first steps alone count as the past: a run may collapse before its first window is full.
        if len(self._rows) < self._config.window:
            return []
        messages = []
        for kind, reason in self._reasons(means).items():
            if kind not in self.found:
                self.found[kind] = step
                messages.append(f"collapse ({kind}) at step {step}: {reason}; {REMEDIES[kind]}")
        return messages

    def _reasons(self, means: Mapping[str, float]) -> dict[str, str]:
        """Kind of collapse -> what was seen and the threshold, for the kinds that the window's means show."""
        config, window = self._config, f"over the last {self._config.window} steps"
        reasons = {}
        if means["repetitive"] > self._lowest["repetitive"] + config.repetitive_rise:
            reasons["repetition"] = (
                f"{means['repetitive']:.0%} of the responses {window} mostly repeat themselves, after "
                f"{self._lowest['repetitive']:.0%} (warning from {config.repetitive_rise:.0%} more)"
            )
        if means["truncated"] > self._lowest["truncated"] + config.overlong_rise:
            reasons["overlong"] = (
                f"{means['truncated']:.0%} of the responses {window} hit the length limit, after "
                f"{self._lowest['truncated']:.0%} (warning from {config.overlong_rise:.0%} more)"
            )
        if (
            means["entropy"] < config.entropy_share * self._highest_entropy
            and means["pass_rate"] < config.solved_pass_rate
        ):
            reasons["entropy gone"] = (
                f"{means['entropy']:.2g} nats a token {window}, after {self._highest_entropy:.2g} (warning below "
                f"{config.entropy_share:.0%} of it), with a pass rate of {means['pass_rate']:.0%}"
            )
        if means["entropy"] > config.max_entropy:
            reasons["entropy explosion"] = (
                f"{means['entropy']:.2g} nats a token {window} (warning above {config.max_entropy:g})"
            )
        if means["ungraded"] > config.ungraded_warning:
            reasons["grader"] = (
                f"the grader gave up on {means['ungraded']:.1%} of the responses {window} "
                f"(warning above {config.ungraded_warning:.1%})"
            )
        if means["pass_rate"] < self._best_pass_rate - config.pass_rate_drop:
            reasons["accuracy"] = (
                f"{means['pass_rate']:.0%} of the responses {window} are right, after {self._best_pass_rate:.0%} "
                f"(warning from {config.pass_rate_drop:.0%} fewer)"
            )
        return reasons
