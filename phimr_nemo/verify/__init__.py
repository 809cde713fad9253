"""Grading of final answers: one grader for data, reward and evaluation. docs/verification.md holds the policy."""

from __future__ import annotations

from phimr_nemo.verify.answer import Grader, grade
from phimr_nemo.verify.verdict import GRADER_VERSION, Verdict

__all__ = ["GRADER_VERSION", "Grader", "Verdict", "grade"]
