"""Settings of OpenAI-compatible endpoints (vLLM, SGLang, trtllm-serve, an API): teachers, judges, annotators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated

from pydantic import Field, JsonValue

from phimr_nemo.config.common import NonNegative, Positive, config

Seconds = Annotated[float, Field(gt=0.0)]
Price = Annotated[float, Field(ge=0.0)]


@config
class Prices:
    """What tokens cost, in any one currency, for a million of them."""

    input_per_million: Price
    output_per_million: Price


@config
class EndpointConfig:
    """An OpenAI-compatible endpoint.

    Attributes:
        base_urls: its addresses up to and with the version, as `http://host:8000/v1`; requests go round them,
            and one that fails is rested.
        model: the model's name there.
        api_key_env: the environment variable that holds the key; None for a server without one.
        concurrency: requests under way together, over all addresses.
        idle_seconds: a reply that sends nothing for so long is given up and asked for again; the wait in the
            server's own queue counts.
        total_seconds: one attempt takes at most this long.
        attempts: how often a request is tried before it counts as failed.
        backoff_seconds: the wait before the second attempt is drawn from 0 to this, and the bound doubles
            with each further one.
        prices: for the account of costs.
        extra_body: more fields of the request's body, for settings of one server alone.
    """

    base_urls: Annotated[tuple[str, ...], Field(min_length=1)]
    model: str
    api_key_env: str | None = None
    concurrency: Positive
    idle_seconds: Seconds
    total_seconds: Seconds
    attempts: Positive
    backoff_seconds: Seconds
    prices: Prices | None = None
    extra_body: Mapping[str, JsonValue] = field(default_factory=dict)


@config
class AskConfig:
    """A small model behind an endpoint that answers short questions: a judge, an annotator.

    Attributes:
        max_tokens: of one reply.
        max_requests, max_total_tokens, max_cost: the budget of one process's journal of replies, earlier runs
            included; None = no limit. Tokens and costs are known afterwards: up to `concurrency` replies more
            than the budget may come.
    """

    endpoint: EndpointConfig
    temperature: Annotated[float, Field(ge=0.0)]
    max_tokens: Positive
    max_requests: NonNegative | None = None
    max_total_tokens: NonNegative | None = None
    max_cost: Price | None = None
