"""A configuration checks itself: what goes together, what does not, and that every remedy works."""

from __future__ import annotations

import dataclasses
import re
import shlex
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stage_settings import load

from phimr_nemo.config.common import OptimConfig, ParallelConfig
from phimr_nemo.config.rules import KIND, quoted_override
from phimr_nemo.errors import UserError

ENDPOINT: Final = (
    "{base_urls: [http://h/v1], model: m, concurrency: 1, idle_seconds: 1, total_seconds: 1, attempts: 1, "
    "backoff_seconds: 1}"
)
SERVERS: Final = (
    "engine.base_urls=[http://h:1]",
    *("engine.in_flight=1", "engine.request_seconds=1", "engine.attempts=1", "engine.probe_seconds=1"),
    *("engine.recovery_seconds=1", "engine.bucket_mb=1"),
)
EVALUATION: Final = (
    "evaluation={every: 1, samples: 1, temperature: 1, top_p: 1, max_new_tokens: 8, "
    "problems: {kind: synthetic, count: 4, split: heldout}}"
)
PLACEHOLDER: Final = re.compile(r"FILE|DIRECTORY|\.\.\.")


def refusal(stage: str, *overrides: str) -> UserError:
    with pytest.raises(UserError) as caught:
        load(stage, *overrides)
    return caught.value


def first_remedy(error: UserError) -> list[str]:
    """The overrides in a remedy's first alternative that has any; of a list of remedies, those of each."""
    found = []
    for part in error.remedy.split("; "):
        for alternative in part.split(", or "):
            words = [word.rstrip(",;") for word in shlex.split(alternative)]
            items = [word for word in words if re.match(r"[a-z_][\w.]*=.", word) and not PLACEHOLDER.search(word)]
            if items:
                found += items
                break
    return found


