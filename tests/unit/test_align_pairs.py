"""Preference pairs: what is refused, what is left out and counted, and stored references that are not this run's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from phimr_nemo.align.dpo.pairs import PairCollate, Pairs, load_pairs
from phimr_nemo.align.dpo.reference import PARTIAL_FILE, REFERENCE_FILE, stored_reference
from phimr_nemo.config import BaseConfig, ParallelConfig, load_config
from phimr_nemo.data.chat import load_tokenizer, render_conversation
from phimr_nemo.errors import Preempted, UserError
from phimr_nemo.model.base import run_base
from phimr_nemo.store.shards import finish, rows_to_table, write_shard
from phimr_nemo.training.distributed import start_process_group, stop_process_group

QUESTION = "Compute 2 + 3."
LONG = "2 + 3 = 5. " * 30


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Any:
    output = tmp_path_factory.mktemp("pairs") / "base"
    overrides = [
        f"run.output={output}",
        "hidden_size=64",
        "intermediate_size=64",
        "num_hidden_layers=1",
        "num_attention_heads=4",
    ]
    run_base(load_config(BaseConfig, repository / "conf" / "base" / "tiny.yaml", overrides))
    return load_tokenizer(output / "hf")


def written(root: Path, *pairs: tuple[str, str], question: str = QUESTION) -> Path:
    rows = [
        {
            "id": f"r{i}",
            "problem_id": "p",
            "question": question,
            "chosen": chosen,
            "rejected": rejected,
            "mode": "random",
        }
        for i, (chosen, rejected) in enumerate(pairs)
    ]
    write_shard(root / "pairs", 0, rows_to_table(rows, "pairs"), kind="pairs")
    finish(root / "pairs", kind="pairs", config={})
    return root / "pairs"


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("It is 5.", "It is 6."), ("It is 5.", "It is 5.")], "pair r1 .*same text as chosen and as rejected"),
        ([("It is 5.", "It is 6."), ("It is 5.", "It is 6.")], "pair r1 .*has the texts of pair r0"),
        ([("It is 5.", "It is 6."), ("It is 6.", "It is 5.")], "pair r1 .*is pair r0 .*other way round"),
        ([("It is 5.", "It is <|end|> 6.")], r"<\|end\|>"),
        ([("It is 5.", "")], "pair r0 .*a side without any text"),
        ([(" \n", "It is 6.")], "pair r0 .*a side without any text"),
    ],
)
def test_pairs_that_say_nothing_are_refused(
    tmp_path: Path, tokenizer: Any, pairs: list[tuple[str, str]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_pairs(written(tmp_path, *pairs), tokenizer, 256, "drop")


def test_a_side_that_was_cut_off_has_no_end_token(tmp_path: Path, tokenizer: Any) -> None:
    """Both sides alike; directories that do not know how responses ended hold responses that ended."""
    sides = {"chosen": "It is 5.", "rejected": "It is, let me"}
    endings: tuple[dict[str, str | None], ...] = (
        {},
        {"chosen_finish_reason": "stop", "rejected_finish_reason": "length"},
        {"chosen_finish_reason": "length", "rejected_finish_reason": None},
    )
    rows = [
        {"id": f"r{n}", "problem_id": "p", "question": f"{QUESTION} ({n})", **sides, "mode": "random", **reasons}
        for n, reasons in enumerate(endings)
    ]
    write_shard(tmp_path / "pairs", 0, rows_to_table(rows, "pairs"), kind="pairs")
    finish(tmp_path / "pairs", kind="pairs", config={})
    pairs = load_pairs(tmp_path / "pairs", tokenizer, 256, "drop")
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    ended = [[row.input_ids[-1] == end for row in side] for side in (pairs.chosen, pairs.rejected)]
    assert ended == [[True, True, False], [True, False, True]]
    for row in (*pairs.chosen, *pairs.rejected):
        assert row.loss_mask[-1] == 1


def test_one_response_may_stand_in_several_pairs(tmp_path: Path, tokenizer: Any) -> None:
    directory = written(tmp_path, ("It is 5.", "It is 6."), ("It is 5.", "It is 7."), ("It is 6.", "It is 8."))
    assert len(load_pairs(directory, tokenizer, 256, "drop")) == 3


def test_an_overlong_pair_is_left_out_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    directory = written(tmp_path, ("It is 5.", "It is 6."), ("It is 5.", LONG), (LONG, "It is 7."))
    pairs = load_pairs(directory, tokenizer, 40, "drop")
    assert (len(pairs), pairs.too_long, pairs.truncated) == (1, 2, 0)
    whole = render_conversation(tokenizer, QUESTION, "It is 6.")[0]
    assert pairs.rejected[0].input_ids.tolist() == whole


def test_an_overlong_pair_is_cut_off_at_its_end(tmp_path: Path, tokenizer: Any) -> None:
    directory = written(tmp_path, ("It is 5.", "It is 6."), ("It is 5.", LONG))
    pairs = load_pairs(directory, tokenizer, 40, "truncate")
    assert (len(pairs), pairs.too_long, pairs.truncated) == (2, 0, 1)
    ids, mask = render_conversation(tokenizer, QUESTION, LONG)
    assert pairs.rejected[1].input_ids.tolist() == ids[:40]
    assert pairs.rejected[1].loss_mask.tolist() == mask[:40]
    assert pairs.rejected[1].document_lengths.tolist() == [40]
    assert len(pairs.chosen[1].input_ids) < 40


def test_what_truncation_makes_equal_or_empty_is_left_out(tmp_path: Path, tokenizer: Any) -> None:
    """The first pair parts after the limit; of the second's long question nothing is left for a response."""
    directory = written(tmp_path, (LONG + "So 5.", LONG + "So 6."), ("It is 5.", LONG))
    pairs = load_pairs(directory, tokenizer, 40, "truncate")
    assert (len(pairs), pairs.too_long, pairs.truncated) == (1, 1, 1)
    with pytest.raises(UserError, match="none of the 1 pairs"):
        load_pairs(written(tmp_path / "long", ("5", "6"), question=LONG), tokenizer, 40, "truncate")


