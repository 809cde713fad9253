"""Each published set's reader, on rows in exactly the columns of the set (docs/data.md names their origin)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from phimr_nemo.config import SourceConfig
from phimr_nemo.config.data import Preset as PresetName
from phimr_nemo.data.sources.item import Item, UnusableRow
from phimr_nemo.data.sources.labels import DOMAINS, domain_of
from phimr_nemo.data.sources.normalise import clean
from phimr_nemo.data.sources.presets import PRESETS
from phimr_nemo.data.sources.recorded import NO_TEXT
from phimr_nemo.data.sources.source import read_items
from phimr_nemo.errors import UserError

STRATOS = (
    "<|begin_of_thought|>\n\nTwo and two.\n\n<|end_of_thought|>\n\n"
    "<|begin_of_solution|>\n\nIt is $\\boxed{4}$.\n\n<|end_of_solution|>"
)
THOUGHT = "<think>\nTwo and two.\n</think>\n\nIt is $\\boxed{4}$."
BOXED_PROMPT = "Return your final response within \\boxed{}. "
DAPO_PROMPT = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_REMINDER = '\n\nRemember to put your answer on its own line after "Answer:".'
NUMINA = {
    "problem": "What is $2+2$?",
    "solution": "It is $\\boxed{4}$.",
    "answer": "4",
    "problem_type": "Number Theory",
    "question_type": "math-word-problem",
    "problem_is_valid": "Yes",
    "solution_is_valid": "Yes",
    "source": "olympiads",
    "synthetic": False,
}
OPENR1 = {
    "problem": "What is $2+2$?",
    "solution": "It is $\\boxed{4}$.",
    "answer": "4",
    "problem_type": "Algebra",
    "question_type": "math-word-problem",
    "source": "cn_k12",
    "uuid": "a-b",
    "is_reasoning_complete": [True, False],
    "generations": ["<think>\nEasy.\n</think>\n\\boxed{4}", "<think>\nHm, "],
    "correctness_math_verify": [True, False],
    "correctness_llama": None,
    "finish_reasons": ["stop", "length"],
    "correctness_count": 1,
    "messages": [{"content": "What is $2+2$?", "role": "user"}],
}
OPENTHOUGHTS = {
    "problem": "Return your final response within \\boxed{}. What is $2+2$?",
    "deepseek_reasoning": "Two and two.",
    "deepseek_solution": "It is $\\boxed{4}$.",
    "ground_truth_solution": "Add: $\\boxed{4}$",
    "domain": "math",
    "source": "olympiads",
    "test_cases": None,
    "starter_code": None,
}
SHAREGPT = {
    "system": "Your role as an assistant involves thoroughly exploring questions",
    "conversations": [
        {"from": "user", "value": BOXED_PROMPT + "What is $2+2$?"},
        {"from": "assistant", "value": STRATOS},
    ],
}
OLYMPIAD = {
    "id": 1606,
    "question": "Find all $n$.",
    "solution": ["First.", "Second."],
    "final_answer": ["$2,3$"],
    "context": None,
    "image_1": None,
    "modality": "Text-only",
    "difficulty": "Competition",
    "is_multiple_answer": True,
    "unit": None,
    "answer_type": "Numerical",
    "error": None,
    "question_type": "Open-ended",
    "subfield": "Combinatorics",
    "subject": "Math",
    "language": "English",
}
AQUA = {
    "question": "Two friends walk. How far?",
    "options": ["A)21", "B)21.5", "C)22", "D)22.5", "E)23"],
    "rationale": "1.15*20=23 km.\nThe answer is E.",
    "correct": "E",
}
TAL = {
    "dataset_name": "prime_math_competition_en_single_choice_8K_dev",
    "dataset_version": "2023-07-07",
    "qid": "244",
    "queId": "8afc",
    "competition_source_list": [],
    "difficulty": "2",
    "qtype": "single_choice",
    "problem": "What is the smallest value of $X+Y$? ",
    "answer_option_list": [
        [{"aoVal": "A", "content": "$$3$$ "}],
        [{"aoVal": "B", "content": "$$4$$ "}],
    ],
    "knowledge_point_routes": ["Overseas Competition->Knowledge Point->Number Theory Modules->Divisibility Rules"],
    "answer_analysis": ["Since $1001$ is a multiple of $13$. "],
    "answer_value": "B",
}
META_SOLUTION = "Since 2+2=4.\n#### 4\nThe answer is: 4"


def read(preset: str, row: dict[str, Any]) -> Item:
    assert PRESETS[preset].fits(row)
    return PRESETS[preset].read(row)


# preset, row -> question, answer, solution, domain, difficulty
PLAIN: list[tuple[str, dict[str, Any], tuple[str, str, str | None, str | None, str | None]]] = [
    ("numina_math", NUMINA, ("What is $2+2$?", "4", "It is $\\boxed{4}$.", "number_theory", "college")),
    (
        "numina_math",
        {"source": "orca_math", "problem": "Q", "solution": "So \\boxed{\\frac{1}{2}}", "messages": []},
        ("Q", "\\frac{1}{2}", "So \\boxed{\\frac{1}{2}}", None, "elementary"),
    ),
    (
        "big_math",
        {
            "problem": "Q",
            "answer": "7",
            "source": "cn_k12",
            "domain": ["Mathematics -> Applied Mathematics -> Probability"],
            "llama8b_solve_rate": 0.25,
        },
        ("Q", "7", None, "probability", "high_school"),
    ),
    (
        "omni_math",
        {
            "domain": ["Mathematics -> Geometry -> Plane Geometry -> Angles"],
            "difficulty": 7.5,
            "problem": "Q",
            "solution": "S",
            "answer": "7",
            "source": "usamo",
        },
        ("Q", "7", "S", "geometry", "college"),
    ),
    ("olympiad_bench", OLYMPIAD, ("Find all $n$.", "2,3", "First.\n\nSecond.", "combinatorics", "college")),
    (
        "olympiad_bench",
        OLYMPIAD | {"context": "Let $n$ be odd.", "final_answer": ["$2$", "$3$"]},
        ("Let $n$ be odd.\n\nFind all $n$.", "2, 3", "First.\n\nSecond.", "combinatorics", "college"),
    ),
    (
        "metamath_qa",
        {"type": "GSM_Rephrased", "query": "Q", "original_question": "O", "response": META_SOLUTION},
        ("Q", "4", META_SOLUTION, None, "elementary"),
    ),
    (
        "math_instruct",
        {"source": "data/CoT/aqua_rat.json", "output": "So it goes. The answer is D", "instruction": "Q"},
        ("Q", "D", "So it goes. The answer is D", None, "high_school"),
    ),
    (
        "math_instruct",
        {"source": "data/CoT/MATH_train.json", "output": "Thus $\\boxed{12}$.", "instruction": "Q"},
        ("Q", "12", "Thus $\\boxed{12}$.", None, None),
    ),
    (
        "aqua_rat",
        AQUA,
        (
            "Two friends walk. How far?\n(A) 21\n(B) 21.5\n(C) 22\n(D) 22.5\n(E) 23",
            "E",
            "1.15*20=23 km.\nThe answer is E.",
            None,
            "high_school",
        ),
    ),
    (
        "ape210k",
        {
            "id": "1191144",
            "segmented_text": "一 共",
            "original_text": "一共有多少？",
            "ans": "1/2",
            "equation": "x=1/2",
        },
        ("一共有多少？", "1/2", None, "arithmetic", "elementary"),
    ),
    (
        "ape210k",
        {"id": "1", "question": "Q", "question_chinese": "问", "chain": "", "result": "5", "equation": "x=5"},
        ("Q", "5", None, "arithmetic", "elementary"),
    ),
    (
        "tal_scq5k",
        TAL,
        (
            "What is the smallest value of $X+Y$?\n(A) $$3$$\n(B) $$4$$",
            "B",
            "Since $1001$ is a multiple of $13$.",
            "number_theory",
            "middle",
        ),
    ),
    (
        "gsm8k",
        {"question": "Q", "answer": "2+2=<<2+2=4>>4\n#### 1,004"},
        ("Q", "1004", "2+2=<<2+2=4>>4", None, "elementary"),
    ),
    (
        "math",
        {
            "problem": "Q",
            "level": "Level 5",
            "type": "Counting & Probability",
            "solution": "So $\\boxed{\\frac{1}{2}}$.",
        },
        ("Q", "\\frac{1}{2}", "So $\\boxed{\\frac{1}{2}}$.", "probability", "high_school"),
    ),
    (
        "math",
        {"problem": "Q", "answer": "0", "difficulty": 1.0, "type": "Precalculus"},
        ("Q", "0", None, "algebra", "elementary"),
    ),
    ("deepscaler", {"problem": "Q", "answer": "28", "solution": ""}, ("Q", "28", None, None, None)),
    (
        "deepscaler",
        {"prompt": "Q", "answer": "28", "source": "deepscaler_difficulty", "id": 0},
        ("Q", "28", None, None, None),
    ),
    (
        "orz",
        {"turns": [{"from": "human", "value": "Q"}, {"from": "assistant", "ground_truth": {"value": "142"}}]},
        ("Q", "142", None, None, None),
    ),
    (
        "dapo",
        {
            "data_source": "math_dapo",
            "prompt": [{"content": DAPO_PROMPT + "Q $x$?" + DAPO_REMINDER, "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": "9a9b"},
        },
        ("Q $x$?", "34", None, None, None),
    ),
]


@pytest.mark.parametrize(("preset", "row", "expected"), PLAIN, ids=[f"{i}-{case[0]}" for i, case in enumerate(PLAIN)])
def test_reads_the_published_columns(
    preset: str, row: dict[str, Any], expected: tuple[str, str, str | None, str | None, str | None]
) -> None:
    item = read(preset, row)
    assert (item.question, item.answer, item.solution, item.domain, item.difficulty) == expected
    assert item.trajectories == ()


DEEPMATH = {
    "question": "Q",
    "final_answer": "7",
    "difficulty": 6.5,
    "topic": "Mathematics -> Algebra -> Linear Algebra -> Determinants",
    "r1_solution_1": THOUGHT,
    "r1_solution_2": "  ",
    "r1_solution_3": "So \\boxed{8}",
}


def test_deepmath_brings_three_responses_and_counts_an_empty_one() -> None:
    item = read("deepmath", DEEPMATH)
    assert (item.question, item.answer, item.domain, item.difficulty) == ("Q", "7", "algebra", "college")
    assert [(one.response, one.teacher) for one in item.trajectories] == [
        (THOUGHT, "deepseek-r1"),
        ("So \\boxed{8}", "deepseek-r1"),
    ]
    assert item.lost == (NO_TEXT,)
    assert item.labels == {"topic": DEEPMATH["topic"], "difficulty": 6.5}


def test_own_labels_stay_in_their_own_words() -> None:
    assert read("big_math", PLAIN[2][1]).labels["llama8b_solve_rate"] == 0.25
    assert read("omni_math", PLAIN[3][1]).labels["difficulty"] == 7.5
    assert read("tal_scq5k", TAL).labels["difficulty"] == "2"
    assert read("math", PLAIN[14][1]).labels == {"level": "Level 5", "type": "Counting & Probability"}
    assert read("numina_math", NUMINA).labels["problem_type"] == "Number Theory"


def test_openr1_keeps_every_generation_with_its_labels() -> None:
    item = read("openr1_math", OPENR1)
    assert (item.answer, item.domain, item.difficulty) == ("4", "algebra", "high_school")
    assert [one.response for one in item.trajectories] == OPENR1["generations"]
    assert [one.finish_reason for one in item.trajectories] == ["stop", "length"]
    assert [one.teacher for one in item.trajectories] == ["deepseek-r1", "deepseek-r1"]
    assert [dict(one.labels) for one in item.trajectories] == [
        {"correctness_math_verify": True, "is_reasoning_complete": True},
        {"correctness_math_verify": False, "is_reasoning_complete": False},
    ]


def test_openr1_without_finish_reasons_knows_a_cut_one_by_its_thinking() -> None:
    item = read("openr1_math", OPENR1 | {"finish_reasons": None})
    assert [one.finish_reason for one in item.trajectories] == ["stop", "length"]
    told = read("openr1_math", OPENR1 | {"finish_reasons": ["length", "stop"]})
    assert [one.finish_reason for one in told.trajectories] == ["length", "stop"]


def test_openthoughts_in_its_three_editions() -> None:
    math_edition = {
        "source": "olympiads",
        "problem": "What is $2+2$?",
        "solution": "Add: $\\boxed{4}$",
        "correct": True,
    }
    for row, answer in (
        (OPENTHOUGHTS, "4"),
        (math_edition | {"conversations": SHAREGPT["conversations"], "messages": []}, "4"),
        (SHAREGPT, ""),
    ):
        item = read("openthoughts", row)
        assert (item.question, item.answer) == ("What is $2+2$?", answer)
        assert [one.response for one in item.trajectories] == [THOUGHT]


def test_bespoke_stratos_tells_no_answer() -> None:
    item = read("bespoke_stratos", SHAREGPT)
    assert (item.question, item.answer, item.labels) == ("What is $2+2$?", "", {})
    assert item.trajectories[0].response == THOUGHT


@pytest.mark.parametrize(
    ("preset", "row", "reason"),
    [
        ("numina_math", NUMINA | {"question_type": "proof"}, "a proof"),
        ("numina_math", NUMINA | {"answer": "proof"}, "no answer"),
        ("numina_math", NUMINA | {"problem_is_valid": "Incomplete"}, "problem_is_valid is not Yes"),
        ("openr1_math", OPENR1 | {"answer": "notfound"}, "no answer"),
        *(("openr1_math", OPENR1 | {"answer": said}, "no answer") for said in ("-", "—", "?", "Unknown", "...")),
        ("openthoughts", OPENTHOUGHTS | {"domain": "code"}, "not mathematics"),
        ("olympiad_bench", OLYMPIAD | {"modality": "Multimodal"}, "an image"),
        ("olympiad_bench", OLYMPIAD | {"subject": "Physics"}, "not mathematics"),
        ("metamath_qa", {"type": "MATH_AnsAug", "query": "Q", "response": "So it is."}, "no answer"),
        (
            "math_instruct",
            {"source": "data/PoT/gsm.json", "output": "x = 1\nprint(x)", "instruction": "Q"},
            "a program",
        ),
        ("gsm8k", {"question": "Q", "answer": "no end"}, "no answer"),
    ],
)  # fmt: skip
def test_what_cannot_be_checked_is_refused_with_a_reason(preset: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnusableRow) as caught:
        read(preset, row)
    assert caught.value.reason == reason


def test_a_row_of_other_columns_does_not_fit() -> None:
    assert not PRESETS["gsm8k"].fits({"problem": "Q", "answer": "4"})
    assert not PRESETS["openr1_math"].fits(NUMINA)
    assert not PRESETS["dapo"].fits({"prompt": []})


def test_every_preset_of_the_configuration_has_a_reader() -> None:
    assert set(get_args(PresetName)) == set(PRESETS)


@pytest.mark.parametrize(
    ("label", "domain"),
    [
        ("Intermediate Algebra", "algebra"),
        ("Counting & Probability", "probability"),
        ("Number Theory", "number_theory"),
        ("Mathematics -> Calculus -> Differential Calculus", "calculus"),
        (["Mathematics -> Precalculus -> Trigonometric Functions"], "algebra"),
        ("Logic and Puzzles", "logic"),
        ("number_theory", "number_theory"),
        ("竞赛->知识点->数论模块->整除", "number_theory"),
        ("Mathematics", None),
        (None, None),
        (3, None),
    ],
)
def test_labels_of_domains(label: object, domain: str | None) -> None:
    assert domain_of(label) == domain
    assert domain is None or domain in DOMAINS


@pytest.mark.parametrize(
    ("preset", "row"),
    [
        ("dapo", {"prompt": "a" + " " * 3_000_000 + "b", "reward_model": {"ground_truth": "1"}}),
        ("bespoke_stratos", {"system": "", "conversations": [{"from": "gpt", "value": STRATOS * 9_000}]}),
        ("metamath_qa", {"type": "", "query": "Q", "response": "The answer is " * 200_000}),
        ("math_instruct", {"instruction": "Q", "output": "The answer is " + " " * 2_000_000 + "x\n"}),
        ("gsm8k", {"question": "Q", "answer": "#### a" + " " * 2_000_000 + "b"}),
        ("metamath_qa", {"type": "", "query": "Q", "response": "The answer is " + "$" * 1_900 + "x"}),
        ("olympiad_bench", OLYMPIAD | {"question": "![" * 200_000, "final_answer": ["$" * 100_000 + "x"]}),
        ("aqua_rat", AQUA | {"options": ["a" + " " * 1_000_000 + "b"]}),
        ("orz", {"turns": [["from"], None, {"from": "human"}, {"ground_truth": {"value": {"a": 1}}}]}),
        ("tal_scq5k", {"problem": 3, "answer_option_list": "x", "answer_value": None, "answer_analysis": {"a": 1}}),
        ("aqua_rat", {"question": None, "options": {"a": 1}, "rationale": [], "correct": {}}),
        ("openr1_math", OPENR1 | {"generations": [None, 3, ""], "finish_reasons": "stop"}),
    ],
)  # fmt: skip
def test_hostile_rows_end_in_time_and_in_nothing_but_a_reason(preset: str, row: dict[str, Any]) -> None:
    """Patterns that look back from every space would take hours on these."""
    try:
        item = PRESETS[preset].read(row)
    except UnusableRow:
        return
    clean(item.question)
    clean(item.answer)


# Layouts of published sets of reasoning traces: preset, rows -> what is read of each.
ASKED = "What is $2+2$?"
R1_TEXT = "<think>\nTwo and two.\n</think>\n\nIt is $\\boxed{4}$."
Told = tuple[str, str, list[tuple[str, str]]]
SKYWORK = {
    "data_source": "train-math-numinamath1.5_olympiads",
    "prompt": [
        {
            "role": "user",
            "content": ASKED + " Let's think step by step and output the final answer within \\boxed{}.",
        }
    ],
    "ability": "math",
    "reward_model": {"ground_truth": '["4", "\\\\frac{8}{2}"]', "style": "rule"},
    "extra_info": {"index": 0, "model_difficulty": {"DeepSeek-R1-Distill-Qwen-7B": 3}},
}
SYNTHETIC = {
    "response_id": "vfm_0",
    "problem_id": "p0",
    "source": "numina-math",
    "in_source_id": "x",
    "hf_dataset_name": "AI-MO/NuminaMath-CoT",
    "task_type": "verifiable_math",
    "prompt": f"Solve the following math problem. {ASKED}\n\n"
    "Present the answer in LaTex format: \\boxed{Your answer}",
    "gold_standard_solution": "So \\boxed{4}",
    "llm_response": R1_TEXT,
    "verification_info": '{"ground_truth": "4"}',
    "score": 1.0,
    "verification_result_info": "{}",
    "metadata": '{"difficulty": "high school"}',
}
OPEN_MATH = {
    "expected_answer": "4",
    "problem_type": "has_answer_extracted",
    "problem_source": "aops_c4_high_school_math",
    "generation_model": "QwQ-32B",
    "pass_rate_72b_tir": "0.9",
    "problem": ASKED,
    "generated_solution": R1_TEXT,
    "inference_mode": "cot",
    "used_in_kaggle": True,
}
S1K11 = {
    "solution": "4",
    "question": ASKED,
    "cot_type": "math",
    "source_type": "x",
    "metadata": "{}",
    "gemini_thinking_trajectory": "Hm.",
    "gemini_attempt": "\\boxed{5}",
    "deepseek_thinking_trajectory": "Two and two.",
    "deepseek_attempt": "It is $\\boxed{4}$.",
    "gemini_grade": "No",
    "deepseek_grade": "Yes",
}
S1K = {
    "solution": "Long work. Therefore $n=\\boxed{4}$.",
    "question": ASKED,
    "cot_type": "math",
    "source_type": "x",
    "metadata": "{}",
    "cot": None,
    "thinking_trajectories": ["Two and two."],
    "attempt": "It is $\\boxed{4}$.",
}
TURNS = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": R1_TEXT}]
AM_USER = {"source": "numina_1.5", "reference_answer": "4", "test_case": None}
AM = {
    "messages": [
        {"role": "user", "content": ASKED, "info": AM_USER},
        {
            "role": "assistant",
            "content": "<think>Two and two.</think><answer>It is $\\boxed{4}$.</answer>",
            "info": {
                "reference_answer": None,
                "think_content": "Two and two.",
                "answer_content": "It is $\\boxed{4}$.",
            },
        },
    ]
}
OT3 = {
    "difficulty": 8,
    "source": "ai2-adapt-dev/openmath-2-math",
    "domain": "math",
    "conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": R1_TEXT}],
}
R1_TRACE = [("deepseek-r1", R1_TEXT)]
LAYOUTS: list[tuple[str, dict[str, Any], Told | str]] = [
    ("skywork_or1", SKYWORK, (ASKED, '["4", "\\\\frac{8}{2}"]', [])),
    ("skywork_or1", SKYWORK | {"reward_model": {"ground_truth": '["36"]'}}, (ASKED, "36", [])),
    ("skywork_or1", SKYWORK | {"ability": "code"}, "not mathematics"),
    ("openthoughts3", OT3, (ASKED, "", [("qwq-32b", R1_TEXT)])),
    ("openthoughts", OT3, (ASKED, "", [("qwq-32b", R1_TEXT)])),
    ("openthoughts3", OT3 | {"domain": "code"}, "not mathematics"),
    ("am_deepseek_r1_distilled", AM, (ASKED, "4", R1_TRACE)),
    (
        "am_deepseek_r1_distilled",
        {"messages": [{"role": "user", "content": "Sort.", "info": {"test_case": "{}"}}]},
        "not mathematics",
    ),
    ("mixture_of_thoughts", {"messages": TURNS, "source": "open-r1/OpenR1-Math-220k"}, (ASKED, "", R1_TRACE)),
    ("mixture_of_thoughts", {"messages": TURNS, "source": "open-r1/codeforces-cots"}, "not mathematics"),
    ("s1k", S1K11, (ASKED, "4", [*R1_TRACE, ("gemini-2.0-flash-thinking", "<think>\nHm.\n</think>\n\n\\boxed{5}")])),
    ("s1k", S1K, (ASKED, "4", [("gemini-2.0-flash-thinking", R1_TEXT)])),
    ("s1k", S1K | {"cot_type": "crossword"}, "not mathematics"),
    ("synthetic", SYNTHETIC, (ASKED, "4", R1_TRACE)),
    ("synthetic", SYNTHETIC | {"task_type": "llm_judgeable_groundtruth_similarity"}, "not mathematics"),
    (
        "synthetic",
        {
            "problem_id": "p0",
            "task_type": "prime_rl_math",
            "prompt": ASKED,
            "verification_info": '{"ground_truth": "4"}',
            "Qwen/QwQ-32B": [R1_TEXT],
            "deepseek-ai/DeepSeek-R1-0528": {"response": R1_TEXT, "reward": 1.0},
        },
        (ASKED, "4", [("qwen/qwq-32b", R1_TEXT), ("deepseek-ai/deepseek-r1-0528", R1_TEXT)]),
    ),
    ("open_math_reasoning", OPEN_MATH, (ASKED, "4", [("qwq-32b", R1_TEXT)])),
    ("open_math_reasoning", OPEN_MATH | {"generation_model": "DeepSeek-R1"}, (ASKED, "4", R1_TRACE)),
    ("open_math_reasoning", OPEN_MATH | {"inference_mode": "tir"}, "inference_mode tir"),
    ("math", {"problem": ASKED, "level": "Level 5", "type": "A", "solution": "So $\\boxed 4$."}, (ASKED, "4", [])),
    ("math", {"problem": ASKED, "level": "Level ?", "type": "A", "solution": "So \\fbox{4}."}, (ASKED, "4", [])),
    ("math", {"problem": ASKED, "subject": "Algebra", "level": 5, "answer": "4", "solution": "S"}, (ASKED, "4", [])),
    ("math", {"problem": ASKED, "solution": "So $\\boxed{1}$ or $\\boxed{4}$."}, (ASKED, "1, 4", [])),
    ("math", {"question": ASKED, "answer": "$\\boxed{4}$"}, (ASKED, "4", [])),
]  # fmt: skip


@pytest.mark.parametrize(
    ("preset", "row", "expected"), LAYOUTS, ids=[f"{index}-{case[0]}" for index, case in enumerate(LAYOUTS)]
)
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_files_in_published_layouts(
    tmp_path: Path, preset: PresetName, row: dict[str, Any], expected: Told | str, ending: str
) -> None:
    path = tmp_path / f"rows.{ending}"
    if ending == "jsonl":
        path.write_text(json.dumps(row) + "\n", "utf-8")
    else:
        pq.write_table(pa.Table.from_pylist([row]), path)
    ((_, item),) = read_items(SourceConfig(name="s", path=str(path), preset=preset))
    if isinstance(expected, str):
        assert isinstance(item, UnusableRow)
        assert item.reason == expected
        return
    assert isinstance(item, Item)
    told = [(one.teacher, one.response) for one in item.trajectories]
    assert (item.question, item.answer, told) == expected


def test_labels_of_reasoning_traces_stay() -> None:
    assert read("skywork_or1", SKYWORK).labels["model_difficulty"] == {"DeepSeek-R1-Distill-Qwen-7B": 3}
    assert read("openthoughts3", OT3).labels == {"source": "ai2-adapt-dev/openmath-2-math", "difficulty": 8}
    assert read("openthoughts3", OT3).difficulty == "graduate"
    assert read("synthetic", SYNTHETIC).difficulty == "high_school"
    assert [dict(one.labels) for one in read("s1k", S1K11).trajectories] == [
        {"deepseek_grade": "Yes"},
        {"gemini_grade": "No"},
    ]
    assert read("open_math_reasoning", OPEN_MATH | {"problem_type": "no_answer_extracted"}).voted
    assert not read("open_math_reasoning", OPEN_MATH).voted
    empty = read("synthetic", SYNTHETIC | {"llm_response": " "})
    assert (empty.trajectories, empty.lost) == ((), ("response that is null or empty",))


# layout -> its row; question "Q?", answer "4"; responses
R1 = "<think>\nTwo and two.\n</think>\n\nIt is $\\boxed{4}$."
USER = {"role": "user", "content": "Q?"}
OTHER_LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any], list[tuple[str, str]]]] = {
    "Polaris-53K": ({"problem": "Q?", "answer": "4", "difficulty": "6/8"}, {}, []),
    "MegaScience": (
        {
            "question": "Q?",
            "answer": "We add two and two. This gives four.",
            "reference_answer": "4",
            "subject": "math",
        },
        {},
        [],
    ),
    "DeepMath in TRL": ({"prompt": [USER], "solution": "4", "difficulty": 3.0, "topic": "x"}, {}, []),
    "Big-Math in open-r1": ({"prompt": "Q?", "solution": "4", "domain": ["x"], "llama8b_solve_rate": 0.2}, {}, []),
    "verl, as text": (
        {"prompt": json.dumps([USER]), "ability": "math", "reward_model": json.dumps({"ground_truth": "4"})},
        {"preset": "dapo"},
        [],
    ),
    "SimpleRL-Zoo": (
        {
            "prompt": [{"role": "user", "content": "<|im_start|>user\nQ?<|im_end|>\n<|im_start|>assistant\n"}],
            "reward_model": {"ground_truth": "4"},
        },
        {},
        [],
    ),
    "AReaL": (
        {"prompt": "<｜User｜>Q?<｜Assistant｜><think>\n", "solutions": ["\\boxed{4}"], "task": "math"},
        {},
        [],
    ),
    "PRM800K": ({"question": {"problem": "Q?", "ground_truth_answer": "4"}, "label": {"steps": []}}, {}, []),
    "ORZ on the hub": (
        {
            "0": {"from": "human", "value": "Q?", "ground_truth": None},
            "1": {"from": "assistant", "value": None, "ground_truth": {"value": "4"}},
        },
        {"preset": "orz"},
        [],
    ),
    "RLVR": ({"messages": [USER], "ground_truth": "4", "dataset": "gsm8k"}, {}, []),
    "SVAMP": ({"Body": "B.", "Question": "Q of B?", "question_concat": "Q?", "Answer": "4"}, {}, []),
    "GSM-Hard": ({"input": "Q?", "code": "def", "target": 4.0}, {}, []),
    "GeneralThought": (
        {
            "question": "Q?",
            "reference_answer": "4",
            "model_name": "r1",
            "model_answer": "It is 4",
            "model_reasoning": "hm",
        },
        {"response": "model_answer"},
        [("r1", "<think>\nhm\n</think>\nIt is 4")],
    ),
    "NaturalReasoning": (
        {
            "question": "Q?",
            "reference_answer": "4",
            "responses": [{"response_model": "llama", "response": "It is 4"}],
        },
        {"response": "responses"},
        [("llama", "It is 4")],
    ),
    "Nemotron-Post-Training-v1": (
        {
            "messages": [USER, {"role": "assistant", "content": R1}],
            "generator": "r1",
            "metadata": json.dumps({"expected_answer": "4"}),
        },
        {},
        [("r1", R1)],
    ),
    "AM-Thinking-v1": (
        {
            "system": None,
            "conversations": [
                {
                    "from": "human",
                    "value": "Q?",
                    "info": {"category": "math", "ground_truth": "4", "test_case": None},
                },
                {
                    "from": "assistant",
                    "value": R1,
                    "info": {"think_content": "Two.", "answer_content": "It is 4", "model_name": "AM"},
                },
            ],
        },
        {"preset": "am_deepseek_r1_distilled"},
        [("am", "<think>\nTwo.\n</think>\n\nIt is 4")],
    ),
}


@pytest.mark.parametrize("name", OTHER_LAYOUTS)
def test_layouts_of_other_sets(tmp_path: Path, name: str) -> None:
    row, settings, responses = OTHER_LAYOUTS[name]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", "utf-8")
    ((_, item),) = read_items(SourceConfig(name="s", path=str(path), **settings))
    assert isinstance(item, Item)
    assert (item.question, item.answer) == ("Q?", "4")
    assert [(one.teacher, one.response) for one in item.trajectories] == responses
    assert item.lost == ()


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"answer": "He has 2 and 2. Therefore he has 4 apples in total."}, None),
        ({"answer": "He has 2 and 2. The answer is 4."}, "4"),
        ({"answer": "The answer is 4."}, "4"),
        ({"answer": "Answer: 4"}, "4"),
        ({"answer": "proof"}, None),
        ({"answer": "", "solution": "NotFound"}, None),
        ({"solution": "Add them up"}, None),
        ({"answer": "A : B = 2 : 3"}, "A : B = 2 : 3"),
        ({"answer": "all primes greater than 3"}, "all primes greater than 3"),
    ],
)
def test_prose_is_no_answer(tmp_path: Path, row: dict[str, str], answer: str | None) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "Q?"} | row) + "\n", "utf-8")
    ((_, item),) = read_items(SourceConfig(name="s", path=str(path)))
    assert (item.answer if isinstance(item, Item) else None) == answer


def test_responses_without_answers_are_asked_for_by_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"query": "Q?", "response": "So \\boxed{4}"}) + "\n", "utf-8")
    with pytest.raises(UserError, match="set response: response in its entry"):
        list(read_items(SourceConfig(name="s", path=str(path))))
    path.write_text(
        json.dumps({"prompt": "Q?", "messages": [USER, {"role": "assistant", "content": R1}]}) + "\n", "utf-8"
    )
    ((_, item),) = read_items(SourceConfig(name="s", path=str(path)))
    assert isinstance(item, Item)
    assert [one.response for one in item.trajectories] == [R1]


def test_messages_are_read_without_a_preset(tmp_path: Path) -> None:
    (tmp_path / "am.jsonl").write_text(json.dumps(AM) + "\n", "utf-8")
    ((_, item),) = read_items(SourceConfig(name="s", path=str(tmp_path / "am.jsonl")))
    assert isinstance(item, Item)
    assert (item.question, item.answer) == (ASKED, "4")
    assert [one.response for one in item.trajectories] == [AM["messages"][1]["content"]]


def test_a_directory_of_one_file_a_problem_is_read(tmp_path: Path) -> None:
    (tmp_path / "algebra").mkdir()
    row = {"problem": ASKED, "level": "Level 5", "type": "Algebra", "solution": "So $\\boxed{4}$."}
    for number in (1, 2):
        (tmp_path / "algebra" / f"{number}.json").write_text(json.dumps(row, indent=4), "utf-8")
    items = [item for _, item in read_items(SourceConfig(name="s", path=str(tmp_path), preset="math"))]
    assert [item.answer for item in items if isinstance(item, Item)] == ["4", "4"]
