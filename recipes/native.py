"""Mid-training and SFT in NeMo 2.0's own style: factories of `llm.train`, for NeMo-Run's command line and executors.

    python -m recipes --yes --factory "phi4mini_midtrain(base='models/phi-4-mini')" optim.config.lr=2e-5

In Python, with any executor: `run.run(midtrain_recipe(base="models/phi-4-mini"), executor=...)`. See
:mod:`phimr_nemo.supervised.native` for what `phimr midtrain` and `phimr sft` do beyond it.
"""

from pathlib import Path
from typing import Any, Literal, Optional

import nemo_run as run

from phimr_nemo.config import STAGES, SupervisedConfig, load_config
from phimr_nemo.errors import exit_with_message
from phimr_nemo.supervised.native import TRAIN, Stage, native_parts
from recipes.midtrain import PAPER as MIDTRAIN_PAPER
from recipes.sft import PAPER as SFT_PAPER

# NeMo-Run reads the annotations of factories: real types, not their names.


@run.cli.factory(target=TRAIN, name="phi4mini_midtrain")
def midtrain_recipe(
    base: Optional[str] = None,  # noqa: UP045
    data: Optional[str] = None,  # noqa: UP045
    dir: Optional[str] = None,  # noqa: UP045
    config: str = MIDTRAIN_PAPER,
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
    config: str = SFT_PAPER,
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
    """The command line of `llm.train` with these factories: `python -m recipes`."""
    with exit_with_message():
        run.cli.main(TRAIN, default_factory=midtrain_recipe)