CORRECTED = "correction.kind=truncated correction.cap=2"
SERVED: Final = (
    "teacher.kind=server teacher.tokenizer=t teacher.endpoint.base_urls=[http://h:1/v1] teacher.endpoint.model=m "
    "teacher.endpoint.concurrency=1 teacher.endpoint.idle_seconds=1 teacher.endpoint.total_seconds=1 "
    "teacher.endpoint.attempts=1 teacher.endpoint.backoff_seconds=1"
)
CASES: Final = [
    ("grpo", "prompts_per_step=3 group_size=3 inner_batches=5", "inner_batches=5"),
    ("grpo", "inner_batches=7", "inner_batches=7"),
    ("grpo", "prompts_per_step=6 parallel.data=4", "prompts_per_step=6 with parallel.data=4"),
    ("grpo", "group_size=1", "group_size=1"),
    ("grpo", "max_new_tokens=300", "max_new_tokens=300 with sequence_length=256"),
    ("grpo", "max_new_tokens=256", "max_new_tokens=256 with sequence_length=256"),
    ("grpo", "temperature.start=-1", "temperature.start=-1"),
    ("grpo", "temperature.end=0", "temperature.end=0"),
    ("grpo", "temperature.fraction=1.5", "temperature.fraction=1.5"),
    ("grpo", "ahead=1", "ahead=1 with correction.kind=none"),
    ("grpo", "ahead=3", "ahead=3 with correction.kind=none"),
    ("grpo", f"ahead=9 {CORRECTED}", "ahead=9"),
    ("grpo", f"ahead=-1 {CORRECTED}", "ahead=-1"),
    ("grpo", "partial_rollouts=continue", "partial_rollouts=continue with ahead=0"),
    (
        "grpo",
        f"ahead=2 {CORRECTED} max_concurrent_rollouts=8",
        "max_concurrent_rollouts=8 with partial_rollouts=wait",
    ),
    (
        "grpo",
        f"ahead=2 {CORRECTED} partial_rollouts=continue max_concurrent_rollouts=1 parallel.data=2",
        "max_concurrent_rollouts=1 with 2 processes",
    ),
    (
        "grpo",
        f"ahead=2 {CORRECTED} partial_rollouts=continue engine.kind=vllm engine.max_batch=8 engine.memory_share=0.5",
        "partial_rollouts=continue with engine.kind=vllm",
    ),
    ("grpo", "stale=keep", "stale=keep with correction.kind=none"),
    ("grpo", "engine.dtype=bf16", "engine.dtype=bf16 with correction.kind=none"),
    ("grpo", "loss.clip_low=1", "loss.clip_low=1.0 with loss.kind=dapo"),
    ("grpo", "correction.kind=masked correction.low=1.5 correction.high=2", "correction.low=1.5"),
    ("grpo", "correction.kind=sequence_masked correction.low=0.5 correction.high=0.9", "correction.high=0.9"),
    ("grpo", "entropy_bonus=-1", "entropy_bonus=-1"),
    ("distill", "group_size=0", "group_size=0"),
    ("distill", SERVED, "loss.kind=reverse_kl with teacher.kind=server"),
    (
        "distill",
        f"{SERVED} loss.kind=sampled_reverse_kl loss.clip_low=0.2 loss.clip_high=0.2 temperature.end=0.6",
        "temperature.end=0.6",
    ),
    ("distill", "correction.kind=truncated correction.cap=2", "correction.kind=truncated with loss.kind=reverse_kl"),
    (
        "distill",
        "loss.kind=sampled_reverse_kl loss.clip_low=0.2 loss.clip_high=0.2 ahead=1",
        "ahead=1 with correction.kind=none",
    ),
    ("distill", "verify_workers=0 checkpoint.best=true checkpoint.metric=pass_rate", "pass_rate is never measured"),
    ("grpo", "passes=0", "passes=0"),
    ("grpo", "curriculum.solved_from=0", "curriculum.solved_from=0"),
    ("grpo", "lora.rank=4 lora.alpha=8 checkpoint.best=true", "checkpoint.best=true with lora.rank=4"),
    ("sft", "lora.rank=4 lora.alpha=8 checkpoint.best=true", "checkpoint.best=true with lora.rank=4"),
    ("dpo", "lora.rank=0 lora.alpha=8", "lora.rank=0"),
    (
        "grpo",
        " ".join(("engine.kind=trtllm_server", *SERVERS)),
        "engine.kind=trtllm_server with temperature.start=1.0 temperature.end=0.6",
    ),
    ("grpo", "engine.kind=vllm engine.max_batch=2 engine.memory_share=0.5 engine.tensor=2", "engine.tensor=2"),
    ("grpo", "engine.kind=vllm engine.max_batch=2 engine.memory_share=0", "engine.memory_share=0"),
    ("grpo", "engine.cache_gib=0", "engine.cache_gib=0"),
    (
        "grpo",
        " ".join(("engine.kind=vllm_server engine.colocated=true ahead=1 correction.kind=truncated", *SERVERS))
        + " correction.cap=2",
        "ahead=1 with engine.colocated=true",
    ),
    (
        "grpo",
        " ".join(("engine.kind=trtllm_server engine.colocated=true temperature.end=1", *SERVERS)),
        "engine.colocated=true with engine.kind=trtllm_server",
    ),
    *(
        ("grpo", " ".join((f"engine.kind={kind} engine.transfer=nccl temperature.end=1 {more}", *SERVERS)), named)
        for kind, more, named in (
            ("trtllm_server", "", "engine.transfer=nccl with engine.kind=trtllm_server"),
            ("vllm_server", "engine.colocated=true", "engine.transfer=nccl with engine.colocated=true"),
            ("vllm_server", "engine.directory=/dev/shm", "engine.transfer=nccl with engine.directory=/dev/shm"),
        )
    ),
    (
        "sft",
        f"{shlex.quote(EVALUATION)} evaluation.engine.kind=vllm_server evaluation.engine.colocated=true "
        + " ".join(f"evaluation.{setting}" for setting in SERVERS),
        "evaluation.engine.colocated=true in a stage",
    ),
    ("grpo", "overlong.kind=soft overlong.buffer=97 overlong.penalty=1", "overlong.buffer=97"),
    ("grpo", "reward.correct=-1 reward.wrong=1", "reward.correct=-1.0 with reward.wrong=1.0"),
    ("grpo", "reward.correct=1 reward.wrong=1", "reward.correct=1.0 with reward.wrong=1.0"),
    ("grpo", "guard.on_nan=stop guard.spike_factor=2 guard.spike_of=loss", "guard.spike_of=loss"),
    ("dpo", "optim.schedule=wsd", "optim.schedule=wsd with optim.decay_fraction=None"),
    ("dpo", "optim.schedule=wsd optim.decay_fraction=0.5 optim.warmup_fraction=0.6", "optim.warmup_fraction=0.6"),
    ("grpo", "kl=-0.1", "kl=-0.1"),
    ("grpo", "kl=.nan", "kl=nan"),
    ("grpo", "reward.correct=.inf", "reward.correct=inf"),
    ("grpo", "'reward.functions={score: 1}'", "'score' names no function"),
    ("grpo", "prompt=hello", "prompt template 'hello' in prompt"),
    ("grpo", "grader=my_grader", "grader='my_grader'"),
    ("grpo", "steps=true", "steps=True"),
    ("grpo", "run.seed=4294967296", "run.seed=4294967296"),
    ("grpo", "model.fp8=delayed model.dtype=bf16", "model.fp8=delayed"),
    ("sft", "model.fp8_output=true", "model.fp8_output=true with model.fp8=null"),
    (
        "midtrain",
        "model.dtype=bf16 model.fp8=current model.fp8_output=true model.fp32_output=true",
        "model.fp8_output=true with model.fp32_output=true",
    ),
    ("grpo", "checkpoint.every=0", "checkpoint.every=0"),
    ("dpo", "optim.min_lr=1", "optim.min_lr=1.0 with optim.lr="),
    ("dpo", "optim.lr=-1", "optim.lr=-1"),
    ("dpo", "optim.beta2=1", "optim.beta2=1"),
    ("dpo", "optim.eps=0", "optim.eps=0"),
    ("dpo", "optim.weight_decay=-.inf", "optim.weight_decay=-inf"),
    ("dpo", "beta=0", "beta=0"),
    ("dpo", "loss.kind=label_smoothed_dpo loss.label_smoothing=0.5", "loss.label_smoothing=0.5"),
    ("dpo", "global_batch=7 micro_batch=2", "global_batch=7 with micro_batch=2"),
    ("dpo", "parallel.virtual=2 parallel.pipeline=2", "parallel.virtual=2"),
    ("midtrain", "optim.min_lr=1", "optim.min_lr=1.0 with optim.lr="),
    ("midtrain", "validation_rows=3", "validation_rows=3 with global_batch="),
    ("midtrain", "optim.warmup_fraction=1.1", "optim.warmup_fraction=1.1"),
    ("midtrain", "parallel.virtual=2", "parallel.virtual=2 with parallel.pipeline=1"),
    ("midtrain", "parallel.sequence=true", "parallel.sequence=true with parallel.tensor=1"),
    ("midtrain", "validation_rows=0 checkpoint.best=true", "checkpoint.metric=val_loss is never measured"),
    (
        "midtrain",
        "validation_rows=0 early_stopping.patience=1 early_stopping.min_delta=0",
        "checkpoint.metric=val_loss is never measured",
    ),
    ("sft", "overlap.param_gather=true", "overlap.param_gather=true with"),
    ("sft", "overlap.tensor=true", "overlap.tensor=true with parallel.sequence=false"),
    (
        "sft",
        "overlap.tensor=true parallel.tensor=2 parallel.sequence=true parallel.context=2",
        "overlap.tensor=true with parallel.context=2",
    ),
    (
        "sft",
        "overlap.tensor=true parallel.tensor=2 parallel.sequence=true sequence_length=255",
        "overlap.tensor=true with sequence_length=255 and parallel.tensor=2",
    ),
    ("sft", "guard.on_spike=stop", "guard.on_spike=stop without guard.spike_factor"),
    ("sft", f"{shlex.quote(EVALUATION)} evaluation.temperature=-1", "evaluation.temperature=-1"),
    ("sft", f"{shlex.quote(EVALUATION)} evaluation.top_p=0", "evaluation.top_p=0"),
    ("sft", f"{shlex.quote(EVALUATION)} evaluation.engine.kind=endpoint", "evaluation.engine.kind=endpoint while"),
    ("dpo", f"{shlex.quote(EVALUATION)} evaluation.engine.kind=endpoint", "evaluation.engine.kind=endpoint while"),
    ("grpo", "engine.kind=endpoint", "engine.kind=endpoint while a model is trained"),
    (
        "sft",
        f"{shlex.quote(EVALUATION)} evaluation.top_p=0.9 evaluation.engine.kind=vllm evaluation.engine.max_batch=4 "
        "evaluation.engine.memory_share=0.1",
        "evaluation.engine.kind=vllm with evaluation.top_p=0.9",
    ),
    (
        "dpo",
        "checkpoint.best=true checkpoint.metric=val_accuracy",
        "checkpoint.metric=val_accuracy is never measured",
    ),
    ("dpo", "validation_pairs=1 parallel.data=2", "validation_pairs=1 with parallel.data=2"),
    ("grpo", "checkpoint.best=true checkpoint.metric=pass1", "checkpoint.metric=pass1 is never measured"),
    (
        "grpo",
        f"{shlex.quote(EVALUATION)} evaluation.max_new_tokens=256",
        "evaluation.max_new_tokens=256 with sequence_length=256",
    ),
    ("sft", "epochs=0", "epochs=0"),
    ("generate", "problems=null", "teacher.kind=programmatic without problems"),
    ("generate", "problems.kind=file problems.path=p.jsonl", "teacher.kind=programmatic with problems.kind=file"),
    ("generate", "problems.count=300001", "problems.count=300001"),
    ("generate", "teacher.mistake_rate=1.01", "teacher.mistake_rate=1.01"),
    ("generate", "shard.index=2 shard.count=2", "shard.index=2 with shard.count=2"),
    (
        "generate",
        "teacher.kind=model teacher.engine.kind=local teacher.temperature=1 teacher.top_p=1 teacher.max_new_tokens=4",
        "no teacher.path for teacher.engine.kind=local",
    ),
    (
        "generate",
        "teacher.kind=model teacher.path=x teacher.engine.kind=endpoint teacher.temperature=1 teacher.top_p=1 "
        f"teacher.max_new_tokens=4 'teacher.engine.endpoint={ENDPOINT}'",
        "teacher.path=x with teacher.engine.kind=endpoint",
    ),
    ("evaluate", "prompt=hello", "prompt template 'hello' in prompt"),
    ("evaluate", "temperature=-0.1", "temperature=-0.1"),
    ("evaluate", "top_p=1.01", "top_p=1.01"),
    ("evaluate", "max_new_tokens=0", "max_new_tokens=0"),
    ("evaluate", "model=null", "no model for engine.kind=local"),
    ("evaluate", "problems.kind=benchmark problems.name=AIME24", "benchmark AIME24 without a place"),
    ("evaluate", "problems.kind=benchmark problems.name=AIME42 problems.hub=true", "problems.name='AIME42'"),
    ("evaluate", "problems.kind=benchmark problems.name=AMC problems.hub=true", "benchmark AMC with problems.hub"),
    ("verify", "deadline_seconds=0", "deadline_seconds=0"),
    ("verify", "deadline_seconds=.nan", "deadline_seconds=nan"),
    ("verify", "workers=-1", "workers=-1"),
    (
        "verify",
        f"'judge={{ask: {{engine: {{kind: endpoint, endpoint: {ENDPOINT}}}, temperature: 0, max_new_tokens: 1, "
        "max_cost: 1}, verdicts: [wrong], overrules: true}'",
        "judge.ask.max_cost=1.0 without prices",
    ),
    (
        "verify",
        "'judge={ask: {engine: {kind: local}, temperature: 0, max_new_tokens: 1}, verdicts: [wrong], "
        "overrules: true}'",
        "no judge.ask.path for judge.ask.engine.kind=local",
    ),
    (
        "verify",
        "'judge={ask: {engine: {kind: local}, path: x, temperature: 0, max_new_tokens: 8, sequence_length: 8}, "
        "verdicts: [wrong], overrules: true}'",
        "judge.ask.max_new_tokens=8 with judge.ask.sequence_length=8",
    ),
    (
        "prepare",
        f"'annotation={{ask: {{engine: {{kind: endpoint, endpoint: {ENDPOINT}, system: Be brief.}}, temperature: 0, "
        "max_new_tokens: 1}}'",
        "annotation.ask.engine.system=Be brief.",
    ),
    ("curate", "midtrain=null sft=null pairs=null prompts=null", "none of midtrain, sft, pairs and prompts"),
    (
        "curate",
        "prompts.min_pass=0.9 prompts.max_pass=0.1 prompts.hard_below=0 prompts.min_samples=1",
        "prompts.min_pass=0.9 prompts.max_pass=0.1",
    ),
    (
        "curate",
        "pairs.max_length_ratio=0.5 pairs.mode=random pairs.nearness=common_steps pairs.max_per_problem=1",
        "0.5",
    ),
    ("pack", "sequence_length=0", "sequence_length=0"),
    ("prepare", "'sources=[{name: a, path: x}, {name: a, path: y}]'", "['a'] occur more than once"),
    ("prepare", "'sources=[{name: a, path: x, preset: gsm8k, question: q}]'", "sources.0.preset=gsm8k"),
    ("prepare", "near_duplicates.permutations=7 near_duplicates.threshold=0.8", "near_duplicates.permutations=7"),
    ("base", "hidden_size=100", "hidden_size 100 with 8 attention heads"),
    ("base", "num_key_value_heads=3", "8 attention heads with 3 key/value heads"),
    ("base", "vocab_size=260", "vocab_size=260"),
    ("base", "vocab_size=522", "vocab_size=522"),
    ("base", "original_max_position_embeddings=1", "original_max_position_embeddings=1"),
    ("export", "licence=", "licence=None"),
]


