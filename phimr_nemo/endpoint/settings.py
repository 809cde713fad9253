"""What can be said about an endpoint's settings before anything is sent."""

from __future__ import annotations

import os
import re
from typing import Final, Protocol
from urllib.parse import SplitResult, urlsplit

from phimr_nemo.errors import UserError


class Addressed(Protocol):
    """The part of a configuration that says where servers are and which variable holds their key."""

    @property
    def base_urls(self) -> tuple[str, ...]:
        """The servers."""
        ...

    @property
    def api_key_env(self) -> str | None:
        """The variable; None where no key is needed."""
        ...


VARIABLE_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def check_endpoint(config: Addressed) -> None:
    """Refuse an address or a key that cannot work.

    Raises:
        UserError: an address is no plain http(s) URL, or the variable of the key is not set.
    """
    for url in config.base_urls:
        parts = _split(url)
        # Credentials would be written into config.yaml and manifests; they are not repeated here either.
        if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
            raise UserError(
                f"the endpoint address of host {parts.hostname} carries credentials, a query or a fragment",
                rule="base_urls hold scheme, host, port and path only: they are recorded with the run",
                remedy="put the key into an environment variable and its name into api_key_env",
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise _no_address(f"endpoint address {url!r}")
    read_key(config)


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port  # a bad one is found only when it is read
    except ValueError as error:
        raise _no_address(f"an endpoint address cannot be read ({error})") from error
    return parts


def _no_address(problem: str) -> UserError:
    return UserError(
        problem,
        rule="an address is http:// or https:// with a host, up to and with the version",
        remedy="for example http://localhost:8000/v1",
    )


def read_key(config: Addressed) -> str | None:
    """The key from the environment; None for an endpoint without one.

    Raises:
        UserError: the variable is not set, or holds what cannot stand in a header.
    """
    if config.api_key_env is None:
        return None
    if not VARIABLE_NAME.fullmatch(config.api_key_env):
        raise UserError(
            "api_key_env is not the name of an environment variable (it is not repeated here)",
            rule="a name is made of letters, digits and underscores; the key itself never stands in a setting",
            remedy="export ENDPOINT_KEY=..., and api_key_env=ENDPOINT_KEY",
        )
    key = os.environ.get(config.api_key_env, "").strip()
    if not key:
        raise UserError(
            f"the environment variable {config.api_key_env} is not set or empty",
            rule="api_key_env names the variable that holds the endpoint's key",
            remedy=f"export {config.api_key_env}=..., or api_key_env=null for an endpoint without a key",
        )
    if not key.isascii() or not key.isprintable():
        raise UserError(
            f"the environment variable {config.api_key_env} holds characters that no key has",
            rule="a key is one line of printable ASCII characters",
            remedy="set the variable to the key alone",
        )
    return key
