"""`phimr` with a sampler that differs from the trainer by a known amount.

    python -m recipes.ablations.mismatched DIAL grpo --config conf/grpo/tiny.yaml key=value ...

DIAL is one of

    none        the trainer's weights
    bf16        they are rounded to bfloat16
    int8        every row of a matrix is rounded to 255 levels of its own, as an int8 sampler keeps it
    noise=S     normal noise is added to every matrix, S times its root mean square, other noise with every version
    stale=K     the weights of K steps before; those of the first step until there are older ones

The run does not know: its sampler calls the weights current, as an engine with a fault does. One process only. Noise
follows from seed, tensor and version; a run that is resumed has no older weights than those that it resumes with.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from phimr_nemo.errors import UserError, exit_with_message
from phimr_nemo.generate.sampler import Completion, Request, Sampler, SamplingParams
from phimr_nemo.store.content import content_seed

if TYPE_CHECKING:
    import torch

    from phimr_nemo.config import RoundsConfig

Tensors = Iterable[tuple[str, "torch.Tensor"]]

INT8_LEVELS: Final = 127
"""On either side of 0."""
USAGE: Final = "none, bf16, int8, noise=S with S above 0, or stale=K with K from 1 to 8"
MOST_STALE: Final = 8
NO_WEIGHTS: Final = -1


@dataclass(frozen=True)
class Dial:
    """What differs between sampler and trainer, and by how much.

    Attributes:
        kind: none, bf16, int8, noise or stale.
        size: of the noise, relative to a matrix; steps of staleness; 0 for the others.
    """

    kind: str
    size: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Dial:
        """Read `noise=0.05`.

        Raises:
            UserError: it is none of them.
        """
        kind, _, value = text.partition("=")
        try:
            size = float(value or 0.0)
        except ValueError:
            size = -1.0
        fits = {
            "none": not value,
            "bf16": not value,
            "int8": not value,
            "noise": 0.0 < size < float("inf"),
            "stale": size in range(1, MOST_STALE + 1),
        }
        if not fits.get(kind, False):
            raise UserError(f"the mismatch {text!r}", rule=f"a mismatch is {USAGE}", remedy="for example noise=0.05")
        return cls(kind, size)


def mismatched(tensors: Tensors, dial: Dial, version: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights as the dial changes them; staleness changes none.

    Args:
        tensors: (name, tensor); vectors, which are norms and biases, are not rounded to int8 and get no noise.
        dial: what is done.
        version: of the weights; each has noise of its own.
    """
    import torch

    for name, tensor in tensors:
        if dial.kind == "bf16":
            yield name, tensor.to(torch.bfloat16).to(tensor.dtype)
        elif dial.kind == "int8" and tensor.dim() > 1:
            step = tensor.abs().amax(dim=-1, keepdim=True) / INT8_LEVELS
            yield name, torch.where(step > 0, (tensor / step).round() * step, tensor)
        elif dial.kind == "noise" and tensor.dim() > 1:
            generator = torch.Generator().manual_seed(content_seed("mismatch", name, str(version)))
            noise = torch.randn(tensor.shape, generator=generator).to(tensor)
            yield name, tensor + dial.size * tensor.square().mean().sqrt() * noise
        else:
            yield name, tensor


class MismatchedSampler:
    """A :class:`phimr_nemo.generate.sampler.Sampler` whose weights are not quite those that it was given.

    Args:
        sampler: what samples.
        dial: how its weights differ.
    """

    def __init__(self, sampler: Sampler, dial: Dial) -> None:
        self._sampler, self._dial, self._version = sampler, dial, NO_WEIGHTS
        steps = int(dial.size) if dial.kind == "stale" else 0
        self._kept: deque[dict[str, torch.Tensor]] = deque(maxlen=steps + 1)

    @property
    def version(self) -> int:
        """The version that it says it has; none until it is given weights, so that the first differ as well."""
        return self._version

    @property
    def counts(self) -> Mapping[str, int]:
        """The sampler's own."""
        return self._sampler.counts

    def update_weights(self, tensors: Tensors, version: int) -> None:
        """Give the sampler these weights, as the dial changes them, or older ones."""
        if self._dial.kind != "stale":
            self._sampler.update_weights(mismatched(tensors, self._dial, version), version)
        else:
            if version != self._version:
                self._kept.append({name: tensor.detach().clone() for name, tensor in tensors})
            self._sampler.update_weights(self._kept[0].items(), version)
        self._version = version

    def sample(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        """The sampler's own responses."""
        return self._sampler.sample(requests, params)

    def close(self) -> None:
        """Free what the sampler holds."""
        self._sampler.close()


def refuse_interruptions(config: RoundsConfig) -> None:
    """Responses of a dialled sampler are whole: which weights it takes is its dial's to say.

    Raises:
        UserError: new weights are to interrupt it.
    """
    if config.partial_rollouts == "continue":
        raise UserError(
            "partial_rollouts=continue with a dialled mismatch",
            rule="the sampler's weights are what the dial says, from a response's first token to its last",
            remedy="use partial_rollouts=wait max_concurrent_rollouts=null",
        )


def main(arguments: Sequence[str]) -> None:
    """Run `phimr` with the sampler of a run of rounds replaced.

    Raises:
        UserError: an unknown dial, several processes, or responses that new weights interrupt.
    """
    dial = Dial.parse(arguments[0] if arguments else "")
    # Importing the trainer takes seconds.
    from phimr_nemo.align.grpo import stage
    from recipes import phimr

    given: list[str] = []
    opened = stage.open_sampler

    def open_mismatched(config: RoundsConfig, *what: Any) -> Sampler:
        refuse_interruptions(config)
        given.append(dial.kind)
        return MismatchedSampler(opened(config, *what), dial)

    stage.open_sampler = open_mismatched  # type: ignore[assignment]
    phimr(list(arguments[1:]))
    if not given:
        raise UserError(
            "no sampler was opened in this process: it had finished, or it ran in several",
            rule="a mismatch is dialled in a run of rounds of one process",
            remedy="leave parallel.* out",
        )


if __name__ == "__main__":
    with exit_with_message():
        main(sys.argv[1:])
