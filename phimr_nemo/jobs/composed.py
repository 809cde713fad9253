"""Stages that ask a model of what lies above them: it is opened here and handed down."""

from __future__ import annotations

from typing import Any

from phimr_nemo.config import PrepareConfig, VerifyConfig
from phimr_nemo.data.prepare import stage as prepare
from phimr_nemo.generate.asking import open_asked
from phimr_nemo.verify import stage as verify


def run_prepare(config: PrepareConfig) -> dict[str, Any]:
    """:func:`phimr_nemo.data.prepare.stage.run_prepare` with any engine as the annotator."""
    return prepare.run_prepare(config, open_asked)


def run_verify(config: VerifyConfig) -> dict[str, Any] | None:
    """:func:`phimr_nemo.verify.stage.run_verify` with any engine as the judge."""
    return verify.run_verify(config, open_asked)
