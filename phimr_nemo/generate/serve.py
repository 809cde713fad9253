"""The command `phimr serve`: how a server of rollouts is started. Needs no torch until it starts one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

import typer

from phimr_nemo.errors import UserError

LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")
ServedLongRope = Literal["long_when_max_length_exceeds_original", "always_short"]
"""The policies that vLLM and TensorRT-LLM can follow; they do not know a sequence's final length."""


@dataclass(frozen=True)
class Served:
    """How a model is served.

    Attributes:
        model: a Hugging Face directory of the Phi3 family.
        max_length: prompt and response together (tokens).
        dtype: what to compute in.
        host, port: where it listens; other hosts than loopback need a key.
        api_key_env: the environment variable with the key.
        tensor: GPUs that share the model.
        max_batch: sequences computed together.
        memory_share: of each GPU's memory; for TensorRT-LLM, of what the weights leave free.
        longrope: the training run's policy.
        weights_directory: where the trainer leaves buckets for this server; None = they come over HTTP.
        eager: no CUDA graphs and no compilation.
        refit_directory: where TensorRT-LLM's checkpoints are kept; None = shared memory where there is such.
    """

    model: Path
    max_length: int
    dtype: Literal["fp32", "bf16"]
    host: str
    port: int
    api_key_env: str | None
    tensor: int
    max_batch: int
    memory_share: float
    longrope: ServedLongRope
    weights_directory: Path | None
    eager: bool
    refit_directory: Path | None


def serve(
    model: Annotated[Path, typer.Argument(help="The run's base: a Hugging Face directory.")],
    max_length: Annotated[int, typer.Option(help="Prompt and response together: the run's sequence_length.")],
    engine: Annotated[
        Literal["vllm", "trtllm"], typer.Option(help="Of the run's sampler.kind: vllm_server or trtllm_server.")
    ] = "vllm",
    dtype: Annotated[
        Literal["fp32", "bf16"], typer.Option(help="What to compute in: the run's model.dtype.")
    ] = "bf16",
    host: Annotated[str, typer.Option(help="Where to listen; other than loopback needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Where to listen.")] = 8000,
    api_key_env: Annotated[str | None, typer.Option(help="The environment variable that holds the key.")] = None,
    tensor: Annotated[int, typer.Option(help="GPUs that share the model.")] = 1,
    max_batch: Annotated[int, typer.Option(help="Sequences computed together.")] = 256,
    memory_share: Annotated[
        float,
        typer.Option(help="Of each GPU's memory, for weights and KV cache; trtllm: of what the weights leave free."),
    ] = 0.9,
    longrope: Annotated[
        ServedLongRope, typer.Option(help="The run's model.longrope.")
    ] = "long_when_max_length_exceeds_original",
    weights_directory: Annotated[
        Path | None, typer.Option(help="The run's sampler.directory; without it weights come over HTTP.")
    ] = None,
    eager: Annotated[bool, typer.Option(help="vllm: no CUDA graphs and no compilation.")] = False,
    refit_directory: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            writable=True,
            help="trtllm: where the weights it runs on are kept; default shared memory.",
        ),
    ] = None,
) -> None:
    """A server of rollouts for `phimr grpo`, which sends it new weights. Runs in its engine's environment."""
    served = Served(
        model,
        max_length,
        dtype,
        host,
        port,
        api_key_env,
        tensor,
        max_batch,
        memory_share,
        longrope,
        weights_directory,
        eager,
        refit_directory,
    )
    # What can be wrong without the engine is said before it is loaded.
    api_key(served)
    if engine == "trtllm":
        _serve_trtllm(served)
    else:
        _serve_vllm(served)


def _serve_vllm(served: Served) -> None:
    if served.refit_directory is not None:
        raise _not_of("vllm", f"--refit-directory {served.refit_directory}")
    try:
        from phimr_nemo.generate.vllm_server import run_server
    except ImportError as error:
        raise UserError(
            f"phimr serve: vLLM cannot be imported here ({error})",
            rule="vLLM has an environment of its own",
            remedy="make setup-vllm, then .venv-vllm/bin/phimr serve ...",
        ) from error
    run_server(served)


def _serve_trtllm(served: Served) -> None:
    from phimr_nemo.generate.trtllm_engine import find_program

    if served.eager:
        raise _not_of("trtllm", "--eager")
    # Before torch is loaded.
    program = find_program()
    try:
        from phimr_nemo.generate.trtllm_server import run_server
    except ImportError as error:
        raise UserError(
            f"phimr serve --engine trtllm: {error}",
            rule="the server in front of trtllm-serve needs the packages of phimr-nemo[trtllm] and torch",
            remedy="pip install them in TensorRT-LLM's environment, without changing its versions",
        ) from error
    run_server(served, program)


def _not_of(engine: str, option: str) -> UserError:
    return UserError(
        f"phimr serve --engine {engine} with {option}",
        rule="an option that an engine does not have is refused, never ignored",
        remedy=f"leave {option.split()[0]} out",
    )


def api_key(served: Served) -> str | None:
    """The server's key.

    Raises:
        UserError: there is none, and others than this machine could reach the server; or it is empty.
    """
    if served.api_key_env is None:
        if served.host not in LOOPBACK:
            raise UserError(
                f"--host {served.host} without a key",
                rule="whoever reaches the server can replace its weights: beyond loopback it asks for a key",
                remedy="export PHIMR_KEY=... and add --api-key-env PHIMR_KEY, here and in the run's sampler section",
            )
        return None
    key = os.environ.get(served.api_key_env, "").strip()
    if not key:
        raise UserError(
            f"the environment variable {served.api_key_env} is not set or empty",
            rule="--api-key-env names the variable that holds the key",
            remedy=f"export {served.api_key_env}=...",
        )
    return key
