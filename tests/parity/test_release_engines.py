"""A release is read by what people run: transformers 4.51 here, transformers 5 and vLLM in their own environment."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from release_worker import asked
from safetensors.torch import load_file, save_file

from phimr_nemo.config import STAGES, load_config
from phimr_nemo.data import chat
from phimr_nemo.jobs.launch import run_stage
from phimr_nemo.model.adopt import adopt
from phimr_nemo.model.files.hf import HFDirectory
from phimr_nemo.model.origin import read_origin

WORKER = Path(__file__).with_name("release_worker.py")
# vLLM's attention on CPU needs heads of 32 numbers at least.
SHAPE = ("hidden_size=128", "num_attention_heads=4", "num_hidden_layers=2", "initializer_range=0.2")
MAX_LENGTH = 256
NEW_TOKENS = 12
# Sums of a few hundred products in fp32, whose order the engines choose. Measured: 0 by transformers 5.19, 9e-6 by
# vLLM 0.32.
LOGPROB_BOUND = 1e-4
FAULT = 1e-2
CONVERSATIONS = [
    [{"role": "user", "content": "What is 2+3?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Ann has 37 apples.\nHow many?"}],
    [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "<think>\n</think>\n2"},
        {"role": "user", "content": "And 2+2?"},
    ],
]

QUESTIONS = ["What is 2+3?", "<|system|>"]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, exported."""
    work = tmp_path_factory.mktemp("release")
    base = [f"run.output={work / 'base'}", *SHAPE]
    run_stage("base", load_config(STAGES["base"], Path("conf/base/tiny.yaml"), base))
    settings = [f"run.output={work / 'run'}", f"model={work / 'base' / 'hf'}", "stages={}", "evaluations={}"]
    run_stage("export", load_config(STAGES["export"], Path("conf/export/tiny.yaml"), settings))
    return work / "run" / "hf"


@pytest.fixture(scope="module")
def texts(release: Path) -> list[list[int]]:
    """Token ids of a prompt and of arbitrary text."""
    tokenizer = chat.load_tokenizer(release)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(5, len(tokenizer), (70,), generator=generator).tolist()
    return [chat.render_prompt(tokenizer, "What is 2+3?"), noise]