@pytest.mark.parametrize(("stage", "overrides", "named"), CASES, ids=[f"{s} {o}"[:70] for s, o, _ in CASES])
def test_what_does_not_go_together_is_refused_when_it_is_made(stage: str, overrides: str, named: str) -> None:
    error = refusal(stage, *shlex.split(overrides))
    assert named in error.problem
    assert error.rule
    assert error.remedy


NO_REMEDY_TO_RUN: Final = {
    "no teacher.path",
    "no judge.ask.path",
    "['a'] occur",
    "without a place",
    "AMC with",
    "no model",
    "names no function",
}


@pytest.mark.parametrize(("stage", "overrides", "named"), CASES, ids=[f"{s} {o}"[:70] for s, o, _ in CASES])
def test_the_remedy_works(stage: str, overrides: str, named: str) -> None:
    given_items = shlex.split(overrides)
    error = refusal(stage, *given_items)
    assert named in error.problem
    items = first_remedy(error)
    assert items or any(part in error.problem for part in NO_REMEDY_TO_RUN), error.remedy
    # Another kind is filled anew.
    sections = tuple(
        key.removesuffix(KIND) for key, _, _ in (item.partition("=") for item in items) if key.endswith(f".{KIND}")
    )
    kept = [item for item in given_items if not (sections and item.startswith(sections))]
    if items:
        load(stage, *kept, *items)


