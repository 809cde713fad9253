"""Lengths as the stages count them, caps and balance by label, and sets that no stage refuses."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from phimr_nemo.config import CurateConfig, DPOConfig, GRPOConfig, PackConfig, SFTConfig, load_config
from phimr_nemo.config.data import Cap
from phimr_nemo.data.chat import load_tokenizer, render_conversation, render_prompt
from phimr_nemo.data.curate.balance import Kinds, chosen_fates
from phimr_nemo.data.curate.lengths import TokenCounter, token_counter
from phimr_nemo.data.curate.narrow import label_hash
from phimr_nemo.data.curate.stage import run_curate
from phimr_nemo.data.fate import Fate
from phimr_nemo.data.repetition import repetition
from phimr_nemo.data.synthetic.tokenizer import build_tokenizer, synthetic_corpus
from phimr_nemo.errors import UserError
from phimr_nemo.store.records import DIFFICULTIES
from phimr_nemo.store.shards import finish, read_manifest, read_table, rows_to_table, write_shard
from phimr_nemo.supervised.rowsource import Conversations


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(synthetic_corpus()).save_pretrained(directory)
    return directory


def verdict(number: int, problem: str, response: str, name: str = "correct", **other: Any) -> dict[str, Any]:
    return {
        "id": f"r{number}",
        "problem_id": problem,
        "question": f"question {problem}",
        "answer": "4",
        "response": response,
        "teacher": "some-teacher",
        "sample_index": number,
        "seed": 0,
        "finish_reason": "stop",
        "tokens": -1,
        "domain": "algebra",
        "difficulty": "college",
        "source": "own",
        "metadata": "{}",
        "verdict": name,
        **dict.fromkeys(("extracted", "reason", "grader"), ""),
        **other,
    }


def verdicts_of(directory: Path, rows: list[dict[str, Any]]) -> Path:
    write_shard(directory, 0, rows_to_table(rows, "verdicts"), kind="verdicts")
    finish(directory, kind="verdicts", config={})
    return directory


def curated(repository: Path, verdicts: Path, output: Path, *overrides: str) -> Path:
    own = [f"verdicts={verdicts}", f"run.output={output}", "workers=1", *overrides]
    run_curate(load_config(CurateConfig, repository / "conf" / "curate" / "paper.yaml", own))
    return output


@pytest.mark.parametrize("limit", [0, 120, 10**6])
def test_lengths_are_the_stages_own_above_the_limit_and_bounds_below(
    tokenizer_directory: Path, limit: int, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(tokenizer_directory)
    counter = token_counter(tokenizer_directory, limit, tmp_path / "tokenizer.json")
    texts = ["", "12+7=19", "等于 𝔸 " * 5, "so the answer is \\boxed{4}\n" * 20]
    questions, responses = zip(*[(one, other) for one in texts for other in texts], strict=True)
    lengths, prompts = counter.count(pa.array(questions), pa.array(responses), np.full(len(questions), -1, np.int32))
    own = [len(render_conversation(tokenizer, *pair)[0]) for pair in zip(questions, responses, strict=True)]
    of_prompts = [len(render_prompt(tokenizer, question)) for question in questions]
    for found, expected in ((lengths, own), (prompts, of_prompts)):
        assert [n for n in found.tolist() if n > limit] == [
            e for n, e in zip(found.tolist(), expected, strict=True) if n > limit
        ]
        assert (found >= np.array(expected)).all()
    assert (lengths.tolist() == own) == (limit == 0)


def test_without_a_tokenizer_recorded_tokens_come_before_characters() -> None:
    questions, responses = pa.array(["", ""]), pa.array(["x" * 330, "x" * 330])
    lengths, prompts = TokenCounter().count(questions, responses, np.array([7, -1], np.int32))
    assert (lengths - prompts).tolist() == [7, 100]


def test_of_each_problem_the_longest_that_fits_is_trained_on(
    repository: Path, tokenizer_directory: Path, tmp_path: Path
) -> None:
    """Whatever the tokens that the teacher counted: SFT takes every row, and the shorter right response stays."""
    steps = "".join(f"Try value {i}: it gives {i * 7}. " for i in range(400))
    rows: list[dict[str, Any]] = []
    for problem in range(4):
        for number, body in enumerate([steps + " " * problem, "Two and two are four.", "2+2=4. So, four."]):
            response = f"<think>\n{body}\n</think>\nSo \\boxed{{4}}"
            rows.append(verdict(len(rows), f"p{problem}", response, tokens=[30, 60_000, -1][number]))
        wrong = f"<think>\n{steps}\n</think>\nSo \\boxed{{5}}" if problem else "Two and two make \\boxed{5}"
        rows.append(verdict(len(rows), f"p{problem}", wrong, "wrong", tokens=30))
    limit = 512
    output = curated(
        *(repository, verdicts_of(tmp_path / "verdicts", rows), tmp_path / "curated"),
        *(f"tokenizer={tokenizer_directory}", f"sft.max_tokens={limit}", f"pairs.max_tokens={limit}"),
        *("pairs.max_length_ratio=null", "prompts=null", f"midtrain.max_tokens={limit}"),
    )
    tokenizer = load_tokenizer(tokenizer_directory)
    Conversations(output / "sft", tokenizer, "response").check(limit, 0, 1)
    kept = read_table(output / "sft", "conversations").to_pylist()
    assert [row["response"].splitlines()[1] for row in kept] == ["Two and two are four."] * 4
    pairs = read_table(output / "pairs", "pairs").to_pylist()
    assert [row["problem_id"] for row in pairs] == ["p0"]
    assert read_manifest(output / "sft", "conversations").counts["dropped: longer than max_tokens"] == 4
    # The planted fault: without the bound the stage refuses the set.
    unbounded = curated(
        *(repository, tmp_path / "verdicts", tmp_path / "unbounded"),
        *("sft.max_tokens=null", "midtrain=null", "pairs=null", "prompts=null"),
    )
    with pytest.raises(UserError, match="tokens"):
        Conversations(unbounded / "sft", tokenizer, "response").check(limit, 0, 1)


def test_neither_side_of_a_pair_is_cut_off_or_a_loop(repository: Path, tmp_path: Path) -> None:
    loop = "wait, let me think again about this and that and the other. " * 40
    rows: list[dict[str, Any]] = []
    for problem, (wrong, other) in enumerate(
        [
            ("so \\boxed{5}", {}),
            (loop, {}),
            ("so I", {"finish_reason": "length"}),
            ("so \\boxed{6}", {"difficulty": "middle"}),
        ]
    ):
        rows.append(
            verdict(
                len(rows), f"p{problem}", "so \\boxed{4}", **{k: v for k, v in other.items() if k == "difficulty"}
            )
        )
        rows.append(verdict(len(rows), f"p{problem}", wrong, "wrong", **other))
    output = curated(
        *(repository, verdicts_of(tmp_path / "verdicts", rows), tmp_path / "curated"),
        *("midtrain=null", "sft=null", "prompts=null", "pairs.max_length_ratio=null"),
    )
    (pair,) = read_table(output / "pairs", "pairs").to_pylist()
    assert (pair["chosen"], pair["rejected"], pair["problem_id"]) == ("so \\boxed{4}", "so \\boxed{5}", "p0")
    counts = read_manifest(output / "pairs", "pairs").counts
    assert (counts["dropped: repetitive"], counts["dropped: cut off"], counts["dropped: other difficulty"]) == (
        1,
        1,
        2,
    )
    assert counts["dropped: problem without wrong response"] == 2


def test_what_a_response_was_travels_with_it(repository: Path, tmp_path: Path) -> None:
    texts = [f"{'step ' * 30} number {n} \\boxed{{{4 + n % 2}}}" for n in range(4)]
    rows = [
        verdict(n, "p", text, ("correct", "wrong")[n % 2], teacher=f"t{n}", source=[None, "s"][n // 2])
        for n, text in enumerate(texts)
    ]
    output = curated(
        *(repository, verdicts_of(tmp_path / "verdicts", rows), tmp_path / "curated"),
        *("prompts.min_samples=1", "pairs.max_repetition=1.0", "sft=null"),
    )
    by_text = {row["response"]: row for row in rows}
    for row in read_table(output / "midtrain", "conversations").to_pylist():
        was = by_text[row["response"]]
        for name in ("teacher", "sample_index", "verdict", "source", "domain"):
            assert row[name] == was[name]
        assert row["repetition"] == pytest.approx(repetition(row["response"]))
    pairs = read_table(output / "pairs", "pairs").to_pylist()
    assert len(pairs) == 2
    for row in pairs:
        for side in ("chosen", "rejected"):
            was = by_text[row[side]]
            for name in ("teacher", "sample_index", "verdict"):
                assert row[f"{side}_{name}"] == was[name]
            assert row[f"{side}_repetition"] == pytest.approx(repetition(row[side]))


def kinds(rng: random.Random, count: int) -> tuple[Kinds, list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = [
        {
            "domain": rng.choice([None, "algebra", "geometry"]),
            "source": rng.choice(["one", "two"]),
            "difficulty": rng.randrange(len(DIFFICULTIES) + 1),
            "length": rng.randrange(3),
            "order": number * 7919 % 1009,
        }
        for number in range(count)
    ]
    arrays = Kinds(
        order=np.array([row["order"] for row in rows], np.uint64),
        domain=np.array([label_hash(row["domain"]) for row in rows], np.uint64),
        source=np.array([label_hash(row["source"]) for row in rows], np.uint64),
        difficulty=np.array([row["difficulty"] for row in rows], np.uint8),
        length=np.array([row["length"] for row in rows], np.uint8),
    )
    return arrays, rows


@pytest.mark.parametrize("seed", range(10))
def test_caps_are_applied_row_by_row_and_the_rest_is_balanced(seed: int) -> None:
    rng = random.Random(seed)
    arrays, rows = kinds(rng, 200)
    caps = (
        Cap(by="source", value="one", rows=40),
        Cap(by="domain", rows=30),
        Cap(by="difficulty", value="college", rows=3),
    )
    fates = chosen_fates(arrays, caps=caps, balance=("domain", "source"), size=50).tolist()
    left = list(range(len(rows)))
    for cap in caps:
        counts: Counter[Any] = Counter()
        dropped = set()
        for place in sorted(left, key=lambda place: rows[place]["order"]):
            label = rows[place][cap.by]
            wanted = DIFFICULTIES.index(cap.value) if cap.by == "difficulty" else cap.value
            if cap.value is None or label == wanted:
                counts[label] += 1
                if counts[label] > cap.rows:
                    dropped.add(place)
        left = [place for place in left if place not in dropped]
    assert {place for place, fate in enumerate(fates) if fate == Fate.CAPPED} == set(range(len(rows))) - set(left)
    cells = Counter((rows[place]["domain"], rows[place]["source"]) for place in left)
    kept = Counter((rows[p]["domain"], rows[p]["source"]) for p, fate in enumerate(fates) if fate == Fate.KEPT)
    assert sum(kept.values()) == 50
    # Max-min fair: whoever lost a row is at most one below the largest.
    assert all(kept[cell] == cells[cell] or kept[cell] >= max(kept.values()) - 1 for cell in cells)


def test_a_size_of_pairs_is_kept_and_counted(repository: Path, tmp_path: Path) -> None:
    rows = [
        verdict(
            2 * n + side,
            f"p{n}",
            f"so {n} \\boxed{{{4 + side}}}",
            ("correct", "wrong")[side],
            source=["a", "b"][n % 3 == 0],
        )
        for n in range(12)
        for side in range(2)
    ]
    output = curated(
        *(repository, verdicts_of(tmp_path / "verdicts", rows), tmp_path / "curated"),
        *("midtrain=null", "sft=null", "prompts=null", "pairs.size=6", "pairs.balance=[source]"),
        "pairs.caps=[{by: source, value: a, rows: 4}]",
    )
    pairs = read_table(output / "pairs", "pairs")
    assert Counter(pairs["source"].to_pylist()) == {"a": 3, "b": 3}
    counts = read_manifest(output / "pairs", "pairs").counts
    # Of 8 pairs of source a four are over the cap, and of four and four left a balance of six takes three each.
    assert (counts["dropped: over a cap"], counts["dropped: balance"]) == (8, 4)


def test_a_cap_on_no_difficulty_is_refused(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a difficulty is one of"):
        curated(repository, tmp_path, tmp_path, "sft.caps=[{by: difficulty, value: hard, rows: 1}]")


def test_the_presets_curate_for_the_stages_of_their_name(repository: Path) -> None:
    conf = repository / "conf"
    places = ["base=b", "tokenizer=t"]
    for name, rollouts in (("paper", "paper"), ("tiny", "tiny-rollouts"), ("smollm2", "smollm2-rollouts")):
        first, second = (load_config(CurateConfig, conf / "curate" / f"{one}.yaml", []) for one in (name, rollouts))
        pack = load_config(PackConfig, conf / "pack" / f"{name}.yaml", places[1:])
        sft = load_config(SFTConfig, conf / "sft" / f"{name}.yaml", places[:1])
        dpo = load_config(DPOConfig, conf / "dpo" / f"{name}.yaml", places[:1])
        grpo = load_config(GRPOConfig, conf / "grpo" / f"{name}.yaml", places[:1])
        assert first.midtrain is not None
        assert first.sft is not None
        assert second.pairs is not None
        assert second.prompts is not None
        assert first.midtrain.max_tokens == pack.sequence_length
        assert first.sft.max_tokens == sft.sequence_length
        assert second.pairs.max_tokens == dpo.sequence_length
        assert second.prompts.max_tokens == grpo.sequence_length - grpo.max_new_tokens
