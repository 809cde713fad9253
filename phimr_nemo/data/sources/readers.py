"""The readers behind :mod:`phimr_nemo.data.sources.presets`, each for the columns of one published set."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from phimr_nemo.data.sources.cells import (
    ASSISTANT_ROLES,
    USER_ROLES,
    answer_text,
    labels_of,
    lookup,
    question_text,
    sequence,
    split_final_line,
    turn_text,
)
from phimr_nemo.data.sources.damage import shows_picture
from phimr_nemo.data.sources.item import Item, Trajectory, UnusableRow
from phimr_nemo.data.sources.labels import TAL_DIFFICULTY, domain_of, origin_difficulty
from phimr_nemo.data.sources.problems import difficulty_of
from phimr_nemo.data.sources.rawfiles import Row
from phimr_nemo.data.sources.recorded import NO_TEXT, think_tagged
from phimr_nemo.data.sources.wrapping import without_instructions
from phimr_nemo.text.thinking import with_thinking
from phimr_nemo.verify.extract import last_box

DEEPSEEK_R1: Final = "deepseek-r1"
QWQ: Final = "qwq-32b"
DEEPMATH_SOLUTIONS: Final = (1, 2, 3)
NO_ANSWER: Final = "no answer"
NOT_MATHEMATICS: Final = "not mathematics"

MATHEMATICS: Final = frozenset(("math", "maths", "mathematics"))
# Files are untrusted: patterns with a choice of where to end see no more than so many last characters.
TAIL_CHARS: Final = 2_000
_METAMATH_ANSWER: Final = re.compile(r"[Tt]he answer is:?\s*([^\n]+?)\.?\s*\Z")
_INSTRUCT_ANSWER: Final = re.compile(r"[Tt]he (?:final |correct )?(?:answer|option) is:?\s*\(?([^\n]+?)\)?\.?\s*\Z")
_PROGRAM: Final = re.compile(r"^(?:import |from \w+ import |def |print\()", re.MULTILINE)
_OPTION_LETTER: Final = re.compile(r"\A\(?([A-Z])\s*[).:]\s*")


def openr1_math(row: Row) -> Item:
    """OpenR1-Math-220k: NuminaMath 1.5's questions with two or more generations of DeepSeek-R1 each."""
    item = numina_math(row)
    verdicts: dict[str, Sequence[Any]] = {
        "correctness_math_verify": sequence(row.get("correctness_math_verify")),
        "correctness_llama": sequence(row.get("correctness_llama")),
        "is_reasoning_complete": sequence(row.get("is_reasoning_complete")),
    }
    reasons = sequence(row.get("finish_reasons"))
    trajectories = []
    generations = sequence(row["generations"])
    for index, response in enumerate(generations):
        if not isinstance(response, str) or not response.strip():
            continue
        labels = {name: values[index] for name, values in verdicts.items() if index < len(values)}
        # Rows without finish_reasons tell by the thinking that never ended.
        reason = reasons[index] if index < len(reasons) else None
        cut = reason == "length" or (reason is None and labels.get("is_reasoning_complete") is False)
        trajectories.append(Trajectory(response, DEEPSEEK_R1, "length" if cut else "stop", labels))
    lost = (NO_TEXT,) * (len(generations) - len(trajectories))
    return replace(_with_trajectories(item, trajectories), lost=lost)


def openthoughts(row: Row) -> Item:
    """OpenThoughts-114k: the `metadata` subset, open-r1's `-math` edition, or the ShareGPT default subset."""
    if "deepseek_reasoning" in row:
        if str(row["domain"]).lower() not in MATHEMATICS:
            raise UnusableRow(NOT_MATHEMATICS)
        response = with_thinking(_text(row["deepseek_reasoning"]), _text(row["deepseek_solution"]), gap="\n\n")
        gold = _text(row["ground_truth_solution"])
        trajectory = Trajectory(response, DEEPSEEK_R1)
        return _answered_by(_text(row["problem"]), gold, trajectory, {"source": row.get("source")})
    if "problem" in row and "solution" in row:
        trajectory = Trajectory(
            think_tagged(turn_text(row["conversations"], ASSISTANT_ROLES)),
            DEEPSEEK_R1,
            labels={"correct": row.get("correct")},
        )
        return _answered_by(_text(row["problem"]), _text(row["solution"]), trajectory, {"source": row.get("source")})
    return openthoughts3(row) if "domain" in row else sharegpt(row)


