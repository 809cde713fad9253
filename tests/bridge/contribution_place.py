"""A pytest plugin: puts the Phi-3 folder where a checkout of Megatron-Bridge would have it, in this process alone."""

from __future__ import annotations

from pathlib import Path

from phimr_nemo.bridges import cpu

cpu.prepare()

import megatron.bridge.models  # noqa: E402

megatron.bridge.models.__path__.append(str(Path(cpu.__file__).parent))
