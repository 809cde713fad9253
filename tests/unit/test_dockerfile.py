"""The container recipe, as far as it can be checked without building it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from phimr_nemo.jobs.node import GENERATION

REPOSITORY = Path(__file__).resolve().parents[2]
TEXT = (REPOSITORY / "Dockerfile").read_text("utf-8")
# Instructions, continued lines joined, comments dropped.
INSTRUCTIONS = re.sub(r"\s*\\\n\s*", " ", re.sub(r"^\s*#.*\n", "", TEXT, flags=re.MULTILINE)).split("\n")


def pins(text: str) -> dict[str, str]:
    return dict(re.findall(r"^\s*([A-Za-z0-9_.-]+)==([\w.]+)", text, flags=re.MULTILINE))


def test_what_it_adds_is_what_the_tests_run_with() -> None:
    tested = pins((REPOSITORY / "requirements" / "constraints-cpu.txt").read_text("utf-8"))
    added = pins(TEXT)
    assert {"math-verify", "antlr4-python3-runtime", "tenacity"} <= added.keys()
    assert {name: tested.get(name) for name in added} == added


def test_the_image_is_the_users_to_name() -> None:
    assert [line for line in INSTRUCTIONS if line.startswith(("ARG", "FROM"))] == [
        "ARG NEMO_IMAGE=nvidia/nemo",
        "ARG NEMO_TAG=25.07",
        "FROM ${NEMO_IMAGE}:${NEMO_TAG}",
    ]


def test_what_the_image_has_of_aligners_neighbours_stays(tmp_path: Path) -> None:
    """The loop is run with a stand-in of pip on which modelopt is installed."""
    program = tmp_path / "python3"
    log = tmp_path / "log"
    installed = '[[ "$5" == nvidia-modelopt ]]'
    program.write_text(f'#!/bin/bash\nif [[ $3 == show ]]; then {installed}; else echo "${{@: -1}}" >>"{log}"; fi\n')
    program.chmod(0o755)
    (loop,) = (line.removeprefix("RUN ") for line in INSTRUCTIONS if line.startswith("RUN while"))
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    subprocess.run(["bash", "-euo", "pipefail", "-c", loop], cwd=REPOSITORY, env=environment, check=True)
    wanted = pins((REPOSITORY / "requirements" / "aligner.txt").read_text("utf-8"))
    assert "nvidia-modelopt" in wanted
    assert pins(log.read_text("utf-8")) == {k: v for k, v in wanted.items() if k != "nvidia-modelopt"}


def test_the_images_own_constraints_are_lifted_before_anything_is_installed() -> None:
    assert INSTRUCTIONS.index("ENV PIP_CONSTRAINT=") < min(
        number for number, line in enumerate(INSTRUCTIONS) if "pip install" in line
    )


def test_nothing_of_the_image_is_replaced_or_left_behind() -> None:
    installs = [
        part for line in INSTRUCTIONS if line.startswith("RUN") for part in line.split("&&") if "pip install" in part
    ]
    assert len(installs) == 3
    for install in installs:
        assert "--no-cache-dir" in install
        # A pin by name adds a package; anything else must not pull torch or NeMo anew.
        assert "--no-deps" in install or re.search(r"(\s[\w.-]+==[\w.]+)+\s*$", install), install
    assert not {"torch", "nemo-toolkit", "nemo_toolkit", "megatron-core", *GENERATION} & pins(TEXT).keys()


def test_files_that_it_copies_exist() -> None:
    for line in INSTRUCTIONS:
        if line.startswith("COPY"):
            source = line.split()[1]
            assert (REPOSITORY / source).exists(), line


def test_the_build_fails_on_another_generation() -> None:
    assert any(line.startswith("RUN") and "check_versions('grpo'" in line for line in INSTRUCTIONS)
