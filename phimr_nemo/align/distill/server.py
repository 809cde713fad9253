"""A served teacher: it is asked how probable it finds the prompts with the student's responses behind them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from phimr_nemo.align.microbatch import MicroBatch, used_lengths
from phimr_nemo.config import EndpointConfig
from phimr_nemo.endpoint import RequestFailed, ScoreRequest
from phimr_nemo.endpoint.client import EndpointClient
from phimr_nemo.errors import UserError
from phimr_nemo.losses import IGNORED_LABEL
from phimr_nemo.training.distributed import wait_for_all

RULE = "a served teacher returns the log-probabilities of a prompt given as token ids (completions with echo)"


class ServerTeacher:
    """Asks for every data-parallel rank's responses once, and shares what it hears with the replica.

    Args:
        endpoint: the teacher's.
    """

    def __init__(self, endpoint: EndpointConfig) -> None:
        self._endpoint = endpoint

    def log_probs(
        self,
        batch: Mapping[str, Tensor],
        micros: Sequence[MicroBatch],  # noqa: ARG002  of a teacher in this process
        temperature: float,
    ) -> Tensor:
        """As :class:`phimr_nemo.align.distill.teacher.Teacher` says; the temperature is 1.

        Raises:
            UserError: the server has no answer to a request, on all processes alike.
        """
        assert temperature == 1.0
        mine: tuple[int, Tensor | str] | None = None
        if parallel_state.get_model_parallel_group().rank() == 0 and parallel_state.get_context_parallel_rank() == 0:
            mine = (parallel_state.get_data_parallel_rank(), self._heard(batch))
        wait_for_all("the teacher has scored the responses")
        parts: list[tuple[int, Tensor | str] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, mine)
        heard = dict(part for part in parts if part is not None)
        for found in heard.values():
            if isinstance(found, str):
                raise UserError(
                    found,
                    rule=RULE,
                    remedy="look at the server, for vLLM at --max-logprobs and --max-model-len; the run continues at "
                    "its newest checkpoint with the same command",
                )
        result = heard[parallel_state.get_data_parallel_rank()]
        assert isinstance(result, Tensor)
        return result

    def _heard(self, batch: Mapping[str, Tensor]) -> Tensor | str:
        """The log-probabilities, or why there are none."""
        labels = batch["labels"]
        lengths = used_lengths(labels).tolist()
        asked = {
            row: (*batch["response_tokens"][row, :length].tolist(), int(labels[row, length - 1]))
            for row, length in enumerate(lengths)
            if length
        }
        try:
            scores = asyncio.run(self._ask(list(asked.values())))
        except RequestFailed as failed:
            return f"the teacher at {', '.join(self._endpoint.base_urls)}: {failed.reason}"
        except UserError as refused:
            return refused.problem
        result = torch.zeros(labels.shape, dtype=torch.float32)
        for row, values in zip(asked, scores, strict=True):
            result[row, : len(values)] = torch.tensor(values)
        return torch.where(labels == IGNORED_LABEL, 0.0, result)

    async def _ask(self, prompts: Sequence[tuple[int, ...]]) -> list[tuple[float, ...]]:
        async with EndpointClient(self._endpoint) as client:
            return list(await asyncio.gather(*(client.score(ScoreRequest(tokens)) for tokens in prompts)))
