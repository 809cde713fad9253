"""Runs in vLLM's environment: sample several models after each of several weight syncs, in one process.

    python vllm_sync_worker.py OUT.json MODEL... [--stale MODEL...]

MODEL is a directory with `hf/` and `weights/0.safetensors`, `weights/1.safetensors`, ...; those behind --stale are
sampled, after fewer syncs, with the planted fault of `vllm_stale_head`. OUT gets, for each model in that order, a
list, one entry a sync, of lists of {"prompt", "tokens", "logprobs", "greedy", "version"}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from phimr_nemo.config import VLLMEngine
from phimr_nemo.generate.sampler import Request, SamplingParams
from phimr_nemo.generate.serving import vllm

STALE, FAULT = "--stale", "vllm_stale_head.Extension"
MAX_LENGTH, NEW_TOKENS, TEMPERATURE, STALE_SYNCS = 64, 16, 0.8, 2
PROMPTS = [tuple(range(1, 2 + length)) for length in (1, 5, 11, 20)]


def synced(model: Path, weights: list[Path]) -> list[list[dict[str, Any]]]:
    """Sync, sample at a temperature and greedily, with one file of weights after another."""
    options = VLLMEngine(kind="vllm", max_batch=8, memory_share=0.5, bucket_mb=1, eager=True)
    sampler = vllm.VLLMSampler(model, options, dtype="fp32", max_length=MAX_LENGTH, stop_ids=[0])
    requests = [Request(f"{number}", prompt, 100 + number) for number, prompt in enumerate(PROMPTS)]
    syncs = []
    for version, file in enumerate(weights):
        sampler.update_weights(load_file(file).items(), version)
        sampled = sampler.sample(requests, SamplingParams(TEMPERATURE, 1.0, NEW_TOKENS))
        greedy = sampler.sample(requests, SamplingParams(0.0, 1.0, NEW_TOKENS))
        syncs.append(
            [
                {
                    "prompt": request.prompt_ids,
                    "tokens": drawn.token_ids,
                    "logprobs": drawn.logprobs,
                    "greedy": best.token_ids,
                    "version": drawn.version,
                }
                for request, drawn, best in zip(requests, sampled, greedy, strict=True)
            ]
        )
    sampler.close()
    return syncs


def main(out: Path, arguments: list[str]) -> None:
    """Sample model after model, and write what came."""
    found = []
    syncs = None
    for argument in arguments:
        if argument == STALE:
            vllm.WORKER_EXTENSION, syncs = FAULT, STALE_SYNCS  # type: ignore[misc]
            continue
        weights = sorted((Path(argument) / "weights").iterdir(), key=lambda file: int(file.stem))
        found.append(synced(Path(argument) / "hf", weights[:syncs]))
    out.write_text(json.dumps(found), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
