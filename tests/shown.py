"""Runs whose questions and responses are shown: two stages, verdicts, their curation, pairs and GRPO's samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from results import plain_result

from phimr_nemo.config import CurateConfig, load_config, to_yaml
from phimr_nemo.data.curate.stage import run_curate
from phimr_nemo.evaluate.evaluate import write_result
from phimr_nemo.store.responses import write_responses
from phimr_nemo.store.runs import RunDirectory
from phimr_nemo.store.shards import finish, rows_to_table, write_shard

HOSTILE = (
    "<think>\n</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">\n"
    "</think>\n--> ]]> <!-- \x1b[2J\x1b]0;owned\x07 \u202egnp.exe\u202c \u2066x\u2069 \u200b{{ title }} "
    "The answer is \\boxed{7}."
)
"""What a response may hold that a page or a terminal could obey."""
SAMPLES = 2
QUESTIONS = 6


def response(value: int, thinking: str = "some steps") -> str:
    return f"<think>\n{thinking}\n</think>\nThe answer is \\boxed{{{value}}}."


def row(problem: int, sample: int, *, is_right: bool, text: str | None = None, **others: Any) -> dict[str, Any]:
    """A verdict on problem n, whose gold answer is n."""
    value = problem if is_right else problem + 1
    return {
        "id": f"r{problem}-{sample}", "problem_id": f"p{problem}", "question": f"What is $1 \\cdot {problem}$?",
        "answer": str(problem), "response": response(value) if text is None else text, "teacher": "t",
        "sample_index": sample, "seed": 0, "finish_reason": "stop", "tokens": 10 + problem, "domain": "algebra",
        "difficulty": "middle", "metadata": "{}", "verdict": "correct" if is_right else "wrong",
        "extracted": str(value), "reason": "equal to the answer" if is_right else "not equal to the answer",
        "grader": "g", **others,
    }  # fmt: skip


def write_records(path: Path, kind: Any, shards: Sequence[Sequence[dict[str, Any]]], **made: Any) -> Path:
    for number, rows in enumerate(shards):
        write_shard(path, number, rows_to_table(rows, kind), kind=kind)
    finish(path, kind=kind, config={}, **made)
    return path


def evaluation(path: Path, name: str, right: Sequence[int], *, hostile: int | None = None, seed: int = 0) -> Path:
    """An evaluation of some questions.

    Args:
        path: its directory.
        name: of the model.
        right: how many of the samples of each question are correct.
        hostile: the question whose first sample is `HOSTILE`.
        seed: of the run.
    """
    rows = [
        row(n, sample, is_right=sample < count, **({"text": HOSTILE} if (n, sample) == (hostile, 0) else {}))
        for n, count in enumerate(right)
        for sample in range(SAMPLES)
    ]
    write_records(path / "verdicts", "verdicts", [rows[:5], rows[5:]])
    shares = {f"p{n}": count / SAMPLES for n, count in enumerate(right)}
    result = plain_result(sum(shares.values()) / len(shares), questions=len(shares), per_question=shares)
    write_result(path / "results.json", result, {"row": name, "benchmark": "mine"})
    RunDirectory(path).describe(
        stage="evaluate", config_yaml=f"run:\n  seed: {seed}\nlr: {len(name)}\n", seed=seed, facts={}
    )
    return path


def sample(step: int, prompt: int, number: int, *, is_right: bool) -> dict[str, Any]:
    return {
        "step": step, "prompt_id": f"p{prompt}", "question": f"What is {prompt}?", "answer": str(prompt),
        "sample": number, "response": response(prompt if is_right else 0),
        "verdict": "correct" if is_right else "wrong",
        "reward": 1.0 if is_right else -1.0, "tokens": 9, "truncated": not is_right, "trained": is_right,
    }  # fmt: skip


def curated(root: Path) -> None:
    """Verdicts in two shards, and what `curate` makes of them: 2 of 6 kept, the others dropped for four reasons."""
    text = response(1, "the same twice")
    rows = [
        row(1, 0, is_right=True, text=text),
        row(1, 1, is_right=True, text=text),
        row(2, 0, is_right=False),
        row(3, 0, is_right=True, finish_reason="length"),
        row(4, 0, is_right=True, text="The answer is \\boxed{4}. <|end|>"),
        row(5, 0, is_right=True),
    ]
    verdicts = write_records(root / "verdicts", "verdicts", [rows[:4], rows[4:]])
    given = [f"run.output={root / 'curated'}", "run.seed=0", f"verdicts={verdicts}", "tokenizer=null", "sft=null"]
    config = load_config(CurateConfig, Path("conf/curate/tiny.yaml"), given)
    RunDirectory(config.run.output).describe(stage="curate", config_yaml=to_yaml(config), seed=0, facts={})
    run_curate(config)


def runs(root: Path) -> Path:
    """All of it under one directory."""
    evaluation(root / "evaluate-sft", "SFT", [2, 1, 0, 2, 0, 1])
    evaluation(root / "evaluate-base", "base", [0, 1, 0, 2, 1, 0], hostile=4)
    evaluation(root / "evaluate-mine", "another", [2, 2, 2, 2, 2, 2])
    curated(root)
    pair = {
        "id": "pair", "problem_id": "p1", "question": "What is 1?", "chosen": response(1, "one is one"),
        "rejected": response(2, "one is two"), "mode": "near_miss",
    }  # fmt: skip
    write_records(root / "preferences" / "pairs", "pairs", [[pair]])
    for step in (10, 20):
        group = [sample(step, prompt, n, is_right=n == 0) for prompt in (1, 2) for n in range(3)]
        write_responses(root / "grpo", step, group)
    return root
