"""A judge, an annotator: what a section `ask` describes, opened when the first question comes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from phimr_nemo.config import AskConfig, EndpointEngine, LocalEngine, VLLMEngine
from phimr_nemo.data.chat import render_turns, response_text
from phimr_nemo.endpoint import Answers, AskedEndpoint, ChatReply, Prompt, Replied, RequestFailed
from phimr_nemo.errors import UserError
from phimr_nemo.generate.engines import SampledModel, TokenEngine, named_by_weights, open_engine, params_of
from phimr_nemo.generate.sampler import Completion, Request, SamplingParams
from phimr_nemo.model.architecture import Architecture, is_readable
from phimr_nemo.store.content import content_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SEED: Final = "ask"


def open_asked(config: AskConfig) -> Answers:
    """What answers the questions of a judge or an annotator.

    Raises:
        UserError: the variable with an endpoint's key is not set, or a directory holds no readable model.
    """
    if isinstance(config.engine, EndpointEngine):
        return AskedEndpoint(config, config.engine)
    assert config.path is not None, "the configuration has a model for an engine in this process"
    return AskedModel(config, config.engine, config.path)


class AskedModel:
    """A model in this process; see :class:`phimr_nemo.endpoint.Answers`.

    Args:
        config: how it is asked.
        engine: what samples.
        directory: the model's.
    """

    def __init__(self, config: AskConfig, engine: LocalEngine | VLLMEngine, directory: Path) -> None:
        self._config, self._engine, self._directory = config, engine, directory
        self._opened: TokenEngine[Any] | None = None

    @cached_property
    def name(self) -> str:
        """The hash of its weights."""
        return named_by_weights(self._directory)

    @property
    def settings(self) -> str:
        """Precision and LongRoPE's factors, and the engine: two of them round differently."""
        config = self._config
        return f"{self._engine.kind} {self._engine.dtype} {config.longrope} {config.sequence_length}"

    @cached_property
    def _longest(self) -> int:
        asked = self._config.sequence_length
        if not is_readable(self._directory):
            return asked
        return min(asked, Architecture.from_directory(self._directory).max_position_embeddings)

    def answer(self, questions: Iterator[tuple[str, Prompt]], replied: Replied) -> int:
        """Answer `max_batch` questions together, and then the next.

        A question that spells a special token, or leaves no room for the reply, is refused like one that a server
        refuses.

        Raises:
            UserError: see :func:`phimr_nemo.generate.engines.open_engine`.
        """
        params = params_of(self._config)
        while batch := list(islice(questions, self._engine.max_batch)):
            opened = self._open(params)
            requests = [request for key, prompt in batch if (request := self._request(opened, key, prompt, replied))]
            prompts = {request.id: request.prompt_ids for request in requests}
            for completion in opened.sampler.sample(requests, params) if requests else ():
                reply = _reply(opened.tokenizer, completion, prompts[completion.request_id])
                replied(completion.request_id, reply)
        return 0

    def _open(self, params: SamplingParams) -> TokenEngine[Any]:
        if self._opened is None:
            model = SampledModel(directory=self._directory, longrope=self._config.longrope, max_length=self._longest)
            self._opened = open_engine(self._engine, model, params)
        return self._opened

    def _request(self, opened: TokenEngine[Any], key: str, prompt: Prompt, replied: Replied) -> Request | None:
        turns = [{"role": "system", "content": prompt.system}, {"role": "user", "content": prompt.user}]
        try:
            ids = render_turns(opened.tokenizer, turns)
        except UserError as error:
            replied(key, RequestFailed(str(error), attempts=1, refused=True))
            return None
        room = self._longest - self._config.max_new_tokens
        if len(ids) > room:
            replied(key, RequestFailed(f"{len(ids)} tokens, {room} allowed", attempts=1, refused=True))
            return None
        return Request(key, tuple(ids), content_seed(SEED, key))

    def close(self) -> None:
        """Free the engine, if a question has opened it."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None


def _reply(tokenizer: PreTrainedTokenizerFast, completion: Completion, prompt_ids: tuple[int, ...]) -> ChatReply:
    ids = completion.token_ids
    return ChatReply(
        text=response_text(tokenizer, prompt_ids, ids[:-1] if completion.finish_reason == "stop" else ids),
        reasoning="",
        finish_reason=completion.finish_reason,
        prompt_tokens=len(prompt_ids),
        completion_tokens=len(ids),
    )
