"""Kills a stage again and again, at counted calls and at random moments.

    killed_stage.py STAGE CONFIG ROOT KILLS SEED

Everything is imported once; each run of the stage is a fork, which dies by SIGKILL or finishes. A run that was killed
is started again in the same directory until one finishes; then the next directory is begun. Prints one line of JSON.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

from phimr_nemo.config import STAGES, load_config
from phimr_nemo.jobs.launch import run_stage, stage_function

COUNTED = ("open", "fsync", "replace", "rename", "chmod", "mkdir", "unlink")


def start(stage: str, config: Path, output: Path, fatal: int | None) -> int:
    """Fork a run of the stage; the child kills itself before the call number `fatal`, if that is given."""
    child = os.fork()
    if child:
        return child
    calls = itertools.count(1)

    def counted(function):  # type: ignore[no-untyped-def]
        def counting(*arguments, **options):  # type: ignore[no-untyped-def]
            if next(calls) == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return counting

    try:
        for name in COUNTED:
            setattr(os, name, counted(getattr(os, name)))
        run_stage(stage, load_config(STAGES[stage], config, [f"run.output={output}"]))
        if fatal is None and output.name == "clean":
            output.with_name("calls").write_text(str(next(calls) - 1))
    except BaseException:  # noqa: BLE001 - whatever it is, this fork must not go on as its parent
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def main() -> None:
    stage, config, root = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    wanted, draw = int(sys.argv[4]), random.Random(int(sys.argv[5]))
    stage_function(stage)
    began = time.monotonic()
    assert os.waitpid(start(stage, config, root / "clean", None), 0)[1] == 0
    seconds = time.monotonic() - began
    calls = int((root / "calls").read_text())
    by_call = by_moment = directories = 0
    while by_call + by_moment < wanted:
        output = root / f"killed-{directories}"
        directories += 1
        while True:
            by_clock = draw.random() < 0.5
            enough = by_call + by_moment >= wanted
            fatal = None if by_clock or enough else draw.randint(1, calls)
            child = start(stage, config, output, fatal)
            if by_clock and not enough:
                time.sleep(draw.uniform(0.0, seconds))
                os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            if status == 0:
                break
            assert status == signal.SIGKILL, f"the stage ended with status {status}"
            by_call, by_moment = by_call + (not by_clock), by_moment + by_clock
    print(json.dumps({"by_call": by_call, "by_moment": by_moment, "directories": directories, "calls": calls}))


if __name__ == "__main__":
    main()
