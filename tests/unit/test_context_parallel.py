"""Which rank computes which token: against a brute-force reading of the definition, and its properties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phimr_nemo.model.megatron.attention import plan_context_documents
from phimr_nemo.model.megatron.context_parallel import NO_TOKEN, padded_lengths, plan_context, take_tokens

RANKS = (1, 2, 3, 4)
rows = st.lists(st.integers(1, 40), min_size=1, max_size=6)
Token = tuple[int, int, int]
"""Number in the row or NO_TOKEN, document, position."""


def brute_force(lengths: list[int], padded: list[int], ranks: int) -> list[list[Token]]:
    """What each rank computes, by cutting every document into 2 n chunks."""
    shares: list[list[Token]] = [[] for _ in range(ranks)]
    start = 0
    for document, (length, full) in enumerate(zip(lengths, padded, strict=True)):
        tokens = [(start + p if p < length else NO_TOKEN, document, p) for p in range(full)]
        size = full // (2 * ranks)
        chunks = [tokens[i * size : (i + 1) * size] for i in range(2 * ranks)]
        for rank in range(ranks):
            shares[rank] += chunks[rank] + chunks[2 * ranks - 1 - rank]
        start += length
    return shares


@settings(max_examples=200, deadline=None)
@given(rows, st.sampled_from(RANKS), st.sampled_from((1, 2, 4)))
def test_padding_is_the_least_that_the_ranks_can_share(lengths: list[int], ranks: int, divisor: int) -> None:
    padded = padded_lengths(torch.tensor(lengths), ranks, divisor).tolist()
    multiple = 2 * ranks
    least = [next(n for n in range(length, length + multiple) if n % multiple == 0) for length in lengths]
    assert padded[:-1] == least[:-1]
    total = sum(padded)
    assert padded[-1] % multiple == 0
    assert (total // ranks) % divisor == 0
    # No smaller last document would do.
    smaller = range(least[-1], padded[-1], multiple)
    assert all(((sum(least[:-1]) + last) // ranks) % divisor for last in smaller)


@settings(max_examples=200, deadline=None)
@given(rows, st.sampled_from(RANKS), st.sampled_from((1, 2)))
def test_the_plan_is_the_brute_force_one(lengths: list[int], ranks: int, divisor: int) -> None:
    plan = plan_context(torch.tensor(lengths), ranks, divisor)
    shares = brute_force(lengths, plan.lengths.tolist(), ranks)
    for rank, share in enumerate(shares):
        assert plan.tokens[rank].tolist() == [token for token, _, _ in share]
        assert plan.documents[rank].tolist() == [document for _, document, _ in share]
        assert plan.positions[rank].tolist() == [position for _, _, position in share]
    everything = [token for share in shares for token in share]
    assert [everything[place][0] for place in plan.places.tolist()] == list(range(sum(lengths)))
    in_order = [everything[place] for place in plan.in_order.tolist()]
    assert [(document, position) for _, document, position in in_order] == [
        (document, position) for document, n in enumerate(plan.lengths.tolist()) for position in range(n)
    ]


@pytest.mark.parametrize("ranks", RANKS)
def test_every_rank_has_the_same_causal_work(ranks: int) -> None:
    plan = plan_context(torch.tensor([16 * ranks, 3, 2 * ranks + 1]), ranks)
    work = (plan.positions + 1).sum(dim=1)  # keys that each query sees
    assert len(set(work.tolist())) == 1
    # Cut in order instead, the last rank would have the most.
    in_order = (plan.positions.reshape(-1)[plan.in_order].view(ranks, -1) + 1).sum(dim=1)
    assert ranks == 1 or in_order[0] != work[0]


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_order_is_megatrons(ranks: int) -> None:
    """Its own slicing of angles for one sequence, and of a packed row's documents."""
    from megatron.core.models.common.embeddings.rope_utils import _get_thd_freqs_on_this_cp_rank

    lengths = torch.tensor([8 * ranks, 2 * ranks])
    plan = plan_context(lengths, ranks)
    for rank in range(ranks):
        parts = [
            _get_thd_freqs_on_this_cp_rank(rank, ranks, torch.empty(n // ranks), torch.arange(n))
            for n in lengths.tolist()
        ]
        assert torch.equal(plan.positions[rank], torch.cat(parts))


def test_take_tokens_fills_padding() -> None:
    rows_ = torch.arange(10).view(2, 5)
    taken = take_tokens(rows_, torch.tensor([4, NO_TOKEN, 0]), fill=-100)
    assert taken.tolist() == [[4, -100, 0], [9, -100, 5]]


@settings(max_examples=50, deadline=None)
@given(rows, st.sampled_from(RANKS))
def test_queries_meet_their_own_documents_keys(lengths: list[int], ranks: int) -> None:
    """Labels in place of vectors through the layouts of packed attention: each query is beside its document."""
    plan = plan_context(torch.tensor(lengths), ranks)
    everywhere = plan.documents.reshape(-1) * 1000 + plan.positions.reshape(-1)  # in the ranks' order
    for rank in range(ranks):
        buckets = plan_context_documents(plan, rank)
        keys, queries = everywhere[buckets.keys.gather], everywhere.view(ranks, -1)[rank][buckets.queries.gather]
        key_at, query_at = 0, 0
        for (count, key_width), (query_count, query_width) in zip(
            buckets.keys.shapes, buckets.queries.shapes, strict=True
        ):
            assert count == query_count
            key_rows = keys[key_at : (key_at := key_at + count * key_width)].view(count, -1)
            query_rows = queries[query_at : (query_at := query_at + count * query_width)].view(count, -1)
            for key_row, query_row in zip(key_rows, query_rows, strict=True):
                document = key_row[0] // 1000
                length = int(plan.lengths[document])
                assert key_row[:length].tolist() == [int(document) * 1000 + p for p in range(length)]
                assert set((query_row // 1000).tolist()) == {int(document)}
        assert torch.equal(buckets.positions, queries % 1000)
        # Back from the buckets every token is where it was.
        assert torch.equal(queries[buckets.queries.scatter], everywhere.view(ranks, -1)[rank])
        assert torch.equal(keys[buckets.keys.scatter], everywhere)
