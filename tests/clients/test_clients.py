"""A release in the hands of other people's libraries, each in an environment that has it. The table: docs/clients.md.

In the environments of `make setup`, `make setup-bridge` and, with `make clients`, in one of the newest releases.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from serving import free_port, served, up

from phimr_nemo.config import STAGES, load_config
from phimr_nemo.jobs.launch import run_stage
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.files.hf import HFDirectory, write_hf_directory
from phimr_nemo.model.origin import read_origin
from phimr_nemo.model.table import tensor_shapes

WORKER = Path(__file__).with_name("client_worker.py")
SHAPE = ("hidden_size=128", "num_attention_heads=4", "num_hidden_layers=2", "initializer_range=0.1")
TEXT = "What is 2+3?"
NEW_TOKENS = 8
MAX_LENGTH = 256
# Sums of a few hundred products in fp32, whose order the libraries choose.
LOGPROB_BOUND = 1e-4
NAME = "a-release"
CUT = "\N{REPLACEMENT CHARACTER}"
SECONDS = 900
LIKELY = """task: likely
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}} "
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}]
"""
ASKED = """task: asked
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: question
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["never"], do_sample: false, max_gen_toks: 6}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, exported."""
    work = tmp_path_factory.mktemp("release")
    base = [f"run.output={work / 'base'}", *SHAPE]
    run_stage("base", load_config(STAGES["base"], Path("conf/base/tiny.yaml"), base))
    settings = [f"run.output={work / 'run'}", f"model={work / 'base' / 'hf'}", "stages={}", "evaluations={}"]
    run_stage("export", load_config(STAGES["export"], Path("conf/export/tiny.yaml"), settings))
    return work / "run" / "hf"


def ask(interpreter: Path, work: Path, clients: list[str], **job: Any) -> dict[str, Any]:
    """Run clients in an environment."""
    work.mkdir(exist_ok=True)
    (work / "job.json").write_text(
        json.dumps({"clients": clients, "work": str(work), "text": TEXT, "new_tokens": NEW_TOKENS, **job})
    )
    environment = {**os.environ, "HF_HOME": str(work / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [str(interpreter), str(WORKER), str(work / "job.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("ANSWER "))
    answer: dict[str, Any] = json.loads(line.removeprefix("ANSWER "))
    for name, found in answer.items():
        print(f"{name} {found['version']}: passed")
    return answer


def check_training(release: Path, answer: dict[str, Any]) -> None:
    """What PEFT and TRL saved is a model of this project's again, with other weights and the same origin."""
    for saved in (answer["PEFT"]["merged"], answer.get("TRL SFT", {}).get("saved")):
        if saved is not None:
            made = HFDirectory(Path(saved))
            assert made.architecture == HFDirectory(release).architecture
            assert made.weights_hash() != HFDirectory(release).weights_hash()
            assert read_origin(Path(saved)) == read_origin(release)


def check_reading(answer: dict[str, Any], known: dict[str, Any]) -> None:
    """Another release of transformers finds the same."""
    found = answer["transformers"]
    assert found["inputs"] == ["attention_mask", "input_ids"]
    assert {name: found[name] for name in ("greedy", "ends")} == {name: known[name] for name in ("greedy", "ends")}
    pairs = zip(found["logprobs"], known["logprobs"], strict=True)
    assert max(abs(one - other) for one, other in pairs) < LOGPROB_BOUND


