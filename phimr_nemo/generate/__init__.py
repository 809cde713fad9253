"""Sampling responses: the protocol every engine offers, the built-in engine, and the rollout step."""
