"""Open a sampler for a model directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from phimr_nemo.data.chat import load_tokenizer, render_prompts, stop_token_ids

if TYPE_CHECKING:
    import torch

    from phimr_nemo.config import LongRopePolicy
    from phimr_nemo.generate.local.engine import LocalSampler
    from phimr_nemo.model.files.hf import HFDirectory


def open_local(
    model: Path,
    user_turns: Sequence[str],
    *,
    max_new_tokens: int,
    max_batch: int,
    longrope: LongRopePolicy = "long_when_max_length_exceeds_original",
    dtype: torch.dtype | None = None,
) -> tuple[LocalSampler, str]:
    """A sampler in this process for a Hugging Face directory.

    Args:
        model: the directory.
        user_turns: what will be asked; the longest one and `max_new_tokens` decide the longest sequence, and
            with it LongRoPE's factors.
        max_new_tokens: of a response.
        max_batch: sequences computed together.
        longrope: the training run's policy.
        dtype: to compute in; float32 when None.

    Returns:
        The sampler, and the hash of its weights.

    Raises:
        UserError: an unreadable model or tokenizer.
    """
    from phimr_nemo.model.files.hf import HFDirectory
    from phimr_nemo.model.regime import warn_of_other_regime

    source = HFDirectory(model)
    longest = max(map(len, render_prompts(load_tokenizer(model), list(user_turns))), default=0)
    warn_of_other_regime(source.architecture, model, longest + max_new_tokens, longrope)
    sampler = local_sampler(
        source,
        max_length=longest + max_new_tokens,
        max_batch=max_batch,
        longrope=longrope,
        dtype=dtype,
    )
    return sampler, source.weights_hash()


def local_sampler(
    source: HFDirectory,
    *,
    max_length: int,
    max_batch: int,
    longrope: LongRopePolicy = "long_when_max_length_exceeds_original",
    dtype: torch.dtype | None = None,
) -> LocalSampler:
    """A sampler in this process, on its GPU where there is one.

    Args:
        source: the Hugging Face directory.
        max_length: prompt and response together; decides LongRoPE's factors.
        max_batch: sequences computed together.
        longrope: the training run's policy.
        dtype: to compute in; float32 when None.

    Raises:
        UserError: an unreadable model or tokenizer.
    """
    import torch

    from phimr_nemo.generate.local.engine import LocalSampler

    return LocalSampler(
        source.architecture,
        ((name, source.read(name)) for name in source.names()),
        stop_token_ids=stop_token_ids(load_tokenizer(source.path)),
        max_batch=max_batch,
        longrope_policy=longrope,
        max_length=max_length,
        dtype=dtype or torch.float32,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
