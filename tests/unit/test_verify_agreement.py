"""Agreement with recorded labels, row by row: what differs has been looked at, and nothing else may differ.

tests/golden/graded_rollouts_adjudication.json classifies every disagreement by a hash of (gold, extracted answer,
verdict): "label" (the recorded label is wrong), "undecidable" (the gold answer was mangled by its source, such as a
vector whose row separators are gone), "ours" (a person would have accepted it and the grader does not).
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

from phimr_nemo.data.synthetic.problems import generate_problems
from phimr_nemo.data.synthetic.teacher import teacher_rollouts
from phimr_nemo.store.content import content_id
from phimr_nemo.verify import Grader, Verdict
from phimr_nemo.verify.extract import gold_answer

MIN_DECIDED_AGREEMENT = 0.9985
MIN_GOLDS = 5000
EXTRACTED_CHARS = 200
"""The hashes are of this many characters of an extracted answer."""


def grade_all(pairs: list[tuple[str, str]]) -> list[Verdict]:
    with Grader(workers=2) as grader:
        return grader.grade_many(pairs)


def test_agreement_with_the_graded_rollouts(shared_data: Path, repository: Path) -> None:
    with gzip.open(shared_data / "rollouts" / "graded_rollouts.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    golden = json.loads((repository / "tests" / "golden" / "graded_rollouts_adjudication.json").read_text("utf-8"))
    adjudicated = {identity: name for name, identities in golden.items() for identity in identities}
    counts: Counter[str] = Counter()
    unknown = []
    for row, verdict in zip(rows, grade_all([(row["response"], row["gold"]) for row in rows]), strict=True):
        if (verdict.verdict == "correct") == row["correct"]:
            continue
        extracted = verdict.extracted[:EXTRACTED_CHARS]
        name = adjudicated.get(content_id(row["gold"], extracted, verdict.verdict), "unknown")
        counts[name] += 1
        if name == "unknown":
            unknown.append((row["gold"], extracted, verdict))
    assert not unknown
    decided = len(rows) - counts["undecidable"]
    assert 1 - counts["ours"] / decided >= MIN_DECIDED_AGREEMENT
    assert counts["label"] < len(rows) // 20


def test_agreement_with_the_graded_gsm8k_solutions_is_complete(shared_data: Path) -> None:
    pairs, labels = [], []
    for line in (shared_data / "rollouts" / "gsm8k_model_solutions.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        for value in row.values():
            if isinstance(value, dict):
                pairs.append((value["solution"], row["ground_truth"]))
                labels.append(value["is_correct"])
    verdicts = [verdict.verdict == "correct" for verdict in grade_all(pairs)]
    assert len(labels) == 5276
    assert verdicts == labels


def published_golds(problems: Path) -> list[str]:
    """Every different final answer in a directory of published problems."""
    rows: list[dict[str, Any]] = []
    for path in sorted(problems.iterdir()):
        text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if ".jsonl" in path.suffixes:
            rows += [json.loads(line) for line in text.splitlines()]
        else:
            read = json.loads(text)
            rows += read if isinstance(read, list) else next(iter(read.values()))
    found = [str(row.get("answer", row.get("Answer", row.get("solution")))) for row in rows]
    return sorted({gold for gold in map(gold_answer, found) if gold})


def test_every_published_answer_equals_itself(shared_data: Path) -> None:
    golds = published_golds(shared_data / "problems")
    assert len(golds) >= MIN_GOLDS
    verdicts = grade_all([(rf"\boxed{{{gold}}}", gold) for gold in golds])
    assert [gold for gold, verdict in zip(golds, verdicts, strict=True) if verdict.verdict != "correct"] == []


def test_the_programmatic_teacher_is_graded_as_it_meant() -> None:
    """The project's own teacher: without mistakes always correct; with a mistake each time wrong or no answer."""
    problems = generate_problems(5, 40, "train")
    names = []
    for mistake_rate in (0.0, 1.0):
        rollouts = teacher_rollouts(problems, 1, 0, mistake_rate).to_pylist()
        names.append({verdict.verdict for verdict in grade_all([(r["response"], r["answer"]) for r in rollouts])})
    assert names == [{"correct"}, {"wrong", "unparsable"}]
