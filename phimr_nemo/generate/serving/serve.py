"""The command `phimr serve`: how a server of rollouts is started. Needs no torch until it starts one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from phimr_nemo.config.engine import COLOCATED_SHARE, OWN_SHARE
from phimr_nemo.errors import UserError
from phimr_nemo.generate.serving.served import Served, ServedLongRope, api_key


def serve(
    model: Annotated[Path, typer.Argument(help="The run's base: a Hugging Face directory.")],
    max_length: Annotated[int, typer.Option(help="Prompt and response together: the run's sequence_length.")],
    engine: Annotated[
        Literal["vllm", "trtllm"], typer.Option(help="Of the run's engine.kind: vllm_server or trtllm_server.")
    ] = "vllm",
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16"], typer.Option(help="What to compute in: the run's model.dtype.")
    ] = "bf16",
    host: Annotated[str, typer.Option(help="Where to listen; other than loopback needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Where to listen.")] = 8000,
    api_key_env: Annotated[str | None, typer.Option(help="The environment variable that holds the key.")] = None,
    tensor: Annotated[int, typer.Option(help="GPUs that share the model.")] = 1,
    max_batch: Annotated[int, typer.Option(help="Sequences computed together.")] = 256,
    memory_share: Annotated[
        float | None,
        typer.Option(
            help="Of each GPU's memory, for weights and KV cache; trtllm: of what the weights leave free. Default "
            f"{OWN_SHARE}, with --colocated {COLOCATED_SHARE}."
        ),
    ] = None,
    longrope: Annotated[
        ServedLongRope, typer.Option(help="The run's model.longrope.")
    ] = "long_when_max_length_exceeds_original",
    weights_directory: Annotated[
        Path | None, typer.Option(help="The run's engine.directory; without it weights come over HTTP.")
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
    name: Annotated[
        str | None,
        typer.Option(help="vllm: what clients call the model; the digest of its weights stays a name of it."),
    ] = None,
    colocated: Annotated[
        bool,
        typer.Option(help="vllm: on the trainer's GPUs, asleep while it computes: the run's engine.colocated=true."),
    ] = False,
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
        (COLOCATED_SHARE if colocated else OWN_SHARE) if memory_share is None else memory_share,
        longrope,
        weights_directory,
        eager,
        refit_directory,
        name,
        colocated,
    )
    # What can be wrong without the engine is said before it is loaded.
    api_key(served)
    if name is not None and not name.strip():
        raise UserError(f"--name {name!r}", rule="a name is not empty", remedy="for example --name my-model")
    if engine == "trtllm":
        _serve_trtllm(served)
    else:
        _serve_vllm(served)


def _serve_vllm(served: Served) -> None:
    if served.refit_directory is not None:
        raise _not_of("vllm", f"--refit-directory {served.refit_directory}")
    try:
        from phimr_nemo.generate.serving.vllm_server import run_server
    except ImportError as error:
        raise UserError(
            f"phimr serve: vLLM cannot be imported here ({error})",
            rule="vLLM has an environment of its own",
            remedy="make setup-vllm, then .venv-vllm/bin/phimr serve ...",
        ) from error
    run_server(served)


def _serve_trtllm(served: Served) -> None:
    from phimr_nemo.generate.serving.trtllm_engine import find_program

    if served.eager:
        raise _not_of("trtllm", "--eager")
    if served.name is not None:
        raise _not_of("trtllm", f"--name {served.name}")
    if served.colocated:
        raise _not_of("trtllm", "--colocated")
    # Before torch is loaded.
    program = find_program()
    try:
        from phimr_nemo.generate.serving.trtllm_server import run_server
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
