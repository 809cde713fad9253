"""Readers of the published sets of questions: one short function a set, in exactly its columns.

docs/data.md holds the table of sets, columns and where their layout is documented. A reader raises
:class:`UnusableRow` with the reason when a row is no problem with an answer that can be checked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from phimr_nemo.data.sources import readers, traces
from phimr_nemo.data.sources.item import Item
from phimr_nemo.data.sources.rawfiles import Row


@dataclass(frozen=True)
class Preset:
    """How a published set is read.

    Attributes:
        read: one row as a problem.
        layouts: the columns of each layout that is known; a row has all columns of one of them.
        array_column: the column that a row gets when the file's rows are JSON arrays, not objects.
    """

    read: Callable[[Row], Item]
    layouts: tuple[tuple[str, ...], ...]
    array_column: str | None = None

    def fits(self, row: Row) -> bool:
        """Whether a row has the columns of one of the layouts."""
        return any(all(name in row for name in layout) for layout in self.layouts)


PRESETS: Final[Mapping[str, Preset]] = {
    "openr1_math": Preset(readers.openr1_math, (("problem", "answer", "generations", "correctness_math_verify"),)),
    "openthoughts": Preset(
        readers.openthoughts,
        (
            ("problem", "deepseek_reasoning", "deepseek_solution", "ground_truth_solution", "domain"),
            ("problem", "solution", "conversations", "correct"),
            ("difficulty", "source", "domain", "conversations"),
            ("system", "conversations"),
            ("conversations",),
        ),
    ),
    "openthoughts3": Preset(readers.openthoughts3, (("difficulty", "source", "domain", "conversations"),)),
    "bespoke_stratos": Preset(readers.sharegpt, (("system", "conversations"),)),
    "numina_math": Preset(readers.numina_math, (("problem", "solution"),)),
    "big_math": Preset(readers.big_math, (("problem", "answer", "domain", "llama8b_solve_rate"),)),
    "omni_math": Preset(readers.omni_math, (("domain", "difficulty", "problem", "solution", "answer"),)),
    "deepmath": Preset(readers.deepmath, (("question", "final_answer", "difficulty", "topic", "r1_solution_1"),)),
    "olympiad_bench": Preset(readers.olympiad_bench, (("question", "solution", "final_answer", "subfield"),)),
    "metamath_qa": Preset(readers.metamath_qa, (("query", "response", "type"),)),
    "math_instruct": Preset(readers.math_instruct, (("instruction", "output"),)),
    "aqua_rat": Preset(readers.aqua_rat, (("question", "options", "rationale", "correct"),)),
    "ape210k": Preset(readers.ape210k, (("original_text", "ans", "equation"), ("question", "result", "equation"))),
    "tal_scq5k": Preset(readers.tal_scq5k, (("problem", "answer_option_list", "answer_value"),)),
    "gsm8k": Preset(readers.gsm8k, (("question", "answer"),)),
    "math": Preset(
        readers.math,
        (("problem", "solution"), ("problem", "answer"), ("question", "solution"), ("question", "answer")),
    ),
    "deepscaler": Preset(readers.deepscaler, (("problem", "answer"), ("prompt", "answer"))),
    "orz": Preset(readers.orz, (("turns",), ("conversations",), ("messages",), ("0", "1")), array_column="turns"),
    "dapo": Preset(readers.dapo, (("prompt", "reward_model"), ("prompt", "solution"))),
    "skywork_or1": Preset(readers.dapo, (("prompt", "reward_model", "extra_info"),)),
    "am_deepseek_r1_distilled": Preset(traces.am_distilled, (("messages",), ("system", "conversations"))),
    "mixture_of_thoughts": Preset(traces.mixture_of_thoughts, (("messages", "source"),)),
    "s1k": Preset(traces.s1k, (("question", "solution", "cot_type"),)),
    "synthetic": Preset(traces.synthetic, (("prompt", "verification_info"), ("problem_id", "task_type", "messages"))),
    "open_math_reasoning": Preset(
        traces.open_math_reasoning, (("problem", "expected_answer", "generated_solution", "generation_model"),)
    ),
}