def ask(interpreter: Path, variables: dict[str, str], work: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Run the worker in the other environment."""
    (work / "job.json").write_text(json.dumps(job))
    # In this process vLLM leaves none behind when it is stopped.
    environment = {**variables, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [str(interpreter), str(WORKER), str(work / "job.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("ANSWER "))
    answer: dict[str, Any] = json.loads(line.removeprefix("ANSWER "))
    return answer


def reference(release: Path, texts: list[list[int]]) -> tuple[list[torch.Tensor], list[list[int]]]:
    """Log-probabilities and greedy continuations by transformers 4.51."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(release, torch_dtype=torch.float32)
    logprobs, greedy = [], []
    for ids in texts:
        tokens = torch.tensor([ids])
        with torch.no_grad():
            found = model(tokens).logits.log_softmax(-1)[0, :-1].gather(-1, tokens[0, 1:, None])[:, 0]
            longer = model.generate(tokens, max_new_tokens=NEW_TOKENS, do_sample=False)
        logprobs.append(found)
        greedy.append(longer[0, len(ids) :].tolist())
    return logprobs, greedy


def largest_difference(wanted: list[torch.Tensor], found: list[list[float]]) -> float:
    return max(float((one - torch.tensor(other)).abs().max()) for one, other in zip(wanted, found, strict=True))


def test_transformers_5_and_vllm_read_a_release(
    release: Path, texts: list[list[int]], vllm_python: Path, vllm_variables: dict[str, str], tmp_path: Path
) -> None:
    """Log-probabilities within a bound, greedy tokens, end tokens and rendered conversations equal."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    job = {
        "release": str(release),
        "texts": texts,
        "conversations": CONVERSATIONS,
        "questions": QUESTIONS,
        "new_tokens": NEW_TOKENS,
        "max_length": MAX_LENGTH,
        "engines": ["transformers", "vllm"],
    }
    answer = ask(vllm_python, vllm_variables, tmp_path, job)
    logprobs, greedy = reference(release, texts)
    tokenizer = AutoTokenizer.from_pretrained(release)
    prompts = [tokenizer.apply_chat_template(talk, add_generation_prompt=True) for talk in CONVERSATIONS]
    assert prompts[0] == chat.render_prompt(chat.load_tokenizer(release), CONVERSATIONS[0][0]["content"])
    assert answer["transformers"]["version"].startswith("5.")
    assert answer["transformers"]["class"] == "Phi3ForCausalLM"
    for engine, found in answer.items():
        assert found["prompts"] == prompts, engine
        assert found["ends"] == list(chat.stop_token_ids(tokenizer)), engine
        assert largest_difference(logprobs, found["logprobs"]) <= LOGPROB_BOUND, engine
        assert found["greedy"] == greedy, engine
    model = AutoModelForCausalLM.from_pretrained(release, torch_dtype=torch.float32)
    assert answer["transformers"]["asked"] == [asked(model, tokenizer, text, NEW_TOKENS) for text in QUESTIONS]


def test_what_transformers_5_saves_goes_on_as_the_same_model(
    release: Path, texts: list[list[int]], vllm_python: Path, vllm_variables: dict[str, str], tmp_path: Path
) -> None:
    """Through adoption back to transformers 4.51, and straight into a command."""
    from transformers import AutoTokenizer

    saved, adopted = tmp_path / "saved", tmp_path / "adopted"
    job = {"release": str(release), "saved": str(saved), "engines": ["saved again"]}
    assert ask(vllm_python, vllm_variables, tmp_path, job)["saved again"]["version"].startswith("5.")
    config = json.loads((saved / "config.json").read_text())
    assert {"rope_parameters", "dtype"} <= config.keys()
    before, after = HFDirectory(release), HFDirectory(saved)
    assert after.architecture == before.architecture
    assert after.weights_hash() == before.weights_hash()
    assert read_origin(saved) == read_origin(release)
    for kept in ("generation_config.json", "tokenizer.json"):
        assert (saved / kept).is_file()
    adopt(saved, adopted, system_prompt="Add.")
    assert (
        AutoTokenizer.from_pretrained(adopted)("1+1?")["input_ids"]
        == AutoTokenizer.from_pretrained(release)("1+1?")["input_ids"]
    )
    wanted, found = reference(release, texts), reference(adopted, texts)
    assert all(torch.equal(one, other) for one, other in zip(wanted[0], found[0], strict=True))
    assert wanted[1] == found[1]
    command = [sys.executable, "-m", "phimr_nemo.cli", "sample", str(saved), "What is 2+3?"]
    done = subprocess.run(
        [*command, "--max-new-tokens", "4"], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_a_swapped_key_and_value_would_be_seen(release: Path, texts: list[list[int]], tmp_path: Path) -> None:
    """The planted fault: the bound above is far below what a wrong tensor does."""
    wrong = tmp_path / "wrong"
    shutil.copytree(release, wrong)
    tensors = load_file(wrong / "model.safetensors")
    name = "model.layers.0.self_attn.qkv_proj.weight"
    rows = tensors[name].shape[0]
    config = json.loads((wrong / "config.json").read_text())
    width = config["hidden_size"] // config["num_attention_heads"] * config["num_key_value_heads"]
    queries, keys, values = tensors[name].split([rows - 2 * width, width, width])
    tensors[name] = torch.cat([queries, values, keys])
    save_file(tensors, wrong / "model.safetensors", metadata={"format": "pt"})
    logprobs, _ = reference(release, texts)
    found, _ = reference(wrong, texts)
    assert largest_difference(logprobs, [each.tolist() for each in found]) > FAULT


def test_the_real_tokenizer_renders_the_same_in_transformers_5(
    shared_data: Path, vllm_python: Path, vllm_variables: dict[str, str], tmp_path: Path
) -> None:
    """The reasoning template with Phi-4-mini's own tokenizer, token for token."""
    directory = tmp_path / "tokenizer"
    tokenizer = chat.load_tokenizer(shared_data / "phi4-mini")
    tokenizer.chat_template = chat.REASONING_TEMPLATE
    tokenizer.save_pretrained(directory)
    shutil.copyfile(shared_data / "phi4-mini" / "config.json", directory / "config.json")
    job = {"release": str(directory), "conversations": CONVERSATIONS, "engines": ["prompts"]}
    found = ask(vllm_python, vllm_variables, tmp_path, job)["prompts"]["prompts"]
    assert found == [tokenizer.apply_chat_template(talk, add_generation_prompt=True) for talk in CONVERSATIONS]
    assert found[0] == chat.render_prompt(tokenizer, CONVERSATIONS[0][0]["content"])
