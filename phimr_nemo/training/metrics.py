"""Every metric that a training stage logs: its name, unit and meaning. The docs' tables and the plots are made of it.

A metric of a step tells of the weights that the step began with, except those measured `after` it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

Stage = Literal["midtrain", "sft", "dpo", "grpo", "distill"]
Direction = Literal["lower", "higher"]

SUPERVISED: Final[tuple[Stage, ...]] = ("midtrain", "sft")
DPO: Final[tuple[Stage, ...]] = ("dpo",)
GRPO: Final[tuple[Stage, ...]] = ("grpo",)
DISTILL: Final[tuple[Stage, ...]] = ("distill",)
ROUNDS: Final[tuple[Stage, ...]] = (*GRPO, *DISTILL)
ALL: Final[tuple[Stage, ...]] = (*SUPERVISED, *DPO, *ROUNDS)

PASS_RATE_BINS: Final = ("none", "below_25", "below_50", "below_75", "below_100", "all")
"""Of groups, by their share of correct responses: none, up to a quarter, up to a half, up to three quarters, fewer
than all, all."""
PASS_RATE_NAMES: Final = tuple(f"groups_{name}" for name in PASS_RATE_BINS)
PASS_RATE_MIDDLES: Final = (0.0, 0.125, 0.375, 0.625, 0.875, 1.0)
"""What stands for a bin's groups in a histogram."""


@dataclass(frozen=True)
class Metric:
    """One number of a step.

    Attributes:
        name: in metrics.jsonl, TensorBoard and W&B.
        unit: of the value; "1" for shares, ratios and counts.
        meaning: what it is.
        stages: that log it.
        title: in plots; the name when empty.
        better: which direction is better, where one is.
        after: whether it is measured with the weights that the step left.
    """

    name: str
    unit: str
    meaning: str
    stages: tuple[Stage, ...]
    title: str = ""
    better: Direction | None = None
    after: bool = False


