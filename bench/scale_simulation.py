"""Start-up, checkpoints, weight sync and the 10 M-rollout array at up to 1,024 GPUs, simulated (docs/scale.md).

    python bench/scale_simulation.py [--quick]

There is no peer: every figure follows from the assumptions below, which are printed with it.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

import numpy as np
from common import machine, print_result, versions

from phimr_nemo.plan.simulate import Job, Site, best_interval, run_array, save, start_up, weight_sync

GPUS = (8, 64, 128, 256, 512, 1024)
# A site: 8 GPUs and 8 x 400 Gb/s a node, of which one process reaches one adapter; a parallel file system of 100 GB/s
# and 50,000 opens a second; 0.1 ms for a small message of the store. 50,677 GPU hours between failures: "The Llama 3
# Herd of Models" (arXiv 2407.21783), section 3.3.4: 419 unexpected interruptions in 54 days on 16,384 GPUs.
SITE = Site(
    gpus_per_node=8,
    storage_bandwidth=100e9,
    storage_operations=50_000,
    node_bandwidth=50e9,
    # Measured by bench/weight_sync.py with Phi-4-mini's shapes on two busy cores: 7.7 GB in 32 and in 9 s.
    http_bandwidth=7.7e9 / 32,
    file_bandwidth=7.7e9 / 9,
    message_seconds=1e-4,
    hours_between_failures=16_384 * 54 * 24 / 419,
)
PARAMETERS = 3.84e9
# bf16 weights, and fp32 weights with Adam's two moments.
JOB = Job(
    package_files=30_000,
    package_bytes=8e9,
    import_seconds=10.0,
    model_bytes=2 * PARAMETERS,
    state_bytes=(2 + 4 + 4 + 4) * PARAMETERS,
    files_per_rank=2,
    # 46 kB for the tiny model's 48 entries, measured; a 3.8 B model has 32 layers instead of 4.
    index_bytes_per_rank=46_200 * 8,
)
# The array: 1,000 shards of 10,000 rollouts. A shard's length has a long tail: log-normal around its mean.
SHARDS = 1_000
SHARD_HOURS = 8.0
SPREAD = 0.3
RESTART_SECONDS = 600.0
TASKS = (64, 128, 256, 512)
GPUS_PER_TASK = 1
FAILURE_FACTORS = (1, 10, 100)
"""How much less reliable than the site above."""


def traffic() -> list[dict[str, float]]:
    rows = []
    print("| GPUs | code | rendezvous | model | checkpoint | save: bytes | files | process 0 | interval (min) |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for gpus in GPUS:
        start, saved = start_up(SITE, JOB, gpus), save(SITE, JOB, gpus)
        interval = best_interval(SITE, gpus, sum(saved.values())) / 60
        parts = [*start.values(), *saved.values()]
        print(f"| {gpus:,} | " + " | ".join(f"{value:.2f}" for value in parts) + f" | {interval:.0f} |")
        rows.append(
            {"gpus": gpus, "start": sum(start.values()), "save": sum(saved.values()), "interval": interval * 60}
        )
    return rows


def syncs() -> list[dict[str, float]]:
    rows = []
    print("\n| rollout servers | from process 0 | shared directory | tree |\n|---:|---:|---:|---:|")
    for servers in (1, 8, 32, 128, 512, 1024):
        seconds = weight_sync(SITE, JOB.model_bytes, servers)
        print(f"| {servers:,} | " + " | ".join(f"{value:.1f}" for value in seconds.values()) + " |")
        rows.append({"servers": servers, **seconds})
    return rows


def arrays(seeds: int) -> list[dict[str, float]]:
    rows = []
    print("\n| tasks | failures | keeps | hours (standard error) | of the ideal | failures | work done twice (%) |")
    print("|---:|---:|---|---:|---:|---:|---:|")
    for tasks in TASKS:
        for factor in FAILURE_FACTORS:
            for keeps in (0.0, 1.0):
                hours, failures, lost, ideal = [], [], [], []
                for seed in range(seeds):
                    draw = np.random.default_rng(seed)
                    shards = 3600 * SHARD_HOURS * draw.lognormal(-(SPREAD**2) / 2, SPREAD, SHARDS)
                    rate = factor * GPUS_PER_TASK / SITE.hours_between_failures / 3600
                    run = run_array(
                        shards.tolist(),
                        tasks,
                        failures_per_second=rate,
                        restart_seconds=RESTART_SECONDS,
                        keeps=keeps,
                        draw=draw,
                    )
                    hours.append(run.seconds / 3600)
                    ideal.append(shards.sum() / tasks / 3600)
                    failures.append(run.failures)
                    lost.append(100 * run.lost_seconds / shards.sum())
                mean, error = float(np.mean(hours)), float(np.std(hours, ddof=1) / np.sqrt(seeds))
                share = mean / float(np.mean(ideal))
                kept = "responses (journal)" if keeps else "finished shards"
                print(
                    f"| {tasks} | x{factor} | {kept} | {mean:.1f} ({error:.1f}) | {share:.2f} | "
                    f"{np.mean(failures):.1f} | {np.mean(lost):.2f} |"
                )
                rows.append({"tasks": tasks, "factor": factor, "keeps": keeps, "hours": mean, "of_ideal": share})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="3 seeds instead of 20")
    options = parser.parse_args()
    print(f"site: {asdict(SITE)}\njob: {asdict(JOB)}\n")
    result = {"traffic": traffic(), "weight_sync": syncs(), "arrays": arrays(3 if options.quick else 20)}
    print_result({**result, "peer": None, "versions": versions("numpy", "phimr-nemo"), "machine": machine()})


if __name__ == "__main__":
    main()