def openthoughts3(row: Row) -> Item:
    """OpenThoughts3-1.2M: 16 responses of QwQ-32B to a question, a row each; nobody tells an answer."""
    if str(row["domain"]).lower() not in MATHEMATICS:
        raise UnusableRow(NOT_MATHEMATICS)
    conversation = row["conversations"]
    return Item(
        question=without_instructions(turn_text(conversation, USER_ROLES)),
        answer="",
        difficulty=difficulty_of(row.get("difficulty")),
        labels=labels_of(row, ("source", "difficulty")),
        trajectories=(Trajectory(turn_text(conversation, ASSISTANT_ROLES), QWQ),),
    )


def sharegpt(row: Row) -> Item:
    """Bespoke-Stratos-17k and OpenThoughts' default subset: a conversation and no other answer than its own."""
    conversation = row["conversations"]
    question = turn_text(conversation, USER_ROLES)
    response = think_tagged(turn_text(conversation, ASSISTANT_ROLES))
    return _answered_by(question, "", Trajectory(response, DEEPSEEK_R1), {})


def numina_math(row: Row) -> Item:
    """NuminaMath-1.5 (with `answer`) and NuminaMath-CoT (the answer is the solution's last box)."""
    if row.get("question_type") == "proof":
        raise UnusableRow("a proof")
    for name in ("problem_is_valid", "solution_is_valid"):
        if row.get(name) not in (None, "", "Yes"):
            raise UnusableRow(f"{name} is not Yes")
    solution = _text(row.get("solution"))
    answer = _text(row["answer"]) if "answer" in row else last_box(solution) or ""
    if not answer:
        raise UnusableRow(NO_ANSWER)
    names = ("source", "problem_type", "question_type", "synthetic", "uuid")
    return Item(
        question=_text(row["problem"]),
        answer=answer,
        solution=solution or None,
        domain=domain_of(row.get("problem_type")),
        difficulty=origin_difficulty(row.get("source")),
        labels=labels_of(row, names),
    )


def big_math(row: Row) -> Item:
    """Big-Math-RL-Verified; the solve rate of Llama-3.1-8B stays in the labels."""
    return Item(
        question=_text(row["problem"]),
        answer=_text(row["answer"]),
        domain=domain_of(row["domain"]),
        difficulty=origin_difficulty(row.get("source")),
        labels=labels_of(row, ("source", "domain", "llama8b_solve_rate")),
    )


def omni_math(row: Row) -> Item:
    """Omni-MATH; its difficulty is on AoPS's scale from 1 to 10."""
    return Item(
        question=_text(row["problem"]),
        answer=_text(row["answer"]),
        solution=_text(row["solution"]) or None,
        domain=domain_of(row["domain"]),
        difficulty=difficulty_of(row["difficulty"]),
        labels=labels_of(row, ("source", "domain", "difficulty")),
    )


def deepmath(row: Row) -> Item:
    """DeepMath-103K: three responses of DeepSeek-R1 to a question; its difficulty is on AoPS's scale."""
    responses = [_text(row.get(f"r1_solution_{number}")) for number in DEEPMATH_SOLUTIONS]
    return Item(
        question=_text(row["question"]),
        answer=_text(row["final_answer"]),
        domain=domain_of(row["topic"]),
        difficulty=difficulty_of(row["difficulty"]),
        labels=labels_of(row, ("topic", "difficulty")),
        trajectories=tuple(Trajectory(response, DEEPSEEK_R1) for response in responses if response),
        lost=(NO_TEXT,) * sum(not response for response in responses),
    )