@pytest.fixture(scope="module")
def here(release: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What transformers 4.51 and PEFT find."""
    work = tmp_path_factory.mktemp("here")
    return ask(Path(sys.executable), work, ["transformers", "PEFT"], release=str(release))


def test_transformers_4_and_peft(release: Path, here: dict[str, Any]) -> None:
    assert here["transformers"]["version"].startswith("4.51.")
    assert here["transformers"]["inputs"] == ["attention_mask", "input_ids"]
    check_training(release, here)


def test_transformers_5_peft_and_trl(
    release: Path, here: dict[str, Any], bridge_python: Path, tmp_path: Path
) -> None:
    clients = ["transformers", "PEFT", "TRL SFT", "TRL DPO"]
    answer = ask(bridge_python, tmp_path, clients, release=str(release))
    assert answer["transformers"]["version"].startswith("5.")
    check_reading(answer, here["transformers"])
    check_training(release, answer)


def test_the_newest_transformers_peft_and_trl(
    release: Path, here: dict[str, Any], clients_python: Path, tmp_path: Path
) -> None:
    clients = ["transformers", "PEFT", "TRL SFT", "TRL DPO"]
    answer = ask(clients_python, tmp_path, clients, release=str(release))
    check_reading(answer, here["transformers"])
    check_training(release, answer)


def test_lm_evaluation_harness_over_both_modes_of_a_served_release(
    release: Path, clients_python: Path, vllm_python: Path, vllm_variables: dict[str, str], tmp_path: Path
) -> None:
    """The log-likelihoods and greedy texts of transformers, by a server."""
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    rows = [{"question": f"What is {a}+2?", "choices": [str(a + 2), str(a)], "answer": 0} for a in range(4)]
    (tasks / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("likely", LIKELY), ("asked", ASKED)):
        (tasks / f"{name}.yaml").write_text(text.replace("DATA", str(tasks / "data.jsonl")))
    options = ("--max-length", str(MAX_LENGTH), "--dtype", "fp32", "--eager", "--name", NAME)
    with served(vllm_python, vllm_variables, release, tmp_path / "server.log", *options) as (url, _):
        job = {"release": str(release), "tasks": str(tasks), "url": url, "name": NAME}
        found = ask(clients_python, tmp_path / "work", ["lm-evaluation-harness"], **job)["lm-evaluation-harness"]
    local, remote = found["hf"], found["local-completions"]
    # Of a character that is cut at the end transformers shows a mark, vLLM nothing.
    texts = [[text.rstrip(CUT) for row in way["asked"] for text in row] for way in (local, remote)]
    assert texts[0] == texts[1]
    assert all(texts[0])
    for one, other in zip(local["likely"], remote["likely"], strict=True):
        for (likelihood, is_greedy), (theirs, is_greedy_there) in zip(one, other, strict=True):
            assert math.isclose(float(likelihood), float(theirs), abs_tol=LOGPROB_BOUND * 10)
            assert is_greedy == is_greedy_there
    assert len(found["local-chat-completions"]["asked"]) == len(rows)


def test_the_commands_of_a_card_for_vllm_answer_its_question(
    release: Path, vllm_python: Path, vllm_variables: dict[str, str], tmp_path: Path
) -> None:
    """As they stand in README.md, in the directory of the weights; only the port is another.

    The program `vllm` of the CPU wheel ends at once, because it looks for the wheel under another name; the module
    that it starts takes the same options.
    """
    card = (release / "README.md").read_text("utf-8")
    serve, ask_it = card.partition("vLLM:\n\n```bash\n")[2].partition("```")[0].split("\n", 1)
    port = free_port()
    program, verb, model, *options = shlex.split(serve)
    assert (program, verb, model) == ("vllm", "serve", ".")
    module = (vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--model")
    command = [*map(str, module), model, *options, "--port", str(port)]
    with up(command, vllm_variables, port, tmp_path / "server.log", cwd=release):
        done = subprocess.run(
            ["bash", "-c", ask_it.replace(":8000/", f":{port}/")], capture_output=True, text=True, timeout=SECONDS
        )
    answer = json.loads(done.stdout)
    assert answer["model"] == "release"
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["usage"]["completion_tokens"] > 0


def test_a_converter_of_the_index_makes_a_gguf(clients_python: Path, shared_data: Path, tmp_path: Path) -> None:
    """With Phi-4-mini's own tokenizer: llama.cpp's converter knows tokenizers by name."""
    import torch

    real = shared_data / "phi4-mini"
    config = json.loads((real / "config.json").read_text("utf-8"))
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    pairs = int(small["hidden_size"] * config["partial_rotary_factor"]) // 2
    factors = {"short_factor": [1.0] * pairs, "long_factor": [1.0 + index for index in range(pairs)]}
    config |= {**small, "num_key_value_heads": 1, "rope_scaling": config["rope_scaling"] | factors}
    arch = Architecture.from_hf_config(config)
    generator = torch.Generator().manual_seed(0)
    weights = ((name, torch.randn(shape, generator=generator)) for name, shape in tensor_shapes(arch).items())
    write_hf_directory(tmp_path / "release", arch, weights, tokenizer_from=real)
    found = ask(clients_python, tmp_path / "work", ["GGUF"], release=str(tmp_path / "release"))["GGUF"]
    assert found["context"] == arch.max_position_embeddings
    assert found["original"] == arch.original_max_position_embeddings
    assert found["end"] in (199999, 200020)
