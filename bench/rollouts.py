"""Rollouts, tokens/s: the built-in sampler against transformers.generate.

    python bench/rollouts.py [--quick] [--device cpu] [--dtype float32] [--prompts 32] [--samples 8]
                             [--new-tokens 256] [--hidden 128] [--layers 4] [--repeats 3]

Same random Phi3-architecture model, same prompts, same sampling (temperature 1, whole distribution), same number
of threads, and for both one batch of all `prompts x samples` sequences; alternating runs, medians. A token counts
until its sequence's stop token, that included; padding and what a finished row still computes do not.

Two cases: `equal`, where nothing stops and every response has the limit's length, and `long tail`, where each token
ends its response with a fixed probability, so that the mean length is about a quarter of the limit while the longest
reach it, as reasoning traces of one group do. The headline is the long tail; both are in the result. Before timing,
greedy tokens of both must be equal.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from common import machine, print_result, versions

from phimr_nemo.generate.local.engine import LocalSampler
from phimr_nemo.generate.sampler import Request, SamplingParams
from phimr_nemo.model.architecture import Architecture

VOCABULARY = 512
HEAD_DIM = 16
GROUP = 4
"""Query heads that share a key-value head."""
SHORTEST_PROMPT, LONGEST_PROMPT = 16, 40
PAD = 0
FIRST_ORDINARY = 8
"""Ids below are kept for padding and stop tokens."""
MEAN_SHARE = 0.25
"""Mean length over the limit in the long-tail case."""
GREEDY_TOKENS = 24
TARGET = 5.0
QUICK = {"prompts": 8, "samples": 4, "new_tokens": 48, "repeats": 1}


def make_model(options: argparse.Namespace) -> Any:
    """A random model of the Phi-4-mini architecture, no larger than asked."""
    from transformers import Phi3Config, Phi3ForCausalLM

    heads = options.hidden // HEAD_DIM
    config = Phi3Config(
        vocab_size=VOCABULARY,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // GROUP),
        partial_rotary_factor=0.75,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=PAD,
        eos_token_id=PAD,
        pad_token_id=PAD,
        initializer_range=0.05,
    )
    torch.manual_seed(0)
    model = Phi3ForCausalLM(config).to(getattr(torch, options.dtype)).to(options.device).eval()
    model.generation_config.eos_token_id = None
    return model


def make_prompts(count: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(SHORTEST_PROMPT, LONGEST_PROMPT + 1, (count,), generator=generator).tolist()
    return [tuple(torch.randint(FIRST_ORDINARY, VOCABULARY, (n,), generator=generator).tolist()) for n in lengths]


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def run_ours(
    sampler: LocalSampler, requests: list[Request], params: SamplingParams, device: str
) -> tuple[int, float]:
    """Counted tokens and seconds."""
    synchronize(device)
    started = time.perf_counter()
    done = sampler.sample(requests, params)
    synchronize(device)
    return sum(len(c.token_ids) for c in done), time.perf_counter() - started


@torch.inference_mode()
def run_peer(
    model: Any, requests: list[Request], params: SamplingParams, stops: list[int], device: str
) -> tuple[int, float, list[list[int]]]:
    """Counted tokens, seconds, and the tokens: left-padded, all sequences in one batch."""
    longest = max(len(r.prompt_ids) for r in requests)
    ids = torch.full((len(requests), longest), PAD)
    for row, request in enumerate(requests):
        ids[row, longest - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(requests):
        mask[row, longest - len(request.prompt_ids) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    greedy = params.temperature == 0.0
    sampling = {} if greedy else {"temperature": params.temperature, "top_k": 0, "top_p": 1.0}
    synchronize(device)
    started = time.perf_counter()
    out = model.generate(
        ids,
        attention_mask=mask,
        do_sample=not greedy,
        max_new_tokens=params.max_new_tokens,
        eos_token_id=stops or None,
        pad_token_id=PAD,
        **sampling,
    )
    synchronize(device)
    seconds = time.perf_counter() - started
    rows = out[:, longest:].tolist()
    counts = [next((i + 1 for i, token in enumerate(row) if token in stops), len(row)) for row in rows]
    return sum(counts), seconds, rows


def make_sampler(model: Any, stops: list[int], batch: int, options: argparse.Namespace) -> LocalSampler:
    return LocalSampler(
        Architecture.from_hf_config(model.config.to_dict()),
        [(name, tensor) for name, tensor in model.state_dict().items() if name != "lm_head.weight"],
        stop_token_ids=stops,
        max_batch=batch,
        longrope_policy="long_when_max_length_exceeds_original",
        max_length=LONGEST_PROMPT + options.new_tokens,
        dtype=getattr(torch, options.dtype),
        device=options.device,
    )


def check_equal(model: Any, requests: list[Request], options: argparse.Namespace) -> None:
    """Both must be the same model: greedy tokens of a few prompts, one by one in float32 (padding aside)."""
    if options.dtype != "float32":
        return
    params = SamplingParams(0.0, 1.0, GREEDY_TOKENS)
    few = list({r.prompt_ids: r for r in requests}.values())[:4]
    ours = make_sampler(model, [], 4, options).sample(few, params)
    for request, completion in zip(few, ours, strict=True):
        _, _, rows = run_peer(model, [request], params, [], options.device)
        if tuple(rows[0]) != completion.token_ids:
            raise RuntimeError("greedy tokens differ: the two do not compute the same model")


def stop_ids(options: argparse.Namespace) -> list[int]:
    """As many stop tokens as make the mean length a quarter of the limit, were all tokens equally likely."""
    return list(range(1, 1 + max(1, round(VOCABULARY / (MEAN_SHARE * options.new_tokens)))))


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Print the table and return the figures for the RESULT line."""
    model = make_model(options)
    prompts = make_prompts(options.prompts)
    requests = [
        Request(f"{p}/{s}", prompt, seed=p * options.samples + s)
        for p, prompt in enumerate(prompts)
        for s in range(options.samples)
    ]
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{parameters / 1e6:.2f} M parameters, {options.dtype} on {options.device}, "
        f"{torch.get_num_threads()} threads, "
        f"{options.prompts} prompts x {options.samples} samples, at most {options.new_tokens} new tokens"
    )
    check_equal(model, requests, options)
    params = SamplingParams(1.0, 1.0, options.new_tokens)
    print("| case | engine | tokens | seconds | tokens/s |\n|---|---|---:|---:|---:|")
    speeds: dict[str, tuple[float, float]] = {}
    for case, stops in (("equal", []), ("long tail", stop_ids(options))):
        sampler = make_sampler(model, stops, len(requests), options)
        run_ours(sampler, requests[:2], params, options.device)
        measured: dict[str, list[float]] = {"ours": [], "transformers": []}
        for _ in range(options.repeats):
            tokens, seconds = run_ours(sampler, requests, params, options.device)
            peer_tokens, peer_seconds, _ = run_peer(model, requests, params, stops, options.device)
            for engine, count, took in (("ours", tokens, seconds), ("transformers", peer_tokens, peer_seconds)):
                measured[engine].append(count / took)
                print(f"| {case} | {engine} | {count:,} | {took:.2f} | {count / took:,.0f} |", flush=True)
        speeds[case] = (statistics.median(measured["ours"]), statistics.median(measured["transformers"]))
    (ours, peer), (ours_equal, peer_equal) = speeds["long tail"], speeds["equal"]
    print(f"long tail: {ours / peer:.2f} times the peer (target >= {TARGET}); equal: {ours_equal / peer_equal:.2f}")
    return {
        "bench": "rollouts",
        "unit": "tokens/s",
        "parameters": parameters,
        "sequences": len(requests),
        "new_tokens": options.new_tokens,
        "ours": round(ours),
        "peer": round(peer),
        "ratio": round(ours / peer, 3),
        "ours_equal": round(ours_equal),
        "peer_equal": round(peer_equal),
        "ratio_equal": round(ours_equal / peer_equal, 3),
        "target": TARGET,
    }


def environment(options: argparse.Namespace) -> dict[str, Any]:
    device = options.device if options.device == "cpu" else torch.cuda.get_device_name()
    return {
        "versions": versions("torch", "transformers"),
        "machine": machine(device=device, dtype=options.dtype, threads=torch.get_num_threads()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds; the figures mean little")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if options.quick:
        vars(options).update(QUICK)
    print_result({**compare(options), **environment(options)})


if __name__ == "__main__":
    main()