def olympiad_bench(row: Row) -> Item:
    """OlympiadBench, the open-ended text questions: lists of solutions and final answers, a unit beside them."""
    if row.get("modality") == "Multimodal" or row.get("image_1") is not None or shows_picture(_text(row["question"])):
        raise UnusableRow("an image")
    if row.get("subject", "Math") not in ("Math", "Maths", None):
        raise UnusableRow(NOT_MATHEMATICS)
    answers = [_without_dollars(_text(answer)) for answer in sequence(row["final_answer"])]
    solutions = [_text(solution) for solution in sequence(row["solution"])]
    context = _text(row.get("context"))
    return Item(
        question=f"{context}\n\n{_text(row['question'])}" if context else _text(row["question"]),
        answer=", ".join(answer for answer in answers if answer),
        solution="\n\n".join(solution for solution in solutions if solution) or None,
        domain=domain_of(row["subfield"]),
        difficulty="high_school" if "cee" in str(row.get("source", "")).lower() else "college",
        labels=labels_of(row, ("id", "subfield", "difficulty", "answer_type", "unit", "error", "is_multiple_answer")),
    )


def metamath_qa(row: Row) -> Item:
    """MetaMathQA: rephrased GSM8K and MATH with GPT-3.5's solution, which ends in "The answer is: ..."."""
    response = _text(row["response"])
    found = _METAMATH_ANSWER.search(response[-TAIL_CHARS:])
    if found is None:
        raise UnusableRow(NO_ANSWER)
    return Item(
        question=_text(row["query"]),
        answer=_without_dollars(found[1].strip()),
        solution=response,
        difficulty="elementary" if str(row["type"]).startswith("GSM") else None,
        labels=labels_of(row, ("type", "original_question")),
    )


def math_instruct(row: Row) -> Item:
    """MathInstruct's chains of thought; its programs of thought answer by running code and are left out."""
    output, source = _text(row["output"]), str(row.get("source", ""))
    if "/PoT/" in source or _PROGRAM.search(output):
        raise UnusableRow("a program")
    found = _INSTRUCT_ANSWER.search(output[-TAIL_CHARS:])
    answer = last_box(output) or (found[1].strip() if found else "")
    if not answer:
        split = split_final_line(output)
        answer = split[1] if split else ""
    origin = source.rpartition("/")[2].removesuffix(".json")
    known = next((name for name in ("gsm", "aqua_rat", "TheoremQA") if name in origin), "")
    return Item(
        question=_text(row["instruction"]),
        answer=_without_dollars(answer),
        solution=output,
        difficulty=origin_difficulty("gsm8k" if known == "gsm" else known),
        labels=labels_of(row, ("source",)),
    )


def aqua_rat(row: Row) -> Item:
    """AQuA-RAT: GMAT and GRE questions with options ["A)21", ...] and the right letter."""
    options = [_text(option) for option in sequence(row["options"])]
    return Item(
        question="\n".join(
            [_text(row["question"]), *(_OPTION_LETTER.sub(r"(\1) ", option, 1) for option in options)]
        ),
        answer=_text(row["correct"]),
        solution=_text(row["rationale"]) or None,
        difficulty=origin_difficulty("aqua_rat"),
        labels={"options": len(options)},
    )


def ape210k(row: Row) -> Item:
    """Ape210K (`original_text`, `ans`, in Chinese) and its edition in Calc-X (`question` in English, `result`)."""
    original = "original_text" in row
    return Item(
        question=_text(row["original_text" if original else "question"]),
        answer=_text(row["ans" if original else "result"]),
        domain="arithmetic",
        difficulty=origin_difficulty("ape210k"),
        labels=labels_of(row, ("id", "equation")),
    )


def tal_scq5k(row: Row) -> Item:
    """TAL-SCQ5K: options as [[{"aoVal": "A", "content": "$$3$$ "}], ...], a letter, a list of analyses."""
    options = []
    for group in sequence(row["answer_option_list"]):
        options += [option for option in (group if isinstance(group, list) else [group]) if isinstance(option, dict)]
    lines = [f"({_text(option.get('aoVal'))}) {_text(option.get('content'))}" for option in options]
    analyses = [_text(analysis) for analysis in sequence(row.get("answer_analysis"))]
    routes = sequence(row.get("knowledge_point_routes"))
    return Item(
        question="\n".join([_text(row["problem"]), *lines]),
        answer=_text(row["answer_value"]),
        solution="\n\n".join(analysis for analysis in analyses if analysis) or None,
        domain=domain_of(list(routes)),
        difficulty=TAL_DIFFICULTY.get(_text(row.get("difficulty"))),
        labels=labels_of(row, ("queId", "difficulty")) | {"knowledge_point": str(routes[0]) if routes else None},
    )


