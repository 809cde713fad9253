"""Reads a release with transformers 5 and with vLLM, in their environment: `python release_worker.py JOB` (JSON).

Prints one line `ANSWER {json}`: the ids of each conversation by each tokenizer, the log-probabilities of the given
texts' tokens by each engine, and greedy continuations.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def with_transformers(job: dict[str, Any]) -> dict[str, Any]:
    """Prompts, log-probabilities and greedy continuations by transformers."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(job["release"])
    model = transformers.AutoModelForCausalLM.from_pretrained(job["release"], dtype=torch.float32)
    logprobs, greedy = [], []
    for ids in job["texts"]:
        tokens = torch.tensor([ids])
        with torch.no_grad():
            found = model(tokens).logits.log_softmax(-1)[0, :-1].gather(-1, tokens[0, 1:, None])
            longer = model.generate(tokens, max_new_tokens=job["new_tokens"], do_sample=False)
        logprobs.append(found[:, 0].tolist())
        greedy.append(longer[0, len(ids) :].tolist())
    return {
        "version": transformers.__version__,
        "class": type(model).__name__,
        "prompts": [_rendered(tokenizer, messages) for messages in job["conversations"]],
        "ends": model.generation_config.eos_token_id,
        "logprobs": logprobs,
        "greedy": greedy,
        "asked": [asked(model, tokenizer, text, job["new_tokens"]) for text in job["questions"]],
    }


def asked(model: Any, tokenizer: Any, text: str, new_tokens: int) -> list[int]:
    """A greedy continuation of a text, in the way that everybody writes it."""
    inputs = tokenizer(text, return_tensors="pt")
    found: list[int] = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)[0].tolist()
    return found


def saved_again(job: dict[str, Any]) -> dict[str, Any]:
    """The release as transformers saves what it has read."""
    import transformers

    transformers.AutoModelForCausalLM.from_pretrained(job["release"]).save_pretrained(job["saved"])
    transformers.AutoTokenizer.from_pretrained(job["release"]).save_pretrained(job["saved"])
    return {"version": transformers.__version__}


def with_vllm(job: dict[str, Any]) -> dict[str, Any]:
    """The same by vLLM, in this process."""
    import vllm
    from vllm.inputs import TokensPrompt

    engine = vllm.LLM(
        model=job["release"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=job["max_length"],
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in job["texts"]]
    asked = vllm.SamplingParams(temperature=0.0, max_tokens=job["new_tokens"], prompt_logprobs=0)
    outputs = engine.generate(prompts, asked, use_tqdm=False)
    logprobs = [
        [step[token].logprob for step, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
        for output, ids in zip(outputs, job["texts"], strict=True)
    ]
    ends = engine.llm_engine.model_config.try_get_generation_config()["eos_token_id"]
    tokenizer = engine.get_tokenizer()
    return {
        "version": vllm.__version__,
        "prompts": [_rendered(tokenizer, messages) for messages in job["conversations"]],
        "ends": ends,
        "logprobs": logprobs,
        "greedy": [list(output.outputs[0].token_ids) for output in outputs],
    }


def prompts_only(job: dict[str, Any]) -> dict[str, Any]:
    """Only the conversations' ids, for a directory without weights."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(job["release"])
    return {
        "version": transformers.__version__,
        "prompts": [_rendered(tokenizer, messages) for messages in job["conversations"]],
    }


def _rendered(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def main() -> None:
    """Do what the job asks for."""
    job = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    engines = {
        "transformers": with_transformers,
        "vllm": with_vllm,
        "prompts": prompts_only,
        "saved again": saved_again,
    }
    print("ANSWER " + json.dumps({name: engines[name](job) for name in job["engines"]}))


if __name__ == "__main__":
    main()
