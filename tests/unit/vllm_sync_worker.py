"""Runs in vLLM's environment: sample after each of several weight syncs, in process.

    python vllm_sync_worker.py MODEL WEIGHTS_DIRECTORY OUT.json [EXTENSION]

WEIGHTS_DIRECTORY has `0.safetensors`, `1.safetensors`, ...; OUT gets a list, one entry a file, of lists of
{"prompt", "tokens", "logprobs", "greedy", "version"}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from safetensors.torch import load_file

from phimr_nemo.config import VLLMEngine
from phimr_nemo.generate.sampler import Request, SamplingParams
from phimr_nemo.generate.serving import vllm

MAX_LENGTH, NEW_TOKENS, TEMPERATURE = 64, 16, 0.8
PROMPTS = [tuple(range(1, 2 + length)) for length in (1, 5, 11, 20)]


def main(model: Path, weights: Path, out: Path, extension: str | None) -> None:
    """Sync, sample at a temperature and greedily, and write what came."""
    if extension is not None:
        vllm.WORKER_EXTENSION = extension  # type: ignore[misc]
    options = VLLMEngine(kind="vllm", max_batch=8, memory_share=0.5, bucket_mb=1, eager=True)
    sampler = vllm.VLLMSampler(
        model,
        options,
        dtype="fp32",
        max_length=MAX_LENGTH,
        stop_ids=[0],
    )
    requests = [Request(f"{number}", prompt, 100 + number) for number, prompt in enumerate(PROMPTS)]
    syncs = []
    for version in range(len(list(weights.glob("*.safetensors")))):
        sampler.update_weights(load_file(weights / f"{version}.safetensors").items(), version)
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
    out.write_text(json.dumps(syncs), "utf-8")


if __name__ == "__main__":
    model, weights, out, *extension = sys.argv[1:]
    main(Path(model), Path(weights), Path(out), extension[0] if extension else None)
