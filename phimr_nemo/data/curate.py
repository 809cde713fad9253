"""From verdicts to training sets: pure functions that return a table and the count of every drop by reason.

Mid-training takes every verified response, SFT a harder part of them, DPO pairs a right with a wrong
response to one question, reinforcement learning takes prompts that are neither too easy nor too hard and
answered at uniform length (arXiv 2504.21233, sections 3 and 4).
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from phimr_nemo.errors import UserError
from phimr_nemo.records import Difficulty
from phimr_nemo.store import content_id, content_seed, rows_to_table

if TYPE_CHECKING:
    import pyarrow as pa

PairMode = Literal["near_miss", "random"]
Rollout = dict[str, Any]
Drops = dict[str, int]

# Of 800 real graded responses 1.4 % of the right and 16.5 % of the wrong ones repeat more than this share of
# their runs of ten words.
REPETITION_WORDS: Final = 10
MAX_REPETITION: Final = 0.2
# A grader that gave up says nothing about the response.
UNGRADED: Final = ("timeout", "error")
# What the added tokens of Phi-family tokenizers look like.
SPECIAL_TOKEN: Final = re.compile(r"<\|/?\w+\|>")


def midtrain_conversations(verdicts: pa.Table, *, max_per_problem: int | None = None) -> tuple[pa.Table, Drops]:
    """The full verified set: right, finished responses, each text once a problem.

    Args:
        verdicts: a table of kind "verdicts".
        max_per_problem: keep at most this many responses to one problem, the first ones; None = all.

    Returns:
        A table of kind "conversations" in the order of `verdicts`, and dropped responses by reason.
    """
    drops: Counter[str] = Counter()
    kept = _first_per_problem(_verified(_rows(verdicts), drops), max_per_problem, drops)
    return _conversations(kept), dict(drops)


def sft_conversations(
    verdicts: pa.Table,
    *,
    difficulties: Collection[Difficulty],
    max_per_problem: int | None = None,
    max_repetition: float = MAX_REPETITION,
) -> tuple[pa.Table, Drops]:
    """A harder, cleaner part of the verified set: of each problem the most worked-out responses.

    A problem of unknown difficulty is kept: nothing says that it is easy.

    Args:
        verdicts: a table of kind "verdicts".
        difficulties: the tiers to keep.
        max_per_problem: keep at most this many responses to one problem, the longest ones; None = all.
        max_repetition: drop responses that repeat a larger share of themselves (see :func:`repetition`).

    Returns:
        A table of kind "conversations", and dropped responses by reason.
    """
    drops: Counter[str] = Counter()
    hard: list[Rollout] = []
    for row in _verified(_rows(verdicts), drops):
        if row["difficulty"] is not None and row["difficulty"] not in difficulties:
            drops["other difficulty"] += 1
        elif repetition(row["response"]) > max_repetition:
            drops["repetitive"] += 1
        else:
            hard.append(row)
    # Stable: of equally long responses the earlier one comes first.
    longest_first = sorted(hard, key=lambda row: -len(row["response"]))
    kept = {row["id"] for row in _first_per_problem(longest_first, max_per_problem, drops)}
    return _conversations([row for row in hard if row["id"] in kept]), dict(drops)


def preference_pairs(
    verdicts: pa.Table,
    *,
    max_per_problem: int,
    mode: PairMode,
    seed: int,
    max_length_ratio: float | None = None,
) -> tuple[pa.Table, Drops]:
    """Pairs of a right (chosen) and a wrong (rejected) response to one question; no response is used twice.

    Args:
        verdicts: a table of kind "verdicts".
        max_per_problem: pairs of one problem at most.
        mode: "near_miss" prefers pairs that agree longest before they part (see :func:`agreement`), "random"
            draws them.
        seed: of the draws; another mode ignores it.
        max_length_ratio: leave out pairs of which one is more than this many times as long (characters) as
            the other; None = any.

    Returns:
        A table of kind "pairs", and dropped responses and problems by reason.
    """
    drops: Counter[str] = Counter()
    pairs: list[Rollout] = []
    for problem_id, rows in _by_problem(_rows(verdicts)).items():
        chosen = _first_per_problem(_verified(rows, Counter()), None, drops)
        rejected = _rejected(rows, drops)
        if not chosen or not rejected:
            drops["problem without right response" if not chosen else "problem without wrong response"] += 1
            continue
        if mode == "near_miss":
            ordered = _nearest_first(chosen, rejected)
        else:
            ordered = _drawn(chosen, rejected, content_seed("pairs", str(seed), problem_id))
        fitting = [pair for pair in ordered if _comparable(*pair, max_length_ratio)]
        drops["pair of unlike lengths"] += len(ordered) - len(fitting)
        disjoint = _disjoint(fitting)
        drops["over max_per_problem"] += max(0, len(disjoint) - max_per_problem)
        for right, wrong in disjoint[:max_per_problem]:
            pairs.append(
                {
                    "id": content_id("pair", mode, right["id"], wrong["id"]),
                    "problem_id": problem_id,
                    "question": right["question"],
                    "chosen": right["response"],
                    "rejected": wrong["response"],
                    "mode": mode,
                }
            )
    return rows_to_table(pairs, "pairs"), _without_zeros(drops)


def rl_prompts(
    verdicts: pa.Table,
    *,
    min_pass: float,
    max_pass: float,
    hard_below: float,
    max_length_spread: float | None = None,
) -> tuple[pa.Table, Drops]:
    """Prompts worth reinforcement learning, from several rollouts of each by the model that is to learn.

    Length spread is the coefficient of variation of the response lengths: population standard deviation over
    mean. Lengths are tokens, or characters where a table does not know its tokens.

    Args:
        verdicts: a table of kind "verdicts".
        min_pass: keep prompts whose share of right responses is above this (exclusive).
        max_pass: ... and below this (exclusive).
        hard_below: mark prompts with a lower pass rate as hard.
        max_length_spread: keep prompts with at most this spread; None = any (prompt optimisation off).

    Returns:
        A table of kind "prompts", and dropped responses and prompts by reason.

    Raises:
        UserError: the bounds leave no pass rate.
    """
    if not min_pass < max_pass:
        raise UserError(
            f"min_pass={min_pass} max_pass={max_pass}",
            rule="a pass rate lies strictly between min_pass and max_pass",
            remedy="use 0 and 1 for every prompt that is sometimes right and sometimes wrong",
        )
    rows = _rows(verdicts)
    know_tokens = all(row["tokens"] >= 0 for row in rows)
    drops: Counter[str] = Counter()
    prompts: list[Rollout] = []
    for problem_id, group in _by_problem(rows).items():
        graded = [row for row in group if row["verdict"] not in UNGRADED]
        drops["ungraded"] += len(group) - len(graded)
        if not graded:
            drops["prompt without graded response"] += 1
            continue
        pass_rate = sum(row["verdict"] == "correct" for row in graded) / len(graded)
        lengths = np.array([row["tokens"] if know_tokens else len(row["response"]) for row in graded], dtype=float)
        spread = float(lengths.std() / lengths.mean()) if lengths.any() else 0.0
        if pass_rate <= min_pass:
            drops["prompt too hard"] += 1
        elif pass_rate >= max_pass:
            drops["prompt too easy"] += 1
        elif max_length_spread is not None and spread > max_length_spread:
            drops["prompt of uneven length"] += 1
        elif spells_special_token(group[0]["question"]):
            drops["special token in text"] += 1
        else:
            prompts.append(
                {
                    "id": content_id("prompt", problem_id),
                    "problem_id": problem_id,
                    "question": group[0]["question"],
                    "answer": group[0]["answer"],
                    "pass_rate": pass_rate,
                    "mean_length": float(lengths.mean()),
                    "length_spread": spread,
                    "hard": pass_rate < hard_below,
                }
            )
    return rows_to_table(prompts, "prompts"), _without_zeros(drops)


def repetition(text: str) -> float:
    """The share of a text's runs of ten words that occurred in it before, 0 to 1."""
    words = text.split()
    runs = [tuple(words[i : i + REPETITION_WORDS]) for i in range(len(words) - REPETITION_WORDS + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def agreement(one: str, other: str) -> float:
    """How late two texts part: the share of the longer one that is their common beginning, 0 to 1."""
    longest = max(len(one), len(other), 1)
    for position, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return position / longest
    return min(len(one), len(other)) / longest


def spells_special_token(text: str) -> bool:
    """Whether a text spells a token like `<|end|>`, which would forge a turn of the conversation."""
    return SPECIAL_TOKEN.search(text) is not None


def _rows(verdicts: pa.Table) -> list[Rollout]:
    columns = [
        *("id", "problem_id", "question", "answer", "response", "finish_reason", "tokens"),
        *("domain", "difficulty", "verdict"),
    ]
    return list(verdicts.select(columns).to_pylist())


def _by_problem(rows: Sequence[Rollout]) -> Mapping[str, list[Rollout]]:
    groups: dict[str, list[Rollout]] = {}
    for row in rows:
        groups.setdefault(row["problem_id"], []).append(row)
    return groups


def _verified(rows: Sequence[Rollout], drops: Counter[str]) -> list[Rollout]:
    """Right and finished responses that can be rendered."""
    kept = []
    for row in rows:
        if row["verdict"] != "correct":
            drops[f"verdict {row['verdict']}"] += 1
        elif row["finish_reason"] != "stop":
            drops["cut off"] += 1
        elif spells_special_token(row["question"]) or spells_special_token(row["response"]):
            drops["special token in text"] += 1
        else:
            kept.append(row)
    return kept


def _rejected(rows: Sequence[Rollout], drops: Counter[str]) -> list[Rollout]:
    """Wrong responses, each text once."""
    texts: set[str] = set()
    kept = []
    for row in rows:
        if row["verdict"] in UNGRADED:
            drops["ungraded"] += 1
        elif row["verdict"] != "correct" and not row["response"].strip():
            drops["empty response"] += 1
        elif row["verdict"] != "correct" and spells_special_token(row["response"]):
            drops["special token in text"] += 1
        elif row["verdict"] != "correct" and row["response"] not in texts:
            texts.add(row["response"])
            kept.append(row)
    return kept


def _first_per_problem(rows: Sequence[Rollout], most: int | None, drops: Counter[str]) -> list[Rollout]:
    """Each response text once a problem, and at most `most` of a problem, in order."""
    texts: dict[str, set[str]] = {}
    kept = []
    for row in rows:
        seen = texts.setdefault(row["problem_id"], set())
        if row["response"] in seen:
            drops["duplicate response"] += 1
        elif most is not None and len(seen) >= most:
            drops["over max_per_problem"] += 1
        else:
            seen.add(row["response"])
            kept.append(row)
    return kept


def _conversations(rows: Sequence[Rollout]) -> pa.Table:
    names = ("problem_id", "question", "response", "domain", "difficulty")
    records = [{"id": content_id("conversation", row["id"]), **{name: row[name] for name in names}} for row in rows]
    return rows_to_table(records, "conversations")


def _nearest_first(chosen: Sequence[Rollout], rejected: Sequence[Rollout]) -> list[tuple[Rollout, Rollout]]:
    pairs = [(right, wrong) for right in chosen for wrong in rejected]
    return sorted(
        pairs, key=lambda pair: (-agreement(pair[0]["response"], pair[1]["response"]), pair[0]["id"], pair[1]["id"])
    )


def _drawn(chosen: Sequence[Rollout], rejected: Sequence[Rollout], seed: int) -> list[tuple[Rollout, Rollout]]:
    pairs = [(right, wrong) for right in chosen for wrong in rejected]
    return random.Random(seed).sample(pairs, len(pairs))


def _disjoint(pairs: Sequence[tuple[Rollout, Rollout]]) -> list[tuple[Rollout, Rollout]]:
    """Pairs in order, without those that use a response again."""
    used: set[str] = set()
    kept = []
    for right, wrong in pairs:
        if right["id"] not in used and wrong["id"] not in used:
            used.update((right["id"], wrong["id"]))
            kept.append((right, wrong))
    return kept


def _comparable(right: Rollout, wrong: Rollout, max_length_ratio: float | None) -> bool:
    if max_length_ratio is None:
        return True
    shorter, longer = sorted((len(right["response"]), len(wrong["response"])))
    return longer <= max_length_ratio * shorter


def _without_zeros(drops: Counter[str]) -> Drops:
    return {reason: count for reason, count in drops.items() if count}
