"""The whole recipe on GSM8K with recorded solutions, right and wrong: on a file written here and on the real one.

A few steps a stage with a model of 40 K parameters: the scores are those of noise, the files are what is looked at.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from warm_phimr import run_steps

from phimr_nemo.data.chat import load_tokenizer, render_prompt, stop_token_ids
from phimr_nemo.data.repetition import REPETITIVE_ABOVE, repetition
from phimr_nemo.jobs.steps.step import Step
from phimr_nemo.store.records import Kind
from phimr_nemo.store.runs import RunDirectory, read_metrics
from phimr_nemo.store.shards import read_manifest, read_table

pytestmark = pytest.mark.slow

MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
WRITTEN_ROWS, REAL_ROWS, ASKED = 24, 80, 8
MOST = 2
"""Right solutions of one problem in mid-training."""

REAL_AGREEMENT = 0.99
"""Of our verdicts with the labels of the published file, which are not all right."""

TRAINED = {
    "midtrain": small.MIDTRAIN_STEPS,
    "sft": small.SFT_STEPS,
    "dpo": small.DPO_STEPS,
    "grpo": small.GRPO_STEPS,
}


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        recorded: the file of recorded solutions.
        test: the file of test problems.
        rows: how many rows of `recorded` were read.
        agreement: the least share of verdicts that agree with the file's labels.
    """

    root: Path
    steps: list[Step]
    recorded: Path
    test: Path
    rows: int
    agreement: float

    def labels(self) -> dict[tuple[str, str, str], bool]:
        """(question, model, solution) -> the file's own label."""
        lines = self.recorded.read_text("utf-8").splitlines()[: self.rows]
        return {
            (row["question"], name, row[name]["solution"]): row[name]["is_correct"]
            for row in map(json.loads, lines)
            for name in MODELS
        }


def write_recorded(path: Path, count: int) -> None:
    """Word problems in the layout of OpenAI's recorded GSM8K solutions; the models are right half of the time."""
    random_numbers = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            boxes, pens, price = (random_numbers.randint(2, 60) for _ in range(3))
            total = boxes * pens * price
            row: dict[str, Any] = {
                "question": f"A shop has {boxes} boxes of {pens} pens at ${price} each. What are all pens worth?",
                "ground_truth": f"There are {boxes}*{pens} pens.\nThey are worth ${total:,}.\nA: {total:,}",
            }
            for number, name in enumerate(MODELS):
                answer = total if random_numbers.random() < 0.5 else total + random_numbers.randint(1, 9)
                row[name] = {
                    "is_correct": answer == total,
                    "solution": f"{boxes}*{pens} = <<{boxes}*{pens}={boxes * pens}>>{boxes * pens} pens\n"
                    f"{'So ' * number}{boxes * pens}*{price} = {answer}\nA: {answer}",
                }
            file.write(json.dumps(row) + "\n")


