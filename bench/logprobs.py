"""Peak memory and time of loss + log-probabilities with gradients: chunked (ours) against full logits.

    python bench/logprobs.py [--quick] [--tokens 16384] [--vocabulary 200064] [--hidden 128] [--chunk 1024]
                             [--repeats 3]

The peer is what transformers and TRL do: all logits in one matrix product, float32, log_softmax, gather. Each
measurement runs in a child process of its own, forward and backward of the mean loss, and reports the peak
resident set (VmHWM) minus the resident set right before the call, so weights and inputs are not counted on
either side while the gradients of both are. The hidden size is small by default because the memory in question
does not depend on it, while a CPU core would need about half an hour at 3,072.

Full logits at 16,384 x 200,064 need three float32 matrices of 13 GB. Where they do not fit into the memory that
is free, the peer is measured at the largest power-of-two number of tokens that does, and again at half of it;
its memory for all tokens is then the straight line through both, and the result says that it is extrapolated.
Times are compared at equal tokens only: medians of alternating runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from common import MIB, in_child, machine, print_result, status_bytes, versions

FLOAT32_BYTES = 4
FULL_LOGITS_COPIES = 3
"""Logits, their log_softmax, and the gradient of one of them live at the same time in the peer's backward."""
MEMORY_SHARE = 0.4
"""Of the free memory, what the peer may take: the machine may be shared."""
DESIGN_TARGET = 0.1
AGREEMENT = 1e-4
"""Relative, on loss and gradient norms: float32 sums over a vocabulary in two orders."""
QUICK = {"tokens": 1024, "vocabulary": 32_064, "hidden": 64, "chunk": 64}


def measure(method: str, tokens: int, vocabulary: int, hidden_size: int, chunk: int) -> dict[str, float]:
    """Run one method once in this process; bytes above the resting size, and seconds."""
    import torch

    from phimr_nemo.losses import token_logprobs

    torch.manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    weight = torch.randn(vocabulary, hidden_size).mul_(hidden_size**-0.5).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,))

    def full_logits() -> torch.Tensor:
        logprobs = torch.log_softmax((hidden @ weight.T).float(), dim=-1)
        return logprobs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    def chunked() -> torch.Tensor:
        return token_logprobs(hidden, weight, labels, chunk_size=chunk)

    # A first small product makes the libraries allocate what they keep, so that neither side pays for it.
    (hidden[:2] @ weight[:2].T).sum().backward()
    hidden.grad = weight.grad = None
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present size
    before, started = status_bytes("VmRSS"), time.perf_counter()
    loss = -{"full": full_logits, "chunked": chunked}[method]().mean()
    loss.backward()
    seconds = time.perf_counter() - started
    assert hidden.grad is not None
    assert weight.grad is not None
    return {
        "bytes": status_bytes("VmHWM") - before,
        "seconds": seconds,
        "loss": loss.item(),
        "hidden_gradient_norm": hidden.grad.norm().item(),
        "weight_gradient_norm": weight.grad.norm().item(),
    }


def measure_in_child(method: str, tokens: int, options: argparse.Namespace) -> dict[str, float]:
    arguments = ["--child", method, "--tokens", str(tokens)]
    for name in ("vocabulary", "hidden", "chunk"):
        arguments += [f"--{name}", str(getattr(options, name))]
    result = in_child(__file__, arguments, environment={})
    print(
        f"| {method:8} | {tokens:7,} | {result['bytes'] / MIB:10,.0f} | {result['seconds']:8.2f} "
        f"| {result['loss']:.6f} |",
        flush=True,
    )
    return result


def available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable")


def tokens_that_fit(options: argparse.Namespace) -> int:
    """The largest power of two of tokens (at most all of them) whose full logits fit into our share."""
    per_token = FULL_LOGITS_COPIES * FLOAT32_BYTES * options.vocabulary
    fitting = int(available_bytes() * MEMORY_SHARE) // per_token
    if fitting >= options.tokens:
        return int(options.tokens)
    if fitting < 2:
        raise RuntimeError(
            f"the logits of 2 tokens x {options.vocabulary:,} do not fit into {MEMORY_SHARE} of free memory"
        )
    return int(2 ** (fitting.bit_length() - 1))


def compare(options: argparse.Namespace) -> dict[str, object]:
    """Print the table and return the figures for the RESULT line."""
    print(f"float32, vocabulary {options.vocabulary:,}, hidden {options.hidden}, chunk {options.chunk}")
    print("| method   |  tokens | peak MiB   | seconds  | loss     |\n|---|---|---|---|---|")
    fitting = tokens_that_fit(options)
    ours = measure_in_child("chunked", options.tokens, options)
    # Alternating, so that what else the machine does falls on both.
    pairs = [
        (measure_in_child("chunked", fitting, options), measure_in_child("full", fitting, options))
        for _ in range(options.repeats)
    ]
    same, peer = pairs[0]
    for quantity in ("loss", "hidden_gradient_norm", "weight_gradient_norm"):
        if abs(same[quantity] - peer[quantity]) > AGREEMENT * abs(peer[quantity]):
            raise RuntimeError(f"the two methods disagree on {quantity}: {same[quantity]} and {peer[quantity]}")
    peer_bytes = peer["bytes"]
    if fitting < options.tokens:
        half = measure_in_child("full", fitting // 2, options)
        per_token = (peer["bytes"] - half["bytes"]) / (fitting - fitting // 2)
        peer_bytes += per_token * (options.tokens - fitting)
        print(f"full logits, extrapolated to {options.tokens:,} tokens: {peer_bytes / MIB:,.0f} MiB")
    seconds, peer_seconds = (statistics.median(pair[side]["seconds"] for pair in pairs) for side in (0, 1))
    ratio = ours["bytes"] / peer_bytes
    print(f"memory at {options.tokens:,} tokens: {ratio:.4f} of the peer's (target <= {DESIGN_TARGET})")
    print(f"time at {fitting:,} tokens: {seconds / peer_seconds:.2f} of the peer's (medians of {options.repeats})")
    return {
        "bench": "logprobs",
        "tokens": options.tokens,
        "vocabulary": options.vocabulary,
        "hidden": options.hidden,
        "chunk": options.chunk,
        "peer": "full logits, log_softmax, gather",
        "ours_peak_mib": round(ours["bytes"] / MIB, 1),
        "peer_peak_mib": round(peer_bytes / MIB, 1),
        "ratio": round(ratio, 5),
        "target": DESIGN_TARGET,
        "peer_peak_extrapolated_from_tokens": None if fitting == options.tokens else fitting,
        "ours_seconds": round(ours["seconds"], 3),
        "same_tokens": {
            "tokens": fitting,
            "ours_peak_mib": round(same["bytes"] / MIB, 1),
            "peer_peak_mib": round(peer["bytes"] / MIB, 1),
            "ours_seconds": round(seconds, 3),
            "peer_seconds": round(peer_seconds, 3),
            "time_ratio": round(seconds / peer_seconds, 3),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--vocabulary", type=int, default=200_064)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3, help="timed pairs of runs at equal tokens")
    parser.add_argument("--child", choices=["full", "chunked"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        sizes = (options.tokens, options.vocabulary, options.hidden, options.chunk)
        print(json.dumps(measure(options.child, *sizes)))
        return
    if options.quick:
        parser.set_defaults(**QUICK)
        options = parser.parse_args()
    result = compare(options)
    import torch

    print_result({**result, "versions": versions("torch"), "machine": machine(threads=torch.get_num_threads())})


if __name__ == "__main__":
    main()