METRICS: Final[tuple[Metric, ...]] = (
    # ---- of every stage ----
    Metric(
        "loss", "nats", "mean over the predicted tokens of the global batch", SUPERVISED, "training loss", "lower"
    ),
    Metric("loss", "nats", "the preference loss, mean over the pairs", DPO, "training loss", "lower"),
    Metric("loss", "nats", "the policy-gradient loss over its denominator, mean over the step's updates", GRPO),
    Metric("loss", "nats", "the loss of the divergence, mean over tokens and the step's updates", DISTILL),
    Metric(
        "reverse_kl",
        "nats",
        "KL(student || teacher), mean over the trained tokens; with loss.kind=sampled_reverse_kl its estimate",
        DISTILL,
        "reverse KL",
        "lower",
    ),
    Metric(
        "lr", "1", "the learning rate that the step was made with; GRPO: mean over its updates", ALL, "learning rate"
    ),
    Metric(
        "grad_norm", "1", "global gradient norm before clipping; GRPO: mean over the updates", ALL, "gradient norm"
    ),
    Metric("step_time", "s", "wall time of the step, without validation, evaluation and saving", ALL),
    Metric(
        "tokens_per_second_per_gpu",
        "tokens/s",
        "tokens of documents trained on, no padding; GRPO: in the seconds of the updates",
        ALL,
        "tokens/s/GPU",
        "higher",
    ),
    Metric("valid_tokens_per_second_per_gpu", "tokens/s", "of these, the ones that are predicted", ALL, "", "higher"),
    Metric("slots_per_second_per_gpu", "tokens/s", "the same with padding", ALL),
    Metric(
        "model_tflops_per_gpu",
        "TFLOP/s",
        "model FLOPs: 6 x weights x tokens + causal attention; recomputation is not counted",
        ALL,
        "",
        "higher",
    ),
    Metric("mfu", "1", "share of the GPU's peak, where that is known", ALL, "model FLOPs utilization", "higher"),
    Metric(
        "memory_gib",
        "GiB",
        "the most so far, on the process that took most: allocated on a GPU, resident on a CPU",
        ALL,
        "memory (GiB)",
    ),
    # ---- stages 1 and 2 ----
    Metric("rows", "rows", "rows trained on so far", SUPERVISED),
    Metric("epoch", "epochs", "passes over the data so far", SUPERVISED),
    Metric("eta_seconds", "s", "time to the end, validation, evaluation and saving included", SUPERVISED),
    Metric(
        "val_loss",
        "nats",
        "mean over the validation rows' predicted tokens",
        SUPERVISED,
        "validation loss",
        "lower",
        True,
    ),
    Metric("pass1", "1", "pass@1 on `evaluation.problems`", ALL, "pass@1", "higher", True),
    Metric("pass1_stderr", "1", "its standard error, clustered by question", ALL, after=True),
    Metric("pass1_stopped", "1", "share of its responses that end before the limit", ALL, "", "higher", True),
    # ---- stage 3 ----
    Metric(
        "accuracy",
        "1",
        "share of pairs whose chosen response has the larger reward",
        DPO,
        "reward accuracy",
        "higher",
    ),
    Metric("margin", "nats", "chosen minus rejected reward", DPO, "", "higher"),
    Metric("chosen_reward", "nats", "beta x log-ratio of policy to reference, chosen responses", DPO, "chosen"),
    Metric("rejected_reward", "nats", "the same, rejected responses", DPO, "rejected"),
    Metric("chosen_logprob", "nats", "log-probability of a chosen response", DPO, "chosen"),
    Metric("rejected_logprob", "nats", "of a rejected one", DPO, "rejected"),
    Metric("kl_to_reference", "nats", "-(log-ratio chosen + log-ratio rejected) / 2, per response", DPO),
    Metric("chosen_shift", "nats", "log-ratio of the chosen responses per token; below 0 they lose probability", DPO),
    Metric("length_difference", "tokens", "chosen minus rejected", DPO),
    Metric("length_margin_correlation", "1", "Pearson's r of margin and length difference over the batch", DPO),
    Metric("val_loss", "nats", "the preference loss on the validation pairs", DPO, "validation loss", "lower", True),
    Metric(
        "val_accuracy", "1", "reward accuracy on the validation pairs", DPO, "validation accuracy", "higher", True
    ),
    Metric("val_margin", "nats", "margin on the validation pairs", DPO, "", "higher", True),
    Metric("nll", "nats", "negative log-likelihood of the chosen responses per token (loss.kind=rpo)", DPO),
    # ---- stage 4 ----
    Metric("reward", "1", "mean over all sampled and graded responses, before any stabilization", GRPO, "", "higher"),
    Metric("reward_correctness", "1", "of this, by the verdict (where the reward has further parts)", GRPO),
    Metric("reward_format", "1", "reward.format x finished, closed thinking and one boxed answer", GRPO),
    Metric("reward_length", "1", "reward.length x share of max_new_tokens left", GRPO),
    Metric("reward_overlong", "1", "the soft overlong punishment (overlong.kind=soft)", GRPO),
    Metric("ungraded", "1", "share of responses that the grader gave up on; they are in no other mean", ROUNDS),
    Metric("pass_rate", "1", "share of correct responses among them", ROUNDS, "", "higher"),
    *(
        Metric(name, "groups", f"groups with {label} correct", ROUNDS, label)
        for name, label in zip(
            PASS_RATE_NAMES, ("none", "up to 1/4", "up to 1/2", "up to 3/4", "fewer than all", "all"), strict=True
        )
    ),
    Metric("zero_gradient_groups", "1", "share of groups whose rewards are all equal", GRPO, "groups without"),
    Metric("kept", "1", "share of the responses that are trained on after rebalancing", GRPO, "rollouts kept"),
    Metric(
        "with_gradient", "1", "share of the responses that move the weights: advantage, KL or entropy not 0", GRPO
    ),
    Metric("trained_prompts", "prompts", "prompts trained on", GRPO),
    Metric("dropped_easy", "prompts", "left out as too easy", GRPO),
    Metric("dropped_impossible", "prompts", "left out without a correct response, or cut off throughout", GRPO),
    Metric("dropped_surplus", "prompts", "left out because the step has enough", GRPO),
    Metric("solved_prompts", "prompts", "not sampled again so far (curriculum.solved_from)", GRPO),
    Metric("refills", "1", "further rounds sampled in the place of dropped prompts", GRPO),
    Metric("consumed_samples", "prompts", "prompts sampled so far", ROUNDS),
    Metric("response_length", "tokens", "mean", ROUNDS),
    Metric("length_spread", "1", "standard deviation over mean within a group, averaged over groups", ROUNDS),
    Metric("truncated", "1", "share of responses that hit max_new_tokens", ROUNDS, "hit the limit", "lower"),
    Metric(
        "repetition", "1", "share of a response's end that repeats what stands earlier, mean", ROUNDS, "", "lower"
    ),
    Metric("repetitive", "1", "share of responses where that is above 0.3", ROUNDS, "repeat themselves", "lower"),
    Metric("entropy", "nats", "mean of -log-probability of the sampled tokens at the sampling temperature", ROUNDS),
    Metric("temperature", "1", "of sampling, and of the log-probabilities in the loss", ROUNDS),
    Metric("ratio", "1", "mean ratio of policy to old policy over the trained tokens", ROUNDS),
    Metric("clipped_low", "1", "share of trained tokens clipped at the low side", ROUNDS, "low side"),
    Metric("clipped_high", "1", "at the high side", ROUNDS, "high side"),
    Metric("clipped", "1", "at either side", ROUNDS),
    Metric("kl_to_old", "nats", "k3 estimate against the policy before the step's updates, per token", ROUNDS),
    Metric("kl", "nats", "estimate against the reference, per token (kl above 0)", GRPO),
    Metric(
        "logprob_gap", "nats", "absolute difference of sampler's and trainer's log-probability, per token", ROUNDS
    ),
    Metric("sampler_weight", "1", "mean importance weight (with a correction)", ROUNDS),
    Metric("sampler_masked", "1", "share of trained tokens that it leaves out (correction.kind=masked)", ROUNDS),
    Metric("policy_entropy", "nats", "entropy of the policy at the trained tokens (entropy_bonus above 0)", GRPO),
    Metric("trained_tokens", "tokens", "tokens with a gradient, mean over the updates", ROUNDS),
    Metric("staleness", "steps", "age of the weights that sampled, mean over the tokens", ROUNDS),
    Metric("staleness_max", "steps", "of the oldest token", ROUNDS),
    Metric("stale_tokens", "1", "share of tokens that older weights sampled than those that train", ROUNDS),
    Metric("partial_rollouts", "responses", "interrupted by new weights and continued with them", ROUNDS),
    Metric("lost_groups", "groups", "groups that no server could answer", ROUNDS),
    Metric("sampler_retries", "requests", "asked again, since the start", ROUNDS),
    Metric("sampler_stale", "responses", "of older weights than asked for, since the start", ROUNDS),
    Metric("sampler_removed", "servers", "removed, since the start", ROUNDS),
    Metric("sampler_returned", "servers", "returned, since the start", ROUNDS),
    Metric("sync_seconds", "s", "weights to the sampler", ROUNDS),
    Metric("sample_seconds", "s", "sampling", ROUNDS, "sample"),
    Metric("reward_seconds", "s", "grading", ROUNDS, "reward"),
    Metric("refill_seconds", "s", "refills, their sampling and grading included", GRPO),
    Metric("logprob_seconds", "s", "log-probabilities before the updates", ROUNDS, "log-probs"),
    Metric("train_seconds", "s", "updates", ROUNDS, "train"),
)


def metrics_of(stage: Stage) -> dict[str, Metric]:
    """Return the metrics of a stage by name, in the order of the table."""
    return {metric.name: metric for metric in METRICS if stage in metric.stages}


def markdown_table(metrics: Iterable[Metric]) -> str:
    """Return the rows of a table | metric | unit | meaning |, as they stand in the docs."""
    lines = [f"| `{metric.name}` | {metric.unit} | {metric.meaning} |" for metric in metrics]
    return "\n".join(["| metric | unit | meaning |", "|---|---|---|", *lines])
