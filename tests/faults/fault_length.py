"""Whether the long form of these tests runs (`make faults`)."""

from __future__ import annotations

import os

LONG = os.environ.get("PHIMR_FAULTS") == "long"
