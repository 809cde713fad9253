"""DPO's objective: pairs in padded and packed micro-batches, every configured loss, what is logged, the warning."""

from __future__ import annotations

import itertools
import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from phimr_nemo.align.dpo import objective as dpo_objective
from phimr_nemo.align.dpo.log import COLLAPSE_SHIFT, DPOLog
from phimr_nemo.align.dpo.objective import DPOObjective, pair_sums
from phimr_nemo.align.forward import packed_parameters
from phimr_nemo.align.microbatch import MicroBatch, balanced_shares, packed_row, sequence_sums
from phimr_nemo.config import DPOConfig, load_config
from phimr_nemo.errors import UserError
from phimr_nemo.jobs.preflight import file_inputs
from phimr_nemo.losses import IGNORED_LABEL, dpo_loss
from phimr_nemo.store.runs import METRICS_FILE
from phimr_nemo.training.plots import plot_dpo

PAD = 0
CHOSEN_LENGTHS, REJECTED_LENGTHS = [7, 3, 12, 5, 9], [4, 12, 6, 8, 3]
PAIRS = len(CHOSEN_LENGTHS)


def random_rows(lengths: list[int], seed: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels [n, longest]; the first third of each row is a prompt, its last token has no label."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.full((len(lengths), max(lengths)), PAD)
    labels = torch.full_like(tokens, IGNORED_LABEL)
    for row, length in enumerate(lengths):
        tokens[row, :length] = torch.randint(1, 50, (length,), generator=generator)
        labels[row, length // 3 : length - 1] = tokens[row, length // 3 + 1 : length]
    return tokens, labels


def model(tokens: Tensor, labels: Tensor) -> Tensor:
    """Stands for the model: log-probabilities that depend on token and label, 0 where there is no label."""
    return torch.where(labels == IGNORED_LABEL, 0.0, -0.01 * tokens - 0.002 * labels)


def batch() -> dict[str, Tensor]:
    chosen, chosen_labels = random_rows(CHOSEN_LENGTHS, 0)
    rejected, rejected_labels = random_rows(REJECTED_LENGTHS, 1)
    reference = torch.linspace(-2.0, -1.0, 2 * PAIRS)
    return {
        "chosen": chosen,
        "chosen_labels": chosen_labels,
        "rejected": rejected,
        "rejected_labels": rejected_labels,
        "ref_policy_log_probs_chosen": reference[:PAIRS],
        "ref_policy_log_probs_rejected": reference[PAIRS:],
    }


def dpo_config(repository: Path, *overrides: str) -> DPOConfig:
    return load_config(DPOConfig, repository / "conf" / "dpo" / "tiny.yaml", ["beta=0.3", *overrides])


def added_up(objective: DPOObjective) -> dict[str, float]:
    totals: dict[str, float] = {}
    for micro in objective.micro_batches(batch()):
        loss, count, sums = objective.loss(model(micro.tokens, micro.labels), micro)
        for name, value in {"loss": loss, "count": count, **sums}.items():
            totals[name] = totals.get(name, 0.0) + float(value)
    return totals


def whole_sums() -> list[list[float]]:
    """Each pair's log-probabilities and tokens, row by row: chosen, rejected, their references, their counts."""
    whole = batch()
    sides = [model(whole[side], whole[f"{side}_labels"]).sum(1).double().tolist() for side in ("chosen", "rejected")]
    references = [whole[f"ref_policy_log_probs_{side}"].double().tolist() for side in ("chosen", "rejected")]
    counts = [(whole[f"{side}_labels"] != IGNORED_LABEL).sum(1).tolist() for side in ("chosen", "rejected")]
    return [list(pair) for pair in zip(*sides, *references, *counts, strict=True)]


@pytest.mark.parametrize("packed", ["false", "true"])
@pytest.mark.parametrize("micro_batch", [1, 2, 3, 5])
@pytest.mark.parametrize("multiple", [1, 4])
def test_micro_batches_keep_pairs_together(repository: Path, micro_batch: int, multiple: int, packed: str) -> None:
    settings = (f"packed={packed}", f"micro_batch={micro_batch}", "global_batch=30", "sequence_length=12")
    objective = DPOObjective(dpo_config(repository, *settings), multiple=multiple, pad_id=PAD)
    totals = added_up(objective)
    whole = batch()
    loss, metrics = dpo_loss(
        model(whole["chosen"], whole["chosen_labels"]).sum(1),
        model(whole["rejected"], whole["rejected_labels"]).sum(1),
        whole["ref_policy_log_probs_chosen"],
        whole["ref_policy_log_probs_rejected"],
        0.3,
    )
    assert totals["count"] == PAIRS
    assert totals["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert totals["margin"] == pytest.approx(float(metrics["margin"]), rel=1e-4)
    assert objective.summary(totals)["loss"] == pytest.approx(float(loss) / PAIRS, rel=1e-5)


@pytest.mark.parametrize("multiple", [1, 4])
def test_a_packed_row_holds_whole_pairs_and_nothing_else(repository: Path, multiple: int) -> None:
    """Every pair once, both sides in one row, in rows of at most 2 x micro_batch x sequence_length tokens."""
    config = dpo_config(repository, "packed=true", "micro_batch=1", "sequence_length=12")
    micros = DPOObjective(config, multiple=multiple, pad_id=PAD).micro_batches(batch())
    whole = batch()
    seen = []
    for micro in micros:
        pairs = micro.extras["pairs"].tolist()
        seen += pairs
        length = micro.tokens.shape[1]
        assert sum(micro.documents) == length
        assert length % multiple == 0
        assert length <= 24
        documents = list(
            zip(micro.tokens[0].split(micro.documents), micro.labels[0].split(micro.documents), strict=True)
        )
        for side, name in enumerate(("chosen", "rejected")):
            for place, pair in enumerate(pairs):
                ids, labels = documents[side * len(pairs) + place]
                # Up to the last label; the last token predicts nothing.
                used = [CHOSEN_LENGTHS, REJECTED_LENGTHS][side][pair] - 1
                assert torch.equal(ids, whole[name][pair, :used])
                assert torch.equal(labels, whole[f"{name}_labels"][pair, :used])
        for ids, labels in documents[2 * len(pairs) :]:
            assert set(ids.tolist()) == {PAD}
            assert set(labels.tolist()) == {IGNORED_LABEL}
    assert sorted(seen) == list(range(PAIRS))
    assert len(micros) < PAIRS


def test_best_fit_needs_no_more_rows_than_it_must(repository: Path) -> None:
    """Used tokens of the pairs: 9, 13, 16, 11, 10 = 59 > 2 x 24, so three rows: 13 + 11, 10 + 9 and 16."""
    config = dpo_config(repository, "packed=true", "micro_batch=1", "sequence_length=12")
    micros = DPOObjective(config, multiple=1, pad_id=PAD).micro_batches(batch())
    assert sorted(micro.tokens.shape[1] for micro in micros) == [16, 19, 24]


def test_sums_of_a_packed_row_are_those_of_its_documents() -> None:
    micro = MicroBatch(torch.zeros(1, 6), torch.zeros(1, 6), documents=(1, 3, 2))
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]], requires_grad=True)
    sums = sequence_sums(values, micro)
    assert sums.tolist() == [1.0, 9.0, 11.0]
    (sums * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[1.0, 10.0, 10.0, 10.0, 100.0, 100.0]]


