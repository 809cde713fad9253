"""The responses of a round, graded: their texts, whether they were cut off, and one verdict for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from phimr_nemo.align.grpo.rewards import Graded
from phimr_nemo.data.chat import response_text
from phimr_nemo.errors import UserError
from phimr_nemo.generate.sampler import Completion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from phimr_nemo.align.grpo.rollouts import Prompt


class GradesAnswers(Protocol):
    """What a round needs of `verify.Grader`."""

    def grade_many(self, pairs: Sequence[tuple[str, str]], cut_off: Sequence[bool]) -> Sequence[Any]:
        """A verdict for each (response, answer), and whether the response was cut off."""
        ...


def verdicts_of(
    grader: GradesAnswers, responses: Sequence[str], answers: Sequence[str], cut_off: Sequence[bool]
) -> Sequence[Any]:
    """Verdicts of a round's responses.

    Args:
        grader: which grades.
        responses: their texts.
        answers: of their problems.
        cut_off: whether each ended at the token limit.

    Raises:
        UserError: the grader raises, or answers for another number of responses.
    """
    rule = "the grader returns one verdict a response"
    try:
        verdicts = grader.grade_many(list(zip(responses, answers, strict=True)), cut_off)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the reward of {len(responses)} responses raised {type(error).__name__}: {error}",
            rule=rule,
            remedy="look at the cause above; the run continues at its newest checkpoint with the same command",
        ) from error
    if len(verdicts) != len(responses):
        raise UserError(
            f"the reward gave {len(verdicts)} verdicts for {len(responses)} responses",
            rule=rule,
            remedy="correct the grader: a verdict that is missing would move all later ones to other responses",
        )
    return verdicts


def graded_completions(
    grader: GradesAnswers | None,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    max_new_tokens: int,
) -> list[Graded]:
    """Responses with their verdicts; without a grader there are none.

    Args:
        grader: which grades.
        tokenizer: of the model.
        prompts: of each response.
        completions: the responses.
        max_new_tokens: the longest that each could have been (tokens).

    Raises:
        UserError: as :func:`verdicts_of`.
    """
    answers = [prompt.answer for prompt in prompts]
    texts = [
        response_text(tokenizer, prompt.token_ids, completion.token_ids)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    cut_off = [completion.finish_reason == "length" for completion in completions]
    verdicts = [None] * len(texts) if grader is None else verdicts_of(grader, texts, answers, cut_off)
    return [
        Graded(
            text,
            answer,
            "" if verdict is None else verdict.verdict,
            len(completion.token_ids),
            max_new_tokens,
            is_truncated=is_cut_off,
            reason=str(getattr(verdict, "reason", "")),
        )
        for text, answer, verdict, completion, is_cut_off in zip(
            texts, answers, verdicts, completions, cut_off, strict=True
        )
    ]