def gsm8k(row: Row) -> Item:
    """GSM8K: a worked answer that ends in "#### 18"."""
    split = split_final_line(_text(row["answer"]))
    if split is None:
        raise UnusableRow(NO_ANSWER)
    return Item(_text(row["question"]), split[1], solution=split[0], difficulty=origin_difficulty("gsm8k"))


def math(row: Row) -> Item:
    """MATH in its editions: the answer is the solution's last box unless the edition has it in a column."""
    solution = _text(row.get("solution"))
    level = _first(row, ("level", "difficulty", "Level"))
    subject = _first(row, ("type", "subject", "problem_type"))
    answer = _first(row, ("answer", "final_answer", "gt_answer", "extracted_solution"))
    return Item(
        question=_text(_first(row, ("problem", "question"))),
        answer=last_box(_text(answer)) or _text(answer) or last_box(solution) or "",
        solution=solution or None,
        domain=domain_of(subject),
        difficulty=difficulty_of(level),
        labels={"level": level, "type": subject} | labels_of(row, ("unique_id",)),
    )


def _first(row: Row, names: Sequence[str]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def deepscaler(row: Row) -> Item:
    """DeepScaleR-Preview-Dataset, and the edition by difficulty that names the question `prompt`."""
    question = row.get("problem", row.get("prompt"))
    return Item(
        question=_text(question),
        answer=_text(row["answer"]),
        solution=_text(row.get("solution")) or None,
        difficulty=difficulty_of(row.get("difficulty")),
        labels=labels_of(row, ("source", "difficulty")),
    )


def orz(row: Row) -> Item:
    """Open-Reasoner-Zero: turns {"from": "human", "value": ...} and {"ground_truth": {"value": ...}}."""
    turns = row.get("turns", row.get("conversations", row.get("messages", [row.get("0"), row.get("1")])))
    answer: Any = None
    for turn in sequence(turns):
        if isinstance(turn, dict) and isinstance(turn.get("ground_truth"), dict):
            answer = turn["ground_truth"].get("value")
    return Item(question=turn_text(turns, USER_ROLES), answer=_text(answer))


def dapo(row: Row) -> Item:
    """DAPO-Math-17k and Skywork-OR1: a prompt of chat messages around the question, `reward_model.ground_truth`.

    Skywork's ground truth is the JSON text of a list of answers, of which any is right.
    """
    if str(row.get("ability", "math")).lower() not in MATHEMATICS:
        raise UnusableRow(NOT_MATHEMATICS)
    answer = lookup(row, "reward_model.ground_truth") or row.get("solution")
    return Item(
        question=without_instructions(question_text(row["prompt"])),
        answer=_text(answer),
        labels=labels_of(row, ("data_source", "ability")) | _solve_rates(row.get("extra_info")),
    )


def _solve_rates(extra: Any) -> dict[str, Any]:
    """Skywork's difficulty for each model that it was measured with: of 16 responses so many are wrong."""
    rates = extra.get("model_difficulty") if isinstance(extra, dict) else None
    return {"model_difficulty": rates} if isinstance(rates, dict) else {}


def _text(value: Any) -> str:
    """A value as text; empty for what is none."""
    return answer_text(value)


def _answered_by(question: str, gold: str, trajectory: Trajectory, labels: Row) -> Item:
    """A problem with one trajectory, and no answer where the source tells none but the trajectory's own."""
    return Item(
        question=without_instructions(question),
        answer=last_box(gold) or "",
        solution=gold or None,
        difficulty=origin_difficulty(labels.get("source")),
        labels={name: value for name, value in labels.items() if value is not None},
        trajectories=(trajectory,),
    )


def _with_trajectories(item: Item, trajectories: Sequence[Trajectory]) -> Item:
    return Item(
        item.question, item.answer, item.solution, item.domain, item.difficulty, item.labels, tuple(trajectories)
    )


def _without_dollars(text: str) -> str:
    return text.strip("$").strip() if text.startswith("$") and text.endswith("$") else text
