"""The key of an endpoint, from the environment."""

from __future__ import annotations

import os
from typing import Protocol

from phimr_nemo.errors import UserError
from phimr_nemo.redact import shown_variable


class Addressed(Protocol):
    """The part of a configuration that says which variable holds a server's key."""

    @property
    def api_key_env(self) -> str | None:
        """The variable; None where no key is needed."""
        ...


def read_key(config: Addressed) -> str | None:
    """The key from the environment; None for an endpoint without one.

    Raises:
        UserError: the variable is not set, or holds what cannot stand in a header.
    """
    if config.api_key_env is None:
        return None
    key = os.environ.get(config.api_key_env, "").strip()
    shown = shown_variable(config.api_key_env)
    if not key:
        raise UserError(
            f"the environment variable {shown} is not set or empty",
            rule="api_key_env names the variable that holds the endpoint's key",
            remedy=f"export {shown}=..., or api_key_env=null for an endpoint without a key",
        )
    if not key.isascii() or not key.isprintable():
        raise UserError(
            f"the environment variable {shown} holds characters that no key has",
            rule="a key is one line of printable ASCII characters",
            remedy="set the variable to the key alone",
        )
    return key