def test_boundaries_of_a_packed_row() -> None:
    parameters = packed_parameters((3, 1, 2))
    assert parameters.cu_seqlens_q.tolist() == [0, 3, 4, 6]
    assert parameters.max_seqlen_q == 3
    row, labels, documents = packed_row(
        torch.tensor([[1, 2, 9], [3, 9, 9]]), torch.tensor([[2, 5, 9], [6, 9, 9]]), [2, 1], multiple=4, pad_id=PAD
    )
    assert (row.tolist(), labels.tolist()) == ([[1, 2, 3, PAD]], [[2, 5, 6, IGNORED_LABEL]])
    assert documents == (2, 1, 1)


def test_shares_are_complete_and_nearly_equal_in_tokens() -> None:
    """Longest first leaves ranks apart by at most the shortest of the last rows placed; a strided deal does not."""
    lengths = np.random.default_rng(0).lognormal(8, 0.8, 256).astype(int).tolist()
    shares = balanced_shares(lengths, 16)
    assert sorted(itertools.chain(*shares)) == list(range(256))
    loads = [sum(lengths[row] for row in share) for share in shares]
    assert max(loads) - min(loads) <= sorted(lengths)[15]
    assert max(sum(lengths[rank::16]) for rank in range(16)) > 1.3 * max(loads)
    assert balanced_shares(lengths, 1) == [list(range(256))]
    assert balanced_shares([5, 1, 1], 3) == [[0], [1], [2]]


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def by_hand(kind: str, pair: list[float]) -> float:
    """Each loss of one pair, written out; beta 0.3."""
    chosen, rejected, ref_chosen, ref_rejected, chosen_tokens, rejected_tokens = pair
    ratio = (chosen - ref_chosen) - (rejected - ref_rejected)
    per_token = (chosen - ref_chosen) / chosen_tokens - (rejected - ref_rejected) / rejected_tokens
    return {
        "dpo": -math.log(sigmoid(0.3 * ratio)),
        "ipo": (ratio - 1 / 0.6) ** 2,
        "length_normalized_dpo": -math.log(sigmoid(0.3 * per_token)),
        "length_normalized_ipo": (per_token - 1 / 0.6) ** 2,
        "label_smoothed_dpo": -0.9 * math.log(sigmoid(0.3 * ratio)) - 0.1 * math.log(sigmoid(-0.3 * ratio)),
        "rpo": -math.log(sigmoid(0.3 * ratio)) - 0.7 * chosen / chosen_tokens,
    }[kind]


