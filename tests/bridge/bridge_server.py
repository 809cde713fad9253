"""Runs in the bridge's environment: imports Megatron-Bridge once, then forks the ranks of every request.

A request is a line of JSON {"function", "world_size", "arguments"} naming a function of bridge_worker.py; so is the
answer, [[ok, value], ...] by rank.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "parity"))


def main() -> None:
    # Whatever the packages print goes to stderr; the answers go where stdout was.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import distributed
    import torch

    from phimr_nemo.bridges import cpu

    torch.set_num_threads(1)
    cpu.prepare()
    import bridge_worker

    # Megatron-Bridge imports it when it saves, which every rank would do anew.
    import modelopt.torch  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        function = getattr(bridge_worker, request["function"])
        job = pickle.dumps((function, request["world_size"], request["arguments"], dict(os.environ)))
        with tempfile.TemporaryDirectory() as scratch:
            outcomes = distributed.run_ranks(job, Path(scratch))
        answers.write(json.dumps(outcomes) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
