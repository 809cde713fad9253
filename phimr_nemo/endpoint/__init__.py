"""OpenAI-compatible endpoints: a client that retries; and questions to any model, with a cache and a budget."""

from __future__ import annotations

from phimr_nemo.endpoint.ask import Answers, AskedEndpoint, Asker, OpensModel, Prompt, Replied
from phimr_nemo.endpoint.journal import Journal, read_journal
from phimr_nemo.endpoint.settings import read_key
from phimr_nemo.endpoint.wire import ChatReply, ChatRequest, RequestFailed, ScoreRequest

__all__ = [
    "Answers",
    "AskedEndpoint",
    "Asker",
    "ChatReply",
    "ChatRequest",
    "Journal",
    "OpensModel",
    "Prompt",
    "Replied",
    "RequestFailed",
    "ScoreRequest",
    "read_journal",
    "read_key",
]
