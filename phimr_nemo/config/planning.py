"""Settings of the planner: what a stage's run consists of besides the stage's own configuration."""

from __future__ import annotations

from typing import Literal

from phimr_nemo.config.rules import config
from phimr_nemo.config.values import AboveZero, AtLeastZero, Decay, Name, Positive, PositiveShare, Share


@config
class TrainingPlanConfig:
    """A training stage on a number of GPUs.

    Attributes:
        stage: whose `conf/<stage>/paper.yaml` is planned.
        model: a preset of conf/model, or a Hugging Face directory.
        gpu: a row of the hardware table.
        gpus: how many.
        samples: documents, conversations or pairs of the data set; None where the stage counts its steps (GRPO,
            distillation).
        mean_tokens: of a document, conversation, one side of a pair, or a response with its prompt.
        trained_share: of the responses of a GRPO step, those that are left for training; 1 elsewhere.
        head_room: share of a GPU's memory that stays free.
        server_gpus: of rollout servers that are not colocated; None = as many as train.
        sync_bytes_a_second: of the weights that go to a host of rollout servers once a round; None where none sample.
    """

    stage: Literal["midtrain", "sft", "dpo", "grpo", "distill"]
    model: Name
    gpu: Name
    gpus: Positive
    samples: Positive | None = None
    mean_tokens: Positive
    trained_share: PositiveShare = 1.0
    head_room: Decay
    server_gpus: Positive | None = None
    sync_bytes_a_second: AboveZero | None = None


@config
class GenerationPlanConfig:
    """Rollouts of a teacher and their verification.

    Attributes:
        problems, rollouts: questions, and samples per question.
        mean_tokens: of a rollout.
        gpu: of the teacher, a row of the hardware table.
        gpus: that generate at the same time.
        tokens_a_gpu_second: what one of them generates.
        answers_a_core_second: what a CPU core verifies.
        cores: that verify at the same time.
        bytes_a_token: of a rollout as text.
        compression: bytes of the text over bytes in a record directory.
        judged_share: of the rollouts, those that the grader calls wrong and the judge looks at; 0 = no judge.
        judge_prompt_tokens, judge_reply_tokens: of one question to the judge.
        judge_input_per_million, judge_output_per_million: US dollars for its tokens.
    """

    stage: Literal["generate"]
    problems: Positive
    rollouts: Positive
    mean_tokens: Positive
    gpu: Name
    gpus: Positive
    tokens_a_gpu_second: AboveZero
    answers_a_core_second: AboveZero
    cores: Positive
    bytes_a_token: AboveZero
    compression: AboveZero
    judged_share: Share
    judge_prompt_tokens: Positive
    judge_reply_tokens: Positive
    judge_input_per_million: AtLeastZero
    judge_output_per_million: AtLeastZero
