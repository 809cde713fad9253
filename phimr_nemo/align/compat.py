"""NeMo-Aligner's trainers as this project uses them: imported without TensorRT-LLM, with one clean progress bar.

Nothing of the trainers' behaviour is changed here. What upstream needs to be imported at all:

- `nemo_aligner.utils.trt_llm` imports TensorRT-LLM at module level, for a generator that we do not use; where it is
  installed it would start MPI in every rank.
- Models of NeMo 1, its text generation, a tokenizer of tables and scikit-learn's metrics are imported, with all that
  they need, to be named in annotations and in functions that we do not call.
- NeMo scripts a few functions with TorchScript while it is imported; TorchScript cannot read the factories
  that `training.platform` redirects on a machine without CUDA, and eager functions do the same there.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Final

import torch
import torch.distributed as dist

from phimr_nemo.store.progress import Progress

_NAMED_ONLY: Final = (
    "nemo_aligner.utils.trt_llm",
    "nemo_aligner.models.nlp.gpt.gpt_reward_model",
    "nemo_aligner.models.nlp.gpt.megatron_gpt_reinforce_actor",
    "nemo.collections.common.tokenizers.tabular_tokenizer",
    "nemo.collections.nlp.modules.common.text_generation_utils",
    "sklearn.metrics",
)


class _Placeholder(types.ModuleType):
    """A module whose every name is an empty class."""

    def __getattr__(self, name: str) -> type:
        return type(name, (), {})


@contextlib.contextmanager
def _named_only(modules: Iterable[str]) -> Iterator[None]:
    """Within it, modules that were not imported before are placeholders."""
    absent = [module for module in modules if module not in sys.modules]
    sys.modules.update({module: _Placeholder(module) for module in absent})
    try:
        yield
    finally:
        for module in absent:
            del sys.modules[module]


@contextlib.contextmanager
def _importable() -> Iterator[None]:
    from nemo.utils import logging as nemo_logging

    nemo_logging.setLevel(logging.WARNING)
    scripting = bool(torch.jit._state._enabled)
    if not torch.cuda.is_available():
        torch.jit._state.disable()
    try:
        with _named_only(_NAMED_ONLY):
            yield
    finally:
        if scripting:
            torch.jit._state.enable()


with _importable():
    from nemo.collections.nlp.data.language_modeling.megatron.megatron_batch_samplers import (
        MegatronPretrainingBatchSampler,
    )
    from nemo_aligner.algorithms import dpo as _dpo
    from nemo_aligner.algorithms import reinforce as _reinforce
    from nemo_aligner.models.alignable_interface import AlignableGenerativeInterface

DPOTrainer: Any = _dpo.DPOTrainer
ReinforceTrainer: Any = _reinforce.ReinforceTrainer

__all__ = [
    "AlignableGenerativeInterface",
    "DPOTrainer",
    "MegatronPretrainingBatchSampler",
    "ReinforceTrainer",
    "show_progress_of",
]


class StageProgress:
    """What the trainers take for tqdm: a stage's progress on process 0, with a few of their numbers.

    It counts a step when the trainer reports on it, which happens once a step and at its end.
    """

    SHOWN: Final = {
        "dpo": ("train_loss", "train_accuracy"),
        "grpo": ("train_reward", "train_pass_rate", "train_response_length", "train_loss"),
        "distill": ("train_reverse_kl", "train_pass_rate", "train_response_length", "train_loss"),
    }

    def __init__(
        self, iterable: Iterable[Any], *, stage: str, total: int, initial: int = 0, desc: str = "", **_: Any
    ) -> None:
        del desc  # Upstream's word for it.
        self._iterable, self._title = iterable, stage
        hidden = dist.get_rank() != 0
        self._progress = Progress(total, title=self._title, unit="step", done=initial, hidden=hidden)

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._iterable
        finally:
            self._progress.close()

    def set_postfix(self, values: Mapping[str, Any]) -> None:
        """Show the few numbers that a person watches, and count the step."""
        shown = self.SHOWN.get(self._title, ())
        self._progress.show({n.removeprefix("train_"): f"{values[n]:.3f}" for n in shown if n in values})
        self._progress.update()


def show_progress_of(stage: str) -> None:
    """Name the trainers' progress after the stage that this process is for."""
    _dpo.tqdm = _reinforce.tqdm = partial(StageProgress, stage=stage)