@pytest.mark.parametrize("packed", ["false", "true"])
@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("dpo", ()),
        ("ipo", ()),
        ("length_normalized_dpo", ()),
        ("length_normalized_ipo", ()),
        ("label_smoothed_dpo", ("loss.label_smoothing=0.1",)),
        ("rpo", ("loss.nll_weight=0.7",)),
    ],
)
def test_every_loss_can_be_configured(repository: Path, kind: str, extra: tuple[str, ...], packed: str) -> None:
    config = dpo_config(repository, f"loss.kind={kind}", f"packed={packed}", "micro_batch=2", *extra)
    totals = added_up(DPOObjective(config, multiple=1, pad_id=PAD))
    assert totals["loss"] == pytest.approx(sum(by_hand(kind, pair) for pair in whole_sums()), rel=1e-5)


@pytest.mark.parametrize(
    "overrides",
    [
        ("loss.kind=hinge",),
        ("loss.kind=rpo",),
        ("loss.kind=rpo", "loss.nll_weight=0"),
        ("loss.kind=label_smoothed_dpo", "loss.label_smoothing=0.5"),
        ("loss.kind=dpo", "loss.nll_weight=1"),
        ("beta=0",),
        ("overlong=ignore",),
        ("reference.kind=frozen",),
        ("reference.kind=online", "reference.path=x"),
    ],
)
def test_settings_that_say_nothing_are_refused(repository: Path, overrides: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=overrides[-1].split("=")[0].split(".")[0]):
        dpo_config(repository, *overrides)


def test_a_given_reference_is_looked_for_before_anything_starts(repository: Path) -> None:
    config = dpo_config(repository, "reference.path=some/reference.safetensors")
    assert Path("some/reference.safetensors") in file_inputs(config)
    assert file_inputs(dpo_config(repository)) == file_inputs(dpo_config(repository, "reference.kind=online"))


@pytest.mark.parametrize("packed", ["false", "true"])
def test_drift_and_length_bias_are_those_of_the_pairs(repository: Path, packed: str) -> None:
    config = dpo_config(repository, f"packed={packed}", "micro_batch=2")
    objective = DPOObjective(config, multiple=1, pad_id=PAD)
    summary = objective.summary(added_up(objective))
    chosen, rejected, ref_chosen, ref_rejected, chosen_tokens, rejected_tokens = np.array(whole_sums()).T
    margins, lengths = (chosen - ref_chosen) - (rejected - ref_rejected), chosen_tokens - rejected_tokens
    assert summary["length_margin_correlation"] == pytest.approx(np.corrcoef(margins, lengths)[0, 1], rel=1e-5)
    assert summary["length_difference"] == pytest.approx(lengths.mean())
    assert summary["kl_to_reference"] == pytest.approx((ref_chosen + ref_rejected - chosen - rejected).mean() / 2)
    assert summary["chosen_shift"] == pytest.approx(((chosen - ref_chosen) / chosen_tokens).mean())


