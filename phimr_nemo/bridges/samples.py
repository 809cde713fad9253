"""A stage's training data as its trainer takes it: every sample of every epoch, tokenised, in the order of use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from phimr_nemo.align.dpo.pairs import held_out_pairs, load_pairs
from phimr_nemo.align.dpo.stage import TrainingOrder
from phimr_nemo.align.grpo.rollouts import load_prompts
from phimr_nemo.config import DPOConfig, GRPOConfig, SFTConfig
from phimr_nemo.config.engine import QUESTION
from phimr_nemo.data.chat import decode_response, load_tokenizer
from phimr_nemo.data.rows.batches import IGNORED_LABEL, EpochOrder, Row
from phimr_nemo.data.rows.tokenize import prompt_frame
from phimr_nemo.errors import UserError
from phimr_nemo.store.shards import read_table
from phimr_nemo.supervised.data import RowDataset, SupervisedDataModule
from phimr_nemo.supervised.rowsource import Conversations

Sample = dict[str, Any]


@dataclass(frozen=True)
class Samples:
    """What a run trains on.

    Attributes:
        train: in the order of use, of all epochs.
        count: how many those are.
        validation: kept out of training.
        steps: optimizer steps (rounds of GRPO).
    """

    train: Iterator[Sample]
    count: int
    validation: Iterator[Sample]
    steps: int


def sft_samples(config: SFTConfig) -> Samples:
    """Conversations: `id`, `question`, `response`; `input_ids` and `labels`, the label of a token being itself.

    Raises:
        UserError: data or tokenizer are not usable, as in the stage itself.
    """
    tokenizer: Any = load_tokenizer(config.base)
    source = Conversations(config.data, tokenizer, config.loss_on)
    module = SupervisedDataModule(source, config, _unused)
    count = module.steps * config.global_batch

    def sample(dataset: RowDataset, number: int) -> Sample:
        texts = source.table[dataset.row_number(number)]
        if texts["history"].as_py():
            raise UserError(
                f"conversation {texts['id'].as_py()} in {config.data} has several turns",
                rule="conversations of one question are exported",
                remedy="curate a set without them for the export",
            )
        return {name: texts[name].as_py() for name in ("id", "question", "response")} | labelled(dataset[number])

    return Samples(
        (sample(module.train, number) for number in range(count)),
        count,
        (sample(module.validation, number) for number in range(config.validation_rows)),
        module.steps,
    )


def dpo_samples(config: DPOConfig) -> Samples:
    """Pairs: `prompt_ids`, `chosen_ids`, `rejected_ids` and their texts, special tokens included; and as they were
    before a chat template, `question`, `chosen_text`, `rejected_text`.

    Raises:
        UserError: data or tokenizer are not usable, as in the stage itself.
    """
    tokenizer = load_tokenizer(config.base)
    pairs = load_pairs(config.pairs, tokenizer, config.sequence_length, config.overlong)
    training, validation = held_out_pairs(pairs, config.validation_pairs, config.run.seed)
    order = TrainingOrder(training, config.epochs, config.run.seed)
    steps = len(order) // config.global_batch
    if steps == 0:
        raise UserError(
            f"{config.pairs} gives {len(order)} pairs in {config.epochs} epochs",
            rule=f"at least one global batch of {config.global_batch} pairs",
            remedy="bring more pairs, or lower global_batch",
        )
    steps = min(steps, config.max_steps) if config.max_steps else steps
    frame = prompt_frame(tokenizer)

    def sample(number: int) -> Sample:
        chosen, rejected = pairs.chosen[number], pairs.rejected[number]
        prompt = int(chosen.loss_mask.argmax())
        ids = {
            "prompt": chosen.input_ids[:prompt].tolist(),
            "chosen": chosen.input_ids[prompt:].tolist(),
            "rejected": rejected.input_ids[prompt:].tolist(),
        }
        texts = {name: tokenizer.decode(part) for name, part in ids.items()}
        return {
            **texts,
            **{f"{name}_ids": part for name, part in ids.items()},
            "question": texts["prompt"].removeprefix(frame.before).removesuffix(frame.after),
            "chosen_text": decode_response(tokenizer, ids["chosen"]),
            "rejected_text": decode_response(tokenizer, ids["rejected"]),
        }

    count = steps * config.global_batch
    return Samples((sample(order[place]) for place in range(count)), count, map(sample, validation), steps)


def grpo_samples(config: GRPOConfig) -> Samples:
    """Prompts, one a slot: `id`, `question` (the user's turn), `answer`, `prompt` (rendered) and `prompt_ids`.

    Raises:
        UserError: data or tokenizer are not usable, as in the stage itself.
    """
    tokenizer = load_tokenizer(config.base)
    prompts = load_prompts(config.prompts, tokenizer, config)
    questions = {row["id"]: row["question"] for row in read_table(config.prompts, "prompts").to_pylist()}
    count = config.steps * config.prompts_per_step
    order = EpochOrder(len(prompts.epoch), -(-count // len(prompts.epoch)), config.run.seed)

    def sample(slot: int) -> Sample:
        prompt = prompts.prompts[prompts.epoch[order[slot]]]
        return {
            "id": prompt.id,
            "question": config.prompt.replace(QUESTION, questions[prompt.id]),
            "answer": prompt.answer,
            "prompt": tokenizer.decode(prompt.token_ids),
            "prompt_ids": list(prompt.token_ids),
        }

    return Samples((sample(slot) for slot in range(count)), count, iter(()), config.steps)


def labelled(row: Row) -> Sample:
    """One document with the labels of trainers that shift them by themselves."""
    ids = row.input_ids.tolist()
    labels = [token if wanted else IGNORED_LABEL for token, wanted in zip(ids, row.loss_mask, strict=True)]
    return {"input_ids": ids, "labels": labels}


def _unused(_: Any) -> None:
    """Nothing is collated here."""