def test_an_overlong_pair_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    directory = written(tmp_path, ("It is 5.", "It is 6."), ("It is 5.", LONG))
    tokens = len(render_conversation(tokenizer, QUESTION, LONG)[0])
    with pytest.raises(UserError, match=f"pair r1 .* a side of {tokens} tokens"):
        load_pairs(directory, tokenizer, 40, "error")
    assert len(load_pairs(directory, tokenizer, tokens, "error")) == 2


def test_no_pair_that_fits_is_an_error(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="none of the 1 pairs"):
        load_pairs(written(tmp_path, ("It is 5.", LONG)), tokenizer, 40, "drop")


def test_ranks_share_a_global_batch_with_its_references(tmp_path: Path, tokenizer: Any) -> None:
    texts = [(f"It is {'5' * n}.", f"It is {'6' * (n + 1)}.") for n in range(1, 7)]
    pairs = load_pairs(written(tmp_path, *texts), tokenizer, 256, "drop")
    reference = torch.arange(12.0).view(2, 6)
    found: list[float] = []
    for rank in range(2):
        batch = PairCollate(pairs, reference, 0, rank=rank, ranks=2)([0, 1, 2, 3, 5])
        assert batch["reference"][1].tolist() == [value + 6 for value in batch["reference"][0].tolist()]
        for place, number in enumerate(batch["reference"][0].int().tolist()):
            ids = pairs.chosen[number].input_ids.tolist()
            assert batch["chosen"][place, : len(ids)].tolist() == ids
        found += batch["reference"][0].tolist()
    assert sorted(found) == [0, 1, 2, 3, 5]
    assert "reference" not in PairCollate(pairs, None, 0, rank=0, ranks=1)([0])


# ---- stored references ---------------------------------------------------------------------------------------


IDENTITY = {"base weights": "abc", "pairs": "2, xyz"}


