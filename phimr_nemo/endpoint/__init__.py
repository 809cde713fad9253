"""OpenAI-compatible endpoints: a client that retries, and questions with a cache and a budget."""

from __future__ import annotations

from phimr_nemo.endpoint.ask import Asker, Prompt
from phimr_nemo.endpoint.client import EndpointClient, RequestFailed
from phimr_nemo.endpoint.journal import Journal, read_journal
from phimr_nemo.endpoint.settings import check_endpoint
from phimr_nemo.endpoint.wire import ChatReply, ChatRequest

__all__ = [
    "Asker",
    "ChatReply",
    "ChatRequest",
    "EndpointClient",
    "Journal",
    "Prompt",
    "RequestFailed",
    "check_endpoint",
    "read_journal",
]
