"""Engines behind a protocol: vLLM in process, rollout servers, endpoints, and weights on their way to them."""
