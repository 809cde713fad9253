"""The files of an export, by name."""

from __future__ import annotations

from typing import Final

TRAIN: Final = "train.jsonl"
VALIDATION: Final = "validation.jsonl"
SETTINGS: Final = "config.yaml"
TABLE: Final = "counterparts.md"
SCHEDULE: Final = "schedule.json"