def test_a_configuration_made_in_python_is_checked_as_well() -> None:
    with pytest.raises(UserError, match=r"tensor=0.*\n.*\n.*tensor=1"):
        ParallelConfig(tensor=0)
    sound = load("dpo").optim
    assert isinstance(sound, OptimConfig)
    with pytest.raises(UserError, match=r"min_lr=1\.0 with lr="):
        dataclasses.replace(sound, min_lr=1.0)
    with pytest.raises(UserError, match="unknown key 'size'"):
        ParallelConfig(size=3)  # type: ignore[call-arg]


def test_every_broken_rule_of_a_configuration_is_named_at_once() -> None:
    error = refusal("midtrain", "optim.min_lr=1", "parallel.sequence=true", "epochs=0", "wokers=1")
    assert all(part in error.problem for part in ("optim.min_lr", "parallel.sequence", "epochs=0", "'wokers'"))


# --- text in overrides ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["{question}", "Solve: {question}", "'{question}", '"{question}" or not', "[{question}]", "a ${x} {question}"],
)
def test_text_with_braces_or_quotes_gets_the_quotes_that_it_needs(text: str) -> None:
    error = refusal("evaluate", f"prompt={text}")
    (quoted,) = [word for word in shlex.split(error.remedy) if word.startswith("prompt=")]
    assert load("evaluate", quoted).prompt == text


