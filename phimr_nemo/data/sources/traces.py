"""Readers of published sets of reasoning traces, whose answers, teachers and thinking have columns of their own.

A set that tells no answer gives items without one: their solutions vote (see :mod:`phimr_nemo.data.prepare.golds`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from phimr_nemo.data.sources.cells import (
    ASSISTANT_ROLES,
    USER_ROLES,
    answer_text,
    bare_solution,
    json_value,
    labels_of,
    lookup,
    sequence,
    speaker,
    turn_text,
)
from phimr_nemo.data.sources.item import Item, Trajectory, UnusableRow
from phimr_nemo.data.sources.labels import domain_of, origin_difficulty
from phimr_nemo.data.sources.problems import difficulty_of
from phimr_nemo.data.sources.rawfiles import Row
from phimr_nemo.data.sources.readers import DEEPSEEK_R1, MATHEMATICS, NO_ANSWER, NOT_MATHEMATICS, QWQ
from phimr_nemo.data.sources.recorded import NO_TEXT
from phimr_nemo.data.sources.wrapping import without_instructions
from phimr_nemo.text.thinking import CLOSE, with_thinking
from phimr_nemo.verify.extract import last_box

GEMINI_THINKING: Final = "gemini-2.0-flash-thinking"
MIXTURE_SOURCES: Final = ("openr1-math", "openr1_math", "numina")
_KNOWN_COLUMNS: Final = frozenset(
    (
        *(
            "response_id",
            "problem_id",
            "source",
            "in_source_id",
            "hf_dataset_name",
            "task_type",
            "prompt",
            "metadata",
        ),
        *("gold_standard_solution", "llm_response", "verification_info", "verification_result_info", "score"),
        *("messages", "reward", "model", "model_name"),
    )
)
_RESPONSE_KEYS: Final = ("response", "responses", "completion", "completions", "llm_response", "output", "text")


def am_distilled(row: Row) -> Item:
    """AM-DeepSeek-R1-Distilled-1.4M and AM-Thinking-v1-Distilled: messages, each with an `info`.

    It holds source, category, reference answer and test case on the user's side, the two parts of the response and
    in later sets the model's name on the other.
    """
    messages = row["messages"] if row.get("messages") is not None else row["conversations"]
    user = _info(messages, USER_ROLES)
    if user.get("test_case") is not None or str(user.get("category") or "math").lower() not in MATHEMATICS:
        raise UnusableRow(NOT_MATHEMATICS)
    answer = _info(messages, ASSISTANT_ROLES)
    thought, said = answer_text(answer.get("think_content")), answer_text(answer.get("answer_content"))
    text = with_thinking(thought, said, gap="\n\n") if thought and said else turn_text(messages, ASSISTANT_ROLES)
    return _item(
        Item(
            question=without_instructions(turn_text(messages, USER_ROLES)),
            answer=_gold(user.get("reference_answer")) or _gold(user.get("ground_truth")),
            difficulty=origin_difficulty(user.get("source")),
            labels=labels_of(user, ("source",)),
        ),
        [(text, answer_text(answer.get("model_name")).lower() or DEEPSEEK_R1)],
    )


def mixture_of_thoughts(row: Row) -> Item:
    """Mixture-of-Thoughts: messages with DeepSeek-R1's response; its mathematics comes from OpenR1-Math."""
    source = str(row.get("source") or "")
    if source and not any(name in source.lower() for name in MIXTURE_SOURCES):
        raise UnusableRow(NOT_MATHEMATICS)
    messages = row["messages"]
    return _item(
        Item(
            question=without_instructions(turn_text(messages, USER_ROLES)),
            answer=_gold(lookup(row, "messages.info.reference_answer")),
            labels=labels_of(row, ("source", "num_tokens")),
        ),
        [(turn_text(messages, ASSISTANT_ROLES), DEEPSEEK_R1)],
    )


def s1k(row: Row) -> Item:
    """s1K (`thinking_trajectories` and `attempt` of Gemini) and s1K-1.1 (DeepSeek-R1's beside Gemini's).

    The grades that an LLM gave stay in the labels.
    """
    if str(row.get("cot_type", "math")).lower() != "math":
        raise UnusableRow(NOT_MATHEMATICS)
    solution = answer_text(row["solution"])
    answer = bare_solution(solution)  # it is the bare answer in half of the rows
    traces = [
        ("deepseek_thinking_trajectory", "deepseek_attempt", DEEPSEEK_R1, "deepseek_grade"),
        ("gemini_thinking_trajectory", "gemini_attempt", GEMINI_THINKING, "gemini_grade"),
        ("thinking_trajectories", "attempt", GEMINI_THINKING, "grade"),
    ]
    trajectories = []
    lost = []
    for thinking, attempt, teacher, grade in traces:
        if attempt not in row and thinking not in row:
            continue
        thought = "\n\n".join(answer_text(part) for part in sequence(row.get(thinking)) if part)
        said = answer_text(row.get(attempt))
        if not said:
            lost.append(NO_TEXT)
            continue
        text = with_thinking(thought, said, gap="\n\n") if thought else said
        trajectories.append(Trajectory(text, teacher, labels=labels_of(row, (grade,))))
    return Item(
        question=without_instructions(answer_text(row["question"])),
        answer=answer,
        solution=solution if len(solution) > len(answer) else None,
        labels=labels_of(row, ("source_type", "cot_type")),
        trajectories=tuple(trajectories),
        lost=tuple(lost),
    )