def test_equal_margins_have_no_correlation_with_length(repository: Path) -> None:
    whole = batch()
    at_reference = {
        **whole,
        **{
            f"ref_policy_log_probs_{side}": model(whole[side], whole[f"{side}_labels"]).sum(1)
            for side in ("chosen", "rejected")
        },
    }
    objective = DPOObjective(dpo_config(repository, "micro_batch=5", "global_batch=30"), multiple=1, pad_id=PAD)
    (micro,) = objective.micro_batches(at_reference)
    loss, count, sums = objective.loss(model(micro.tokens, micro.labels), micro)
    summary = objective.summary(
        {name: float(value) for name, value in {"loss": loss, "count": count, **sums}.items()}
    )
    assert summary["length_margin_correlation"] == 0.0
    assert summary["loss"] == pytest.approx(math.log(2), rel=1e-6)


def test_padding_at_the_end_of_a_row_is_no_response(repository: Path) -> None:
    config = dpo_config(repository, "packed=true", "micro_batch=5", "global_batch=30")
    (micro,) = DPOObjective(config, multiple=64, pad_id=PAD).micro_batches(batch())
    assert len(micro.documents) == 2 * PAIRS + 1
    sums = pair_sums(model(micro.tokens, micro.labels), micro)
    assert len(sums.chosen) == len(sums.rejected_tokens) == PAIRS


def row(shift: float) -> dict[str, float]:
    names = ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_logprob", "rejected_logprob")
    drift = {
        "kl_to_reference": 0.0,
        "chosen_shift": shift,
        "length_difference": 0.0,
        "length_margin_correlation": 0.0,
    }
    return {**dict.fromkeys(names, 0.5), **drift, "lr": 1.0, "step_time": 1.0}


class Lines:
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, step: int, values: dict[str, float]) -> None:
        self.rows.append({"step": step, **values})


def test_a_collapse_is_warned_of_once_at_its_first_step(caplog: pytest.LogCaptureFixture) -> None:
    """The rule is the constant's: a shift at it is none yet. Steps that are not logged are watched too."""
    writer: Any = Lines()
    log = DPOLog(writer, SimpleNamespace(grad_norm=1.0), every=2, speed=lambda _: {})  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        for step, shift in enumerate((0.0, COLLAPSE_SHIFT, COLLAPSE_SHIFT - 0.01, -5.0)):
            log.log_metrics(row(shift), step, "train/")
    assert log.collapsed_at == 3
    assert [line["step"] for line in writer.rows] == [2, 4]
    (message,) = [record.getMessage() for record in caplog.records]
    assert "collapse at step 3" in message
    assert "0.110 nats a token below" in message


def test_another_rank_sees_the_collapse_and_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    log = DPOLog(None, SimpleNamespace(grad_norm=1.0), every=1, speed=lambda _: {})  # type: ignore[arg-type]
    log.log_metrics(row(-1.0), 0, "train/")
    assert log.collapsed_at == 1
    assert not caplog.records


def test_the_picture_is_made_of_the_metrics(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "time": 0.0, **row(0.0)}) for step in (1, 2)]
    (tmp_path / METRICS_FILE).write_text("\n".join(lines) + "\n", "utf-8")
    assert plot_dpo(tmp_path).read_bytes().startswith(b"\x89PNG")


def test_log_probabilities_come_from_the_model_alone() -> None:
    """16 K tokens times 200,064 words fit because the model returns log-probabilities in chunks, never logits."""
    for path in Path(dpo_objective.__file__).parent.glob("*.py"):
        source = path.read_text("utf-8")
        assert not [name for name in ("log_softmax", "cross_entropy", "logits", ".gather(") if name in source], path