@settings(max_examples=40, deadline=None)
@given(text=st.text(st.characters(codec="utf-8", exclude_categories=("C", "Zl", "Zp")), min_size=1, max_size=20))
def test_a_quoted_override_is_the_text(text: str) -> None:
    quoted = quoted_override(f"row={text}")
    assert quoted is not None
    (item,) = shlex.split(quoted)
    assert load("evaluate", item).row == text


# --- keys that have moved -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "overrides", "now"),
    [
        ("grpo", "sampler.kind=local sampler.cache_gib=2", ["engine.kind=local", "engine.cache_gib=2"]),
        ("generate", "teacher.kind=vllm", ["teacher.kind=model", "teacher.engine.kind=vllm"]),
        ("generate", "teacher.kind=endpoint", ["teacher.kind=model", "teacher.engine.kind=endpoint"]),
        (
            "generate",
            "teacher.kind=model teacher.path=x teacher.engine.kind=local teacher.temperature=1 teacher.top_p=1 "
            "teacher.max_new_tokens=4 teacher.max_batch=8",
            ["teacher.engine.max_batch=8"],
        ),
        ("sft", f"{shlex.quote(EVALUATION)} evaluation.max_batch=8", ["evaluation.engine.max_batch=8"]),
        (
            "verify",
            f"'judge={{ask: {{engine: {{kind: endpoint, endpoint: {ENDPOINT}}}, temperature: 0, max_new_tokens: 1}}, "
            "verdicts: [wrong], overrules: true}' judge.ask.endpoint.model=x judge.ask.max_tokens=8",
            ["judge.ask.engine.endpoint.model=x", "judge.ask.max_new_tokens=8"],
        ),
    ],
)
def test_a_former_key_is_refused_by_the_name_of_the_new_one(stage: str, overrides: str, now: list[str]) -> None:
    error = refusal(stage, *shlex.split(overrides))
    assert all(item in error.remedy for item in now)