def synthetic(row: Row) -> Item:
    """SYNTHETIC-1 and -2: an answer in the JSON text of `verification_info`, responses in a column or one a model."""
    if "math" not in str(row.get("task_type", "math")).lower():
        raise UnusableRow(NOT_MATHEMATICS)
    question = row["prompt"] if isinstance(row.get("prompt"), str) else turn_text(row.get("prompt"), USER_ROLES)
    question = question or turn_text(row.get("messages"), USER_ROLES)
    solution = answer_text(row.get("gold_standard_solution"))
    answer = _gold(lookup(row, "verification_info.ground_truth")) or last_box(solution) or ""
    metadata = row.get("metadata")
    told = json_value(metadata) if isinstance(metadata, str) else metadata
    return _item(
        Item(
            question=without_instructions(question),
            answer=answer,
            solution=solution or None,
            difficulty=difficulty_of(told.get("difficulty")) if isinstance(told, dict) else None,
            labels=labels_of(row, ("source", "task_type", "score", "reward")),
        ),
        list(_responses(row)),
    )


def _responses(row: Row) -> Iterator[tuple[str, str]]:
    """The responses of a row of SYNTHETIC with their teachers: named columns, then a column a model."""
    teacher = str(row.get("model") or row.get("model_name") or DEEPSEEK_R1)
    for value in sequence(row.get("llm_response")):
        yield answer_text(value), teacher
    messages = turn_text(row.get("messages"), ASSISTANT_ROLES)
    if messages:
        yield messages, teacher
    for name, value in row.items():
        if name in _KNOWN_COLUMNS:
            continue
        for one in sequence(value):
            inner = next((one[key] for key in _RESPONSE_KEYS if one.get(key)), None) if isinstance(one, dict) else one
            for text in sequence(inner):
                if isinstance(text, str) and (CLOSE in text or "\\boxed" in text):
                    yield text.strip(), name.removeprefix("llm_response_").removeprefix("response_").lower()


def open_math_reasoning(row: Row) -> Item:
    """OpenMathReasoning: a solution of `generation_model` a row.

    Where no answer could be extracted from the forum, `expected_answer` is a vote among solutions. Solutions that
    ran code, and selections among solutions, are left out; so are problems that were converted from proofs without
    an answer.
    """
    if str(row.get("inference_mode", "cot")).lower() != "cot":
        raise UnusableRow(f"inference_mode {row['inference_mode']}")
    teacher = answer_text(row.get("generation_model")).lower()
    known = {"qwq-32b": QWQ, "deepseek-r1": DEEPSEEK_R1}
    return _item(
        Item(
            question=without_instructions(answer_text(row["problem"])),
            answer=_gold(row.get("expected_answer")),
            domain=domain_of(row.get("domain")),
            labels=labels_of(row, ("problem_type", "problem_source", "pass_rate_72b_tir")),
            voted=row.get("problem_type") == "no_answer_extracted",
        ),
        [(answer_text(row["generated_solution"]), known.get(teacher, teacher or "unknown"))],
    )


def _item(item: Item, responses: list[tuple[str, str]]) -> Item:
    """The item with its responses; empty ones are counted as lost.

    Raises:
        UnusableRow: there is neither an answer nor a response.
    """
    texts = tuple(Trajectory(text, teacher) for text, teacher in responses if text)
    if not item.answer and not texts:
        raise UnusableRow(NO_ANSWER)
    return Item(
        question=item.question,
        answer=item.answer,
        solution=item.solution,
        domain=item.domain,
        difficulty=item.difficulty,
        labels=item.labels,
        trajectories=texts,
        voted=item.voted,
        lost=(NO_TEXT,) * (len(responses) - len(texts)),
    )


def _gold(value: Any) -> str:
    """A reference answer; the last box of a worked one."""
    text = answer_text(value)
    return last_box(text) or text


def _info(messages: Any, roles: tuple[str, ...]) -> Row:
    """The `info` of the last message of a role."""
    infos = [
        turn["info"]
        for turn in sequence(messages)
        if isinstance(turn, dict) and speaker(turn) in roles and isinstance(turn.get("info"), dict)
    ]
    return infos[-1] if infos else {}
