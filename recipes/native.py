"""Mid-training and SFT in NeMo 2.0's own style: factories of `llm.train`, for NeMo-Run's command line and executors.

    python -m recipes --yes --factory "phi4mini_midtrain(base='models/phi-4-mini')" optim.config.lr=2e-5

In Python, with any executor: `run.run(midtrain_recipe(base="models/phi-4-mini"), executor=...)`. See
:mod:`phimr_nemo.supervised.native` for what `phimr midtrain` and `phimr sft` do beyond it.
"""

import sys
from pathlib import Path
from typing import Any, Final, Literal, Optional

import nemo_run as run
import typer
from nemo_run.cli.cli_parser import CLIException

from phimr_nemo.config import STAGES, SupervisedConfig, load_config
from phimr_nemo.errors import EXIT_USER, UserError
from phimr_nemo.supervised.native import TRAIN, Stage, native_parts
from recipes import default_preset

READER: Final = "nemo_run.cli"
"""What reads the command line: whatever it raises is about that."""
MIDTRAIN_PRESET, SFT_PRESET = default_preset("midtrain"), default_preset("sft")

# NeMo-Run reads the annotations of factories: real types, not their names.


@run.cli.factory(target=TRAIN, name="phi4mini_midtrain")
def midtrain_recipe(
    base: Optional[str] = None,  # noqa: UP045
    data: Optional[str] = None,  # noqa: UP045
    dir: Optional[str] = None,  # noqa: UP045
    config: str = MIDTRAIN_PRESET,
    num_nodes: int = 1,
    accelerator: str = "gpu",
) -> run.Partial:
    """Stage 1: distillation as mid-training, packed.

    Args:
        base: Hugging Face directory to start from; the config's when None, as the next two.
        data: packed rows.
        dir: where NeMo logs and saves, and the Hugging Face directory `hf` goes.
        config: YAML file; layouts for 1 to 128 GPUs lie in conf/midtrain.
        num_nodes: machines.
        accelerator: "gpu" or "cpu".

    Raises:
        UserError: a bad configuration or unfinished data.
    """
    return _recipe("midtrain", config, base, data, dir, num_nodes, accelerator)


@run.cli.factory(target=TRAIN, name="phi4mini_sft")
def sft_recipe(
    base: Optional[str] = None,  # noqa: UP045
    data: Optional[str] = None,  # noqa: UP045
    dir: Optional[str] = None,  # noqa: UP045
    config: str = SFT_PRESET,
    num_nodes: int = 1,
    accelerator: str = "gpu",
) -> run.Partial:
    """Stage 2: supervised fine-tuning on unpacked conversations; arguments as for :func:`midtrain_recipe`."""
    return _recipe("sft", config, base, data, dir, num_nodes, accelerator)


def _recipe(
    stage: Stage,
    config: str,
    base: str | None,
    data: str | None,
    output: str | None,
    nodes: int,
    accelerator: str,
) -> run.Partial:
    given = {"base": base, "data": data, "run.output": output}
    overrides = [f"{key}={value}" for key, value in given.items() if value is not None]
    resolved: Any = load_config(STAGES[stage], Path(config), overrides)
    return native_recipe(stage, resolved, nodes=nodes, accelerator="gpu" if accelerator == "gpu" else "cpu")


def native_recipe(
    stage: Stage, config: SupervisedConfig, *, nodes: int, accelerator: Literal["gpu", "cpu"]
) -> run.Partial:
    """A stage's configuration as a recipe; arguments as for :func:`phimr_nemo.supervised.native.native_parts`."""
    return run.Partial(TRAIN, **native_parts(stage, config, nodes=nodes, accelerator=accelerator, make=run.Config))


def main() -> None:
    """The command line of `llm.train` with these factories: `python -m recipes`.

    NeMo-Run's own would print an error and exit with 0.

    Raises:
        SystemExit: 0 done, 2 the user's mistake, 1 ours.
    """
    entry = TRAIN.cli_entrypoint
    entry.default_factory = midtrain_recipe
    app = typer.Typer(pretty_exceptions_enable=False)
    entry._add_command(app, is_main=True)
    try:
        app()
    except SystemExit as ended:
        sys.exit(EXIT_USER if ended.code and _is_users_mistake(ended) else ended.code)


def _is_users_mistake(error: BaseException | None) -> bool:
    """Whether the error, or one that it was raised in place of, is one in the command line or the configuration."""
    while error is not None:
        if isinstance(error, UserError | CLIException) or _raised_in(error).startswith(READER):
            return True
        error = error.__context__
    return False


def _raised_in(error: BaseException) -> str:
    """The module that raised it; nothing for an exit, which stands for another error."""
    place = error.__traceback__
    if place is None or isinstance(error, SystemExit | typer.Exit):
        return ""
    while place.tb_next is not None:
        place = place.tb_next
    return str(place.tb_frame.f_globals.get("__name__", ""))
