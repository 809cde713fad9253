"""The result of an evaluation; a test changes what matters to it."""

from __future__ import annotations

import dataclasses
from typing import Any

from phimr_nemo.evaluate.evaluate import Result

PLAIN = Result(
    questions=1,
    samples=2,
    pass1=0.0,
    stderr=0.1,
    pass_at_k={},
    majority=0.0,
    truncated=0.0,
    stopped=1.0,
    unparsable=0.0,
    ungraded=0.0,
    mean_tokens=10.0,
    by_difficulty={},
    per_question={},
    majority_at_k={},
    lengths=None,
)


def plain_result(pass1: float, *, samples: int = 2, **changes: Any) -> Result:
    """`PLAIN` with a score, the same for every k, and other values."""
    scores = {"pass1": pass1, "pass_at_k": {1: pass1, samples: pass1}, "majority": pass1, "samples": samples}
    return dataclasses.replace(PLAIN, **{**scores, **changes})
