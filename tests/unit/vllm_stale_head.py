"""A planted fault inside vLLM's workers: new weights without the repacking of the tied output layer."""

from __future__ import annotations

from phimr_nemo.generate.serving import vllm_worker

Extension = vllm_worker.Extension
vllm_worker.repack_tied_head = lambda model: None  # noqa: ARG005