class Model:
    """Stands for the policy: log-probability -0.5 a label; counts what it computed."""

    micro_batch = 2
    calls = 0

    def __init__(self, value: float = -0.5) -> None:
        self.value = value

    def prepare_for_inference(self) -> None:
        return

    finish_inference = prepare_for_inference

    def log_probs(self, _tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return torch.where(labels == -100, 0.0, self.value)


@pytest.fixture(scope="module")
def _group() -> Iterator[None]:
    start_process_group(ParallelConfig(), seed=0)
    yield
    stop_process_group()


def go_on() -> bool:
    """Nobody has told the run to stop."""
    return False


def two_pairs(tmp_path: Path, tokenizer: Any) -> Pairs:
    return load_pairs(written(tmp_path, ("It is 5.", "It is 66."), ("5", "6")), tokenizer, 256, "drop")


@pytest.mark.usefixtures("_group")
def test_a_reference_is_computed_once(tmp_path: Path, tokenizer: Any) -> None:
    pairs, model = two_pairs(tmp_path, tokenizer), Model()
    first = stored_reference(tmp_path, None, model, pairs, 0, IDENTITY, go_on)  # type: ignore[arg-type]
    counts = [[-0.5 * int(row.loss_mask.sum()) for row in rows] for rows in (pairs.chosen, pairs.rejected)]
    assert first.tolist() == counts
    calls = model.calls
    again = stored_reference(tmp_path, None, model, pairs, 0, IDENTITY, go_on)  # type: ignore[arg-type]
    given = stored_reference(tmp_path / "x", tmp_path / REFERENCE_FILE, model, pairs, 0, IDENTITY, go_on)  # type: ignore[arg-type]
    assert model.calls == calls
    assert torch.equal(first, again)
    assert torch.equal(first, given)


@pytest.mark.usefixtures("_group")
@pytest.mark.parametrize("then", ["nothing", "another reference", "damaged"])
def test_a_stop_between_batches_keeps_what_was_done(
    then: str, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four responses in two batches: the stop comes before the second, which alone is computed afterwards."""
    monkeypatch.setattr("phimr_nemo.align.dpo.reference.MICRO_BATCHES_A_CALL", 1)
    pairs, model = two_pairs(tmp_path, tokenizer), Model()
    expected = stored_reference(tmp_path / "whole", None, Model(), pairs, 0, IDENTITY, go_on)  # type: ignore[arg-type]
    told = iter([False, True])
    with pytest.raises(Preempted, match="2 of 4 responses are done"):
        stored_reference(tmp_path, None, model, pairs, 0, IDENTITY, lambda: next(told))  # type: ignore[arg-type]
    assert model.calls == 1
    assert not (tmp_path / REFERENCE_FILE).exists()
    identity = {**IDENTITY, "pairs": "2, other"} if then == "another reference" else IDENTITY
    if then == "damaged":
        (tmp_path / PARTIAL_FILE).write_bytes(b"not safetensors at all")
    found = stored_reference(tmp_path, None, model, pairs, 0, identity, go_on)  # type: ignore[arg-type]
    assert model.calls == (2 if then == "nothing" else 3)
    assert torch.equal(found, expected)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == [REFERENCE_FILE]


@pytest.mark.usefixtures("_group")
def test_references_of_something_else_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    pairs, model = two_pairs(tmp_path, tokenizer), Model()
    stored_reference(tmp_path, None, model, pairs, 0, IDENTITY, go_on)  # type: ignore[arg-type]
    for name in IDENTITY:
        with pytest.raises(UserError, match=f"another reference .{name}: .* -> other"):
            stored_reference(tmp_path, None, model, pairs, 0, {**IDENTITY, name: "other"}, go_on)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="does not exist"):
        stored_reference(tmp_path, tmp_path / "absent", model, pairs, 0, IDENTITY, go_on)  # type: ignore[arg-type]


@pytest.mark.usefixtures("_group")
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_references_that_are_not_finite_are_refused(tmp_path: Path, tokenizer: Any, value: float) -> None:
    """Computed so, nothing is stored; stored so, they are not used."""
    pairs = two_pairs(tmp_path, tokenizer)
    with pytest.raises(UserError, match="the base model gives pair 0"):
        stored_reference(tmp_path, None, Model(value), pairs, 0, IDENTITY, go_on)  # type: ignore[arg-type]
    path = tmp_path / REFERENCE_FILE
    assert not path.exists()
    stored_reference(tmp_path, None, Model(), pairs, 0, IDENTITY, go_on)  # type: ignore[arg-type]
    values = load_file(path)
    values["rejected"][1] = value
    save_file(values, path, metadata=IDENTITY)
    with pytest.raises(UserError, match="gives pair 1"):
        stored_reference(tmp_path, None, Model(), pairs, 0, IDENTITY, go_on)  # type: ignore[arg-type]


@pytest.mark.usefixtures("_group")
@pytest.mark.parametrize("content", [b"", b"not safetensors at all"])
def test_a_damaged_reference_is_one_error(tmp_path: Path, tokenizer: Any, content: bytes) -> None:
    (tmp_path / REFERENCE_FILE).write_bytes(content)
    with pytest.raises(UserError, match="not readable"):
        stored_reference(tmp_path, None, Model(), two_pairs(tmp_path, tokenizer), 0, IDENTITY, go_on)  # type: ignore[arg-type]


def test_the_digest_sees_tokens_masks_and_boundaries() -> None:
    def pairs(chosen: list[int], rejected: list[int], mask: int = 1) -> Pairs:
        from phimr_nemo.align.dpo.pairs import _row

        return Pairs([_row(chosen, [mask] * len(chosen))], [_row(rejected, [1] * len(rejected))])

    variants = [pairs([1, 2], [3]), pairs([1], [2, 3]), pairs([1, 2], [4]), pairs([1, 2], [3], 0), pairs([3], [1, 2])]
    assert len({variant.digest() for variant in variants}) == len(variants)
    assert pairs([1, 2], [3]).digest() == variants[0].digest()
    assert np.array_equal(variants[0].chosen[0].input_ids, [1, 2])
