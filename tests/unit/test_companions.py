"""What lies beside the weights: read from any release of transformers, handed on, and completed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from phimr_nemo.config import BaseConfig, load_config
from phimr_nemo.data.chat import SPECIAL_TOKENS, load_tokenizer, render_prompt
from phimr_nemo.data.tokenizer import portable
from phimr_nemo.errors import UserError
from phimr_nemo.model.adopt import adopt
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.base import run_base
from phimr_nemo.model.files.checkpoints import open_checkpoint, write_hf
from phimr_nemo.model.files.companions import check_companions
from phimr_nemo.model.files.hf import HFDirectory

SHAPE = ("hidden_size=32", "intermediate_size=48", "num_hidden_layers=2", "num_attention_heads=4")
QUESTION = "What is 37+48?"
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 3000\n"
END_OF_TEXT, USER, END = 0, 2, 4
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("base")
    run_base(load_config(BaseConfig, Path("conf/base/tiny.yaml"), [f"run.output={work}", *SHAPE]))
    return work / "hf"


@pytest.fixture
def model(base: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    shutil.copytree(base, tmp_path / "model")
    return tmp_path / "model"


def change_json(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(file.read_text("utf-8"))
    change(content)
    file.write_text(json.dumps(content), "utf-8")


def change_weights(model: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def as_transformers_5_saves(model: Path) -> None:
    """Rewrite the companions by hand as transformers 5.24 does."""

    def config(values: dict[str, Any]) -> None:
        scaling = values.pop("rope_scaling")
        inner = {name: values[name] for name in ("original_max_position_embeddings", "partial_rotary_factor")}
        values["rope_parameters"] = {
            **scaling,
            **inner,
            "rope_type": "longrope",
            "rope_theta": values.pop("rope_theta"),
        }
        values["dtype"] = values.pop("torch_dtype")
        values["transformers_version"] = "5.24.0"

    def tokenizer(values: dict[str, Any]) -> None:
        del values["added_tokens_decoder"]
        values["extra_special_tokens"] = values.pop("additional_special_tokens")
        values |= {"backend": "tokenizers", "is_local": True, "local_files_only": True}
        values["tokenizer_class"] = "TokenizersBackend"
        (model / "chat_template.jinja").write_text(values.pop("chat_template"), "utf-8")

    change_json(model / "config.json", config)
    change_json(model / "tokenizer_config.json", tokenizer)
    (model / "special_tokens_map.json").unlink()


def test_a_directory_of_transformers_5_is_read_as_the_same_model(base: Path, model: Path) -> None:
    as_transformers_5_saves(model)
    assert HFDirectory(model).architecture == HFDirectory(base).architecture
    old, new = load_tokenizer(base), load_tokenizer(model)
    assert render_prompt(new, QUESTION) == render_prompt(old, QUESTION)
    assert new.get_vocab() == old.get_vocab()
    assert set(new.all_special_tokens) == set(SPECIAL_TOKENS)
    assert new.decode(render_prompt(new, QUESTION), skip_special_tokens=True).startswith(QUESTION)


@pytest.mark.parametrize("way", ["convert", "adopt"])
def test_what_is_made_of_it_loads_in_transformers_4(base: Path, model: Path, tmp_path: Path, way: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    as_transformers_5_saves(model)
    if way == "adopt":
        adopt(model, tmp_path / "made", system_prompt="Add.")
    else:
        write_hf(tmp_path / "made", open_checkpoint(model))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "made")
    made, known = (AutoModelForCausalLM.from_pretrained(place) for place in (tmp_path / "made", base))
    inputs = tokenizer(QUESTION, return_tensors="pt")
    assert sorted(inputs) == ["attention_mask", "input_ids"]
    assert torch.equal(made(**inputs).logits, known(**inputs).logits)
    assert made.generate(**inputs, max_new_tokens=3, do_sample=False).shape[0] == 1
    talk = [{"role": "user", "content": QUESTION}]
    text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|system|>Add.<|end|>" if way == "adopt" else "<|system|><|end|>")


@pytest.mark.parametrize(
    ("length", "wanted"),
    [(None, 32768), (512, 512), (10**30, 32768), (0, 32768), ("512", 32768), (32769, 32768)],
)
def test_the_tokenizer_knows_the_models_inputs_and_context(
    model: Path, tmp_path: Path, length: object, wanted: int
) -> None:
    def change(values: dict[str, Any]) -> None:
        values["model_max_length"] = length
        values["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]

    change_json(model / "tokenizer_config.json", change)
    write_hf(tmp_path / "made", open_checkpoint(model))
    made = json.loads((tmp_path / "made" / "tokenizer_config.json").read_text("utf-8"))
    assert made["model_max_length"] == wanted == load_tokenizer(tmp_path / "made").model_max_length
    assert made["model_input_names"] == ["input_ids", "attention_mask"]


SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1.05}


@pytest.mark.parametrize(
    ("stated", "in_config", "wanted"),
    [
        (None, END_OF_TEXT, {"eos_token_id": [END, END_OF_TEXT], "bos_token_id": 0, "pad_token_id": 0}),
        (None, [END_OF_TEXT, USER], {"eos_token_id": [END, END_OF_TEXT, USER], "bos_token_id": 0, "pad_token_id": 0}),
        (
            {**SAMPLING, "bos_token_id": 0, "eos_token_id": [END, END_OF_TEXT], "pad_token_id": 0},
            END_OF_TEXT,
            {**SAMPLING, "bos_token_id": 0, "eos_token_id": [END, END_OF_TEXT], "pad_token_id": 0},
        ),
        (
            {"eos_token_id": [END, END_OF_TEXT, USER], "pad_token_id": 3},
            END_OF_TEXT,
            {"eos_token_id": [END, END_OF_TEXT, USER], "pad_token_id": 3, "bos_token_id": 0},
        ),
        (
            {"eos_token_id": END_OF_TEXT},
            END,
            {"eos_token_id": [END_OF_TEXT, END], "bos_token_id": 0, "pad_token_id": 0},
        ),
        ({"temperature": 0.6}, END_OF_TEXT, {"temperature": 0.6, "eos_token_id": [END, END_OF_TEXT]}),
        ({"eos_token_id": [USER]}, END_OF_TEXT, {"eos_token_id": [USER, END, END_OF_TEXT]}),
    ],
)
def test_a_generation_config_is_completed_and_not_replaced(
    model: Path, tmp_path: Path, stated: dict[str, Any] | None, in_config: Any, wanted: dict[str, Any]
) -> None:
    change_json(model / "config.json", lambda values: values.update(eos_token_id=in_config))
    if stated is None:
        (model / "generation_config.json").unlink()
    else:
        (model / "generation_config.json").write_text(json.dumps(stated), "utf-8")
    for source, target in (("model", "once"), ("once", "twice")):
        write_hf(tmp_path / target, open_checkpoint(tmp_path / source))
        made = json.loads((tmp_path / target / "generation_config.json").read_text("utf-8"))
        assert {name: made[name] for name in wanted} == wanted, target
        assert made.keys() - wanted.keys() <= {"_from_model_config", "bos_token_id", "pad_token_id"}
    # A model that goes on unchanged stays the same to the byte.
    once, twice = ((tmp_path / target / "generation_config.json").read_bytes() for target in ("once", "twice"))
    assert once == twice


@pytest.mark.parametrize(
    "content",
    [
        *("[", "[]", '{"eos_token_id": [9999]}', '{"eos_token_id": "<|end|>"}', POINTER),
        *('{"pad_token_id": 9999}', '{"pad_token_id": true}', '{"bos_token_id": "1"}'),
        *('{"temperature": NaN}', '{"temperature": "0.6"}', '{"top_p": 1.5}', '{"top_k": -2}', '{"min_p": 2}'),
    ],
)
def test_a_generation_config_that_is_none_is_refused(model: Path, tmp_path: Path, content: str) -> None:
    (model / "generation_config.json").write_text(content, "utf-8")
    with pytest.raises(UserError, match=r"generation_config\.json") as caught:
        write_hf(tmp_path / "made", open_checkpoint(model))
    assert "delete it" in caught.value.remedy
    assert ("git lfs pull" in caught.value.remedy) == (content == POINTER)


@pytest.mark.parametrize(
    ("stated", "written"),
    [
        ({"do_sample": True, "temperature": 0.0, "top_p": 0.9}, {"do_sample": False}),
        ({"do_sample": True, "top_k": -1}, {"do_sample": True, "top_k": 0}),
        (
            {"do_sample": True, "temperature": 0.8, "top_p": 0.95},
            {"do_sample": True, "temperature": 0.8, "top_p": 0.95},
        ),
    ],
)
def test_what_other_engines_write_for_off_is_transformers_own(
    model: Path, tmp_path: Path, stated: dict[str, Any], written: dict[str, Any]
) -> None:
    (model / "generation_config.json").write_text(json.dumps(stated), "utf-8")
    write_hf(tmp_path / "made", open_checkpoint(model))
    made = json.loads((tmp_path / "made" / "generation_config.json").read_text("utf-8"))
    assert {name: value for name, value in made.items() if not name.endswith("_token_id")} == written


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("special_tokens_map.json", POINTER.encode()),
        ("tokenizer.model", POINTER.encode()),
        ("chat_template.jinja", POINTER.encode()),
        ("LICENSE", POINTER.encode()),
        ("chat_template.jinja", "{# é #}".encode("latin-1")),
    ],
)
def test_what_cannot_be_handed_on_is_refused_before_any_training(
    model: Path, tmp_path: Path, name: str, content: bytes
) -> None:
    (model / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        check_companions(Architecture.from_directory(model), model)
    with pytest.raises(UserError, match=name):
        write_hf(tmp_path / "made", open_checkpoint(model))


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (POINTER, "leaves the question out"),
        ("{{ 'constant' }}", "leaves the question out"),
        (5, "is no text: 5"),
        ([{"name": "rag", "template": "{{ messages[0]['content'] }}"}], "none of them named 'default'"),
    ],
)
def test_a_template_that_asks_nothing_is_refused(model: Path, template: object, said: str) -> None:
    (model / "chat_template.jinja").unlink(missing_ok=True)
    change_json(model / "tokenizer_config.json", lambda values: values.update(chat_template=template))
    with pytest.raises(UserError, match=said):
        load_tokenizer(model)


def test_a_slow_tokenizer_is_named_with_the_way_to_a_fast_one(model: Path) -> None:
    (model / "tokenizer.json").rename(model / "tokenizer.model")
    with pytest.raises(UserError, match="holds no tokenizer") as caught:
        load_tokenizer(model)
    assert "use_fast=True" in caught.value.remedy


def test_the_file_that_is_no_text_is_named(model: Path) -> None:
    file = model / "tokenizer_config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    with pytest.raises(UserError, match=r"has a tokenizer_config\.json that cannot be read") as caught:
        load_tokenizer(model)
    assert file.name in caught.value.remedy


def test_licences_vocabularies_and_further_templates_travel(model: Path, tmp_path: Path) -> None:
    texts = {"tokenizer.model": "\n", "LICENSE": "MIT", "license.txt": "x", "NOTICE.md": "y", "LICENCE-2.0": "z"}
    texts |= {"additional_chat_templates/tool_use.jinja": "{{ messages }}"}
    (model / "additional_chat_templates").mkdir()
    for name, text in texts.items():
        (model / name).write_text(text, "utf-8")
    for left in ("licenses_of_friends.zip", "training_args.bin"):
        (model / left).write_text("no", "utf-8")
    adopt(model, tmp_path / "adopted", system_prompt="Add.")
    write_hf(tmp_path / "converted", open_checkpoint(tmp_path / "adopted"))
    for made in ("adopted", "converted"):
        assert {name: (tmp_path / made / name).read_text("utf-8") for name in texts} == texts
        assert not (tmp_path / made / "training_args.bin").exists()


def test_adopting_replaces_the_template_in_use_and_keeps_the_named_ones(model: Path, tmp_path: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        named = {"name": "tool_use", "template": "{{ tools }}"}
        values["chat_template"] = [named, {"name": "default", "template": values["chat_template"]}]

    change_json(model / "tokenizer_config.json", change)
    adopt(model, tmp_path / "made", system_prompt="Add.")
    tokenizer = load_tokenizer(tmp_path / "made")
    assert (
        tokenizer.decode(render_prompt(tokenizer, "1+1?")) == "<|system|>Add.<|end|><|user|>1+1?<|end|><|assistant|>"
    )
    assert tokenizer.get_chat_template("tool_use") == "{{ tools }}"


def test_a_model_without_a_template_can_be_adopted_and_nothing_else(model: Path, tmp_path: Path) -> None:
    change_json(model / "tokenizer_config.json", lambda values: values.pop("chat_template"))
    with pytest.raises(UserError, match="lacks a chat template") as caught:
        load_tokenizer(model)
    assert f"phimr adopt {model} TARGET" in caught.value.remedy
    adopt(model, tmp_path / "made", system_prompt="Add.")
    assert load_tokenizer(tmp_path / "made").chat_template


def test_no_token_at_the_beginning(model: Path, tmp_path: Path) -> None:
    change_json(model / "config.json", lambda values: values.update(bos_token_id=None))
    (model / "generation_config.json").unlink()
    write_hf(tmp_path / "made", open_checkpoint(model))
    for file in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "made" / file).read_text("utf-8"))["bos_token_id"] is None


def test_a_tied_model_may_store_its_head_too(base: Path, model: Path, tmp_path: Path) -> None:
    change_weights(model, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    assert HFDirectory(model).names() == HFDirectory(base).names()
    assert HFDirectory(model).weights_hash() == HFDirectory(base).weights_hash()
    write_hf(tmp_path / "made", open_checkpoint(model))
    assert load_file(tmp_path / "made" / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()


def test_a_tied_model_may_store_its_head_alone(model: Path, tmp_path: Path) -> None:
    hashed = HFDirectory(model).weights_hash()
    change_weights(model, lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))
    assert HFDirectory(model).weights_hash() == hashed
    write_hf(tmp_path / "made", open_checkpoint(model))
    assert load_file(tmp_path / "made" / "model.safetensors").keys() >= {EMBEDDING}


@pytest.mark.parametrize(
    ("rename", "said"),
    [
        (lambda name: f"module.{name}", "unwrap_model"),
        (lambda name: f"_orig_mod.{name}", "unwrap_model"),
        (lambda name: name.removeprefix("model."), "AutoModelForCausalLM"),
        (lambda name: name.replace("down_proj.weight", "down_proj.qweight"), "bfloat16 first"),
    ],
)
def test_tensors_of_a_module_around_the_model_are_named_as_such(
    model: Path, rename: Callable[[str], str], said: str
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        renamed = {rename(name): tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(renamed)

    change_weights(model, change)
    with pytest.raises(UserError, match="left over") as caught:
        HFDirectory(model)
    assert said in caught.value.remedy


@pytest.mark.parametrize("row", [0, -1])
def test_a_head_of_its_own_beside_a_tied_embedding_is_refused(model: Path, row: int) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[HEAD] = tensors[EMBEDDING].clone()
        tensors[HEAD][row, 0] += 1.0

    change_weights(model, change)
    with pytest.raises(UserError, match=HEAD) as caught:
        HFDirectory(model)
    assert '"tie_word_embeddings": false' in caught.value.remedy
    # The remedy works.
    change_json(model / "config.json", lambda values: values.update(tie_word_embeddings=False))
    assert HEAD in HFDirectory(model).names()


def test_rotary_angles_that_were_saved_are_passed_over(base: Path, model: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.full((3,), float("nan"))
        tensors["model.layers.1.self_attn.rotary_emb.cos_cached"] = torch.ones(4, 3)
        tensors["model.rotary_emb.inv_freq"] = torch.ones(3)

    change_weights(model, change)
    assert HFDirectory(model).weights_hash() == HFDirectory(base).weights_hash()
    change_weights(model, lambda tensors: tensors.update({"model.layers.0.self_attn.inv_freq": torch.ones(3)}))
    with pytest.raises(UserError, match="inv_freq"):
        HFDirectory(model)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_pointer_of_git_lfs_is_named_with_its_remedy(model: Path, tmp_path: Path, name: str) -> None:
    (model / name).write_text(POINTER, "utf-8")
    for step in (
        lambda: adopt(model, tmp_path / "adopted", system_prompt="Add."),
        lambda: write_hf(tmp_path / "converted", open_checkpoint(model)),
        lambda: (HFDirectory(model), load_tokenizer(model)),
    ):
        with pytest.raises(UserError) as caught:
            step()
        assert name in caught.value.problem
        assert f"`git lfs pull` in {model}" in caught.value.remedy
    assert not (tmp_path / "adopted").exists()


@pytest.mark.parametrize(
    ("rename", "remedy"),
    [
        (lambda name: "base_model.model." + name, "merge_and_unload"),
        (lambda name: name.replace("qkv_proj", "q_proj"), "model_type"),
    ],
)
def test_names_of_others_get_their_own_remedy(model: Path, rename: Callable[[str], str], remedy: str) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[rename(name)] = tensors.pop(name)

    change_weights(model, change)
    with pytest.raises(UserError) as caught:
        HFDirectory(model)
    assert remedy in caught.value.remedy


def test_settings_of_transformers_4_stay_as_they_are() -> None:
    settings = {"tokenizer_class": "GPT2Tokenizer", "extra_special_tokens": {}, "additional_special_tokens": ["<a>"]}
    assert portable(settings) == settings