def write_problems(path: Path, count: int) -> None:
    """Word problems in GSM8K's own layout."""
    rows = [
        {"question": f"Ann has {i} nuts and finds {7 * i}. How many has she?", "answer": f"{i}+{7 * i}\n#### {8 * i}"}
        for i in range(1, count + 1)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def plan(root: Path, recorded: Path, test: Path, rows: int, length: int) -> list[Step]:
    def step(name: str, stage: str, *overrides: str) -> Step:
        output = root / name
        return Step(name, (stage, "--config", f"conf/{stage}/tiny.yaml", f"run.output={output}", *overrides), output)

    def model(name: str) -> str:
        return str(root / name / "hf")

    sets = root / "curated"
    teacher = ("problems=null", "teacher.kind=recorded", f"teacher.path={recorded}", f"teacher.limit={rows}")
    sets_of_this_test = (
        *(
            f"midtrain.max_per_problem={MOST}",
            "sft.max_per_problem=1",
            f"sft.max_repetition={REPETITIVE_ABOVE}",
            "sft.max_tokens=null",
        ),
        *("pairs.mode=near_miss", "pairs.nearness=common_steps", "pairs.max_per_problem=2"),
        *("prompts.min_pass=0", "prompts.max_pass=1", "prompts.hard_below=0.5", "prompts.min_samples=2"),
    )
    longest = f"sequence_length={length}"
    problems = ("problems.kind=file", f"problems.path={test}", f"problems.limit={ASKED}", "samples=1")
    stages = [f"stages.{name}={root / name}" for name in TRAINED]
    return [
        step("base", "base", *small.BASE),
        step("rollouts", "generate", *teacher),
        step("verdicts", "verify", f"rollouts={root / 'rollouts'}"),
        step("curated", "curate", f"verdicts={root / 'verdicts'}", *sets_of_this_test),
        step("rows", "pack", f"conversations={sets / 'midtrain'}", f"tokenizer={model('base')}", longest),
        step("midtrain", "midtrain", f"base={model('base')}", f"data={root / 'rows'}", *small.MIDTRAIN, longest),
        step("sft", "sft", f"base={model('midtrain')}", f"data={sets / 'sft'}", *small.SFT, longest),
        step("dpo", "dpo", f"base={model('sft')}", f"pairs={sets / 'pairs'}", *small.DPO, longest),
        step("grpo", "grpo", f"base={model('dpo')}", f"prompts={sets / 'prompts'}", *small.GRPO, longest),
        step("evaluation", "evaluate", f"model={model('grpo')}", *problems, *small.EVALUATE),
        step("release", "export", f"model={model('grpo')}", *stages, f"evaluations.GRPO={root / 'evaluation'}"),
    ]


@pytest.fixture(scope="module", params=["written here", "published"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("gsm8k")
    if request.param == "published":
        data: Path = request.getfixturevalue("shared_data")
        recorded = data / "rollouts" / "gsm8k_model_solutions.jsonl"
        test = data / "problems" / "gsm8k_test.jsonl"
        rows, length, agreement = REAL_ROWS, 1024, REAL_AGREEMENT
    else:
        recorded, test = root / "recorded.jsonl", root / "test.jsonl"
        write_recorded(recorded, WRITTEN_ROWS)
        write_problems(test, 2 * ASKED)
        rows, length, agreement = WRITTEN_ROWS, 512, 1.0
    steps = plan(root / "run", recorded, test, rows, length)
    run_steps(steps)
    return Run(root / "run", steps, recorded, test, rows, agreement)


def rows_of(directory: Path, kind: Kind) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_table(directory, kind).to_pylist()
    return rows


def graded(run: Run) -> list[dict[str, Any]]:
    return rows_of(run.root / "verdicts", "verdicts")


def test_every_recorded_solution_becomes_a_graded_rollout(run: Run) -> None:
    labels, verdicts = run.labels(), graded(run)
    assert len(verdicts) == run.rows * len(MODELS)
    assert {(row["question"], row["teacher"], row["response"]) for row in verdicts} == labels.keys()
    agree = [
        (row["verdict"] == "correct") == labels[row["question"], row["teacher"], row["response"]] for row in verdicts
    ]
    assert sum(agree) >= run.agreement * len(agree)
    assert {"correct", "wrong"} <= {row["verdict"] for row in verdicts}


def test_the_rollouts_name_the_file_that_they_come_from(run: Run) -> None:
    inputs = read_manifest(run.root / "rollouts", "rollouts").inputs
    assert inputs["teacher.path"] == small.sha256(run.recorded)


def test_sft_keeps_problems_of_unknown_difficulty(run: Run) -> None:
    """GSM8K says nothing of difficulty: of each problem the longest right response that does not repeat itself."""
    longest: dict[str, int] = {}
    for row in graded(run):
        if row["verdict"] == "correct" and repetition(row["response"]) <= REPETITIVE_ABOVE:
            longest[row["problem_id"]] = max(longest.get(row["problem_id"], 0), len(row["response"]))
    rows = rows_of(run.root / "curated" / "sft", "conversations")
    assert {row["difficulty"] for row in rows} == {None}
    assert {row["problem_id"]: len(row["response"]) for row in rows} == longest
    assert len(rows) == len(longest)


def test_mid_training_has_every_right_solution_once_up_to_its_limit(run: Run) -> None:
    right = {(row["problem_id"], row["response"]) for row in graded(run) if row["verdict"] == "correct"}
    by_problem: dict[str, int] = {}
    for problem, _ in right:
        by_problem[problem] = by_problem.get(problem, 0) + 1
    rows = rows_of(run.root / "curated" / "midtrain", "conversations")
    kept = [(row["problem_id"], row["response"]) for row in rows]
    assert len(kept) == len(set(kept)) == sum(min(count, MOST) for count in by_problem.values())
    assert set(kept) <= right


def test_pairs_are_a_right_and_a_wrong_solution_of_one_question(run: Run) -> None:
    verdict = {(row["question"], row["response"]): row["verdict"] for row in graded(run)}
    pairs = rows_of(run.root / "curated" / "pairs", "pairs")
    assert pairs
    for pair in pairs:
        assert verdict[pair["question"], pair["chosen"]] == "correct"
        assert verdict[pair["question"], pair["rejected"]] in ("wrong", "unparsable")


def test_prompts_are_questions_with_right_and_wrong_solutions(run: Run) -> None:
    marks: dict[str, list[bool]] = {}
    for row in graded(run):
        marks.setdefault(row["question"], []).append(row["verdict"] == "correct")
    expected = {question: sum(m) / len(m) for question, m in marks.items() if 0 < sum(m) < len(m)}
    prompts = rows_of(run.root / "curated" / "prompts", "prompts")
    assert {row["question"]: row["pass_rate"] for row in prompts} == expected
    assert all(row["hard"] == (row["pass_rate"] < 0.5) for row in prompts)


def test_the_packed_tokens_are_counted(run: Run) -> None:
    rows = rows_of(run.root / "rows", "rows")
    counts = read_manifest(run.root / "rows", "rows").counts
    assert sum(len(row["input_ids"]) for row in rows) == counts["tokens"]
    assert sum(len(row["document_lengths"]) for row in rows) == counts["documents"]
    dropped = sum(count for name, count in counts.items() if name.startswith("dropped"))
    assert counts["documents"] + dropped == read_manifest(run.root / "curated" / "midtrain", "conversations").rows


@pytest.mark.parametrize("name", TRAINED)
def test_every_stage_trained_and_left_a_model_that_transformers_loads(name: str, run: Run) -> None:
    from transformers import Phi3ForCausalLM

    metrics = list(read_metrics(run.root / name))
    assert [row["step"] for row in metrics if "loss" in row or "reward" in row] == list(range(1, TRAINED[name] + 1))
    assert all(math.isfinite(value) for row in metrics for value in row.values())
    model = Phi3ForCausalLM.from_pretrained(run.root / name / "hf", trust_remote_code=False)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_the_release_answers_a_question_of_the_test_file(run: Run) -> None:
    from transformers import Phi3ForCausalLM

    release = run.root / "release" / "hf"
    tokenizer, model = load_tokenizer(release), Phi3ForCausalLM.from_pretrained(release)
    question = json.loads(run.test.read_text("utf-8").splitlines()[0])["question"]
    prompt = torch.tensor([render_prompt(tokenizer, question)])
    written = model.generate(prompt, max_new_tokens=4, do_sample=False)[0, prompt.shape[1] :].tolist()
    assert len(written) == 4 or written[-1] in stop_token_ids(tokenizer)
    assert model.generation_config.eos_token_id == list(stop_token_ids(tokenizer))


def test_evaluation_asks_the_first_questions_of_the_test_file(run: Run) -> None:
    lines = [json.loads(line) for line in run.test.read_text("utf-8").splitlines()[:ASKED]]
    verdicts = rows_of(run.root / "evaluation" / "verdicts", "verdicts")
    assert [row["question"] for row in verdicts] == [line["question"] for line in lines]
    answers = [line["answer"].rpartition("#### ")[2].replace(",", "") for line in lines]
    assert [row["answer"] for row in verdicts] == answers
    result = json.loads((run.root / "evaluation" / "results.json").read_text())
    assert (result["questions"], result["samples"]) == (ASKED, 1)
    assert result["pass1"] == sum(row["verdict"] == "correct" for row in verdicts) / ASKED


def test_everything_is_done_and_a_second_run_changes_nothing(run: Run) -> None:
    assert all(RunDirectory(step.output).is_done for step in run.steps)
    assert not [path for path in run.root.rglob("*") if path.suffix == ".tmp"]
    before = small.times(run.root)
    small.run_again(run.steps)
    assert small.times(run.root) == before
