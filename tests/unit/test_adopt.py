"""`phimr adopt`: the same weights, and prompts put together by hand, through to the release."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from warm_phimr import phimr

from phimr_nemo.config import BaseConfig, MidtrainConfig, load_config
from phimr_nemo.data.chat import (
    REASONING_SYSTEM_PROMPT,
    load_tokenizer,
    render_prompt,
    stop_token_ids,
    warn_of_other_template,
)
from phimr_nemo.errors import UserError
from phimr_nemo.generate.serving.vllm import weights_hash
from phimr_nemo.jobs.preflight import preflight
from phimr_nemo.model.adopt import adopt
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.base import run_base
from phimr_nemo.model.files.hf import HFDirectory, write_hf_directory
from phimr_nemo.model.table import tensor_shapes
from phimr_nemo.store.shards import finish, rows_to_table, write_shard

QUESTION = "What is 37+48?"
# As of Phi-4-mini-instruct: no system text of its own.
INSTRUCT = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)


@pytest.fixture
def instruct(tmp_path: Path) -> Path:
    """A small model with the plain template, in both places where one may stand."""
    shape = ("hidden_size=32", "intermediate_size=48", "num_hidden_layers=1", "num_attention_heads=4")
    run_base(load_config(BaseConfig, Path("conf/base/tiny.yaml"), [f"run.output={tmp_path / 'base'}", *shape]))
    directory = tmp_path / "base" / "hf"
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | {"chat_template": INSTRUCT}), "utf-8")
    (directory / "chat_template.jinja").write_text(INSTRUCT, "utf-8")
    return directory


def test_a_template_without_a_system_prompt_is_warned_of_before_the_work(
    instruct: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In either place where it may stand, and only then."""
    adopt(instruct, tmp_path / "ready", system_prompt=REASONING_SYSTEM_PROMPT)
    config = load_config(
        MidtrainConfig,
        Path("conf/midtrain/tiny.yaml"),
        [f"base={instruct}", f"data={tmp_path}", "max_steps=1", "validation_rows=0"],
    )
    row = {"input_ids": [1], "loss_mask": [1], "document_lengths": [1]}
    write_shard(tmp_path, 0, rows_to_table([row] * config.global_batch, "rows"), kind="rows")
    finish(tmp_path, kind="rows", config={})
    with caplog.at_level(logging.WARNING):
        preflight("midtrain", config)
        assert f"phimr adopt {instruct} TARGET" in caplog.text
        caplog.clear()
        (instruct / "chat_template.jinja").unlink()
        warn_of_other_template(instruct)
        assert f"phimr adopt {instruct} TARGET" in caplog.text
        caplog.clear()
        preflight("midtrain", dataclasses.replace(config, base=tmp_path / "ready"))
    assert not caplog.records


def by_hand(directory: Path, system: str) -> list[int]:
    tokenizer = load_tokenizer(directory)
    ids = tokenizer.get_vocab()

    def plain(text: str) -> list[int]:
        return list(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)

    opening = [ids["<|system|>"], *plain(system), ids["<|end|>"]]
    return [*opening, ids["<|user|>"], *plain(QUESTION), ids["<|end|>"], ids["<|assistant|>"]]


@pytest.mark.parametrize("system", [None, "You solve problems."])
def test_prompts_are_the_reasoning_models_and_weights_stay(
    instruct: Path, tmp_path: Path, system: str | None
) -> None:
    before = render_prompt(load_tokenizer(instruct), QUESTION)
    target = tmp_path / "ready"
    option = [] if system is None else [f"--system-prompt={system}"]
    done = phimr("adopt", str(instruct), str(target), *option)
    assert done.returncode == 0, done.stderr
    wanted = by_hand(target, REASONING_SYSTEM_PROMPT if system is None else system)
    assert render_prompt(load_tokenizer(target), QUESTION) == wanted
    assert before != wanted
    old, new = HFDirectory(instruct), HFDirectory(target)
    assert old.names() == new.names()
    assert all(torch.equal(old.read(name), new.read(name)) for name in old.names())


def test_the_real_tokenizer_token_for_token(shared_data: Path, tmp_path: Path) -> None:
    """A tiny model under Phi-4-mini's own tokenizer, whose template is the instruct one."""
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 1, "num_key_value_heads": 1}
    config = json.loads((shared_data / "phi4-mini" / "config.json").read_text("utf-8")) | small
    rotary_pairs = int(small["hidden_size"] * config["partial_rotary_factor"]) // 2
    factors = {"short_factor": [1.0] * rotary_pairs, "long_factor": [2.0] * rotary_pairs}
    arch = Architecture.from_hf_config(config | {"rope_scaling": config["rope_scaling"] | factors})
    weights = ((name, torch.zeros(shape)) for name, shape in tensor_shapes(arch).items())
    write_hf_directory(tmp_path / "base", arch, weights, tokenizer_from=shared_data / "phi4-mini")
    adopt(tmp_path / "base", tmp_path / "ready", system_prompt=REASONING_SYSTEM_PROMPT)
    prompt = render_prompt(load_tokenizer(tmp_path / "ready"), QUESTION)
    system, user, assistant, end = 200022, 200021, 200019, 200020  # the ids of Phi-4-mini's model card
    assert [prompt[0], prompt[-1]] == [system, assistant]
    assert [token for token in prompt if token >= 199999] == [system, end, user, end, assistant]
    assert prompt == by_hand(tmp_path / "ready", "Your name is Phi, an AI math expert developed by Microsoft.")
    assert json.loads((tmp_path / "ready" / "generation_config.json").read_text())["eos_token_id"] == [200020, 199999]


@pytest.mark.parametrize(
    ("family", "opening", "end"),
    [
        ("qwen3", "<|im_start|>system\nYou are an AI math expert.<|im_end|>\n<|im_start|>user\n", "<|im_end|>"),
        ("smollm3", "<|im_start|>system\nYou are an AI math expert.<|im_end|>\n<|im_start|>user\n", "<|im_end|>"),
        ("llama", "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are an AI", "<|eot_id|>"),
    ],
)
def test_another_family_is_adopted_in_its_own_turn_format(
    family: str, opening: str, end: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shape = ("hidden_size=32", "intermediate_size=48", "num_hidden_layers=1", "num_attention_heads=4")
    plain = ("partial_rotary_factor=1.0", "long_factor_growth=0.0", f"family={family}")
    output = f"run.output={tmp_path / 'base'}"
    run_base(load_config(BaseConfig, Path("conf/base/tiny.yaml"), [output, *shape, *plain]))
    source = tmp_path / "base" / "hf"
    settings = json.loads((source / "tokenizer_config.json").read_text("utf-8"))
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": None}), "utf-8")
    adopt(source, tmp_path / "ready", system_prompt=None)
    tokenizer = load_tokenizer(tmp_path / "ready")
    prompt = tokenizer.decode(render_prompt(tokenizer, QUESTION))
    assert prompt.startswith(opening)
    assert f"{QUESTION}{end}" in prompt
    ends = json.loads((tmp_path / "ready" / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.convert_ids_to_tokens(ends)[0] == end
    assert json.loads((tmp_path / "ready" / "config.json").read_text())["model_type"] == family
    assert weights_hash(tmp_path / "ready") == HFDirectory(source).weights_hash(), "one name in samplers and stages"
    with caplog.at_level(logging.WARNING):
        warn_of_other_template(tmp_path / "ready")
    assert not caplog.records


# What each family's makers do with tools, in short: Phi-4-mini puts them into the system turn, Qwen into a turn of
# its own with answers as a user's, Llama 3.1 into the user's with answers of "ipython".
TOOL_TEMPLATES = {
    "phi3": "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not none %}"
    "{{ '<|tool|>' + message['tools'] + '<|/tool|>' }}{% endif %}{{ '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}",
    "qwen3": """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}
        {{- "\\n" }}{{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    "llama": """
{{- bos_token }}
{%- set ns = namespace(first=true) %}
{%- for message in messages %}
    {%- set role = 'ipython' if message.role in ('tool', 'ipython') else message.role %}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}
    {%- if tools is not none and ns.first and role == 'user' %}
        {{- 'Functions:\\n' + (tools | tojson) + '\\n\\n' }}
        {%- set ns.first = false %}
    {%- endif %}
    {%- if 'tool_calls' in message %}
        {{- message.tool_calls[0].function | tojson }}
    {%- else %}
        {{- message.content }}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer", "description": "one"}}},
    },
}
ASKED: list[dict[str, Any]] = [{"role": "user", "content": "2+2?"}]
CALLED: list[dict[str, Any]] = [
    *ASKED,
    {
        "role": "assistant",
        "content": "I add.",
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}],
    },
    {"role": "tool", "content": "4"},
]
WITH_TOOLS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = {
    "given": (ASKED, [TOOL]),
    "given, called and answered": (CALLED, [TOOL]),
    "called and answered": (CALLED, None),
    "in the system turn": ([{"role": "system", "content": "Be brief.", "tools": '[{"name": "add"}]'}, *ASKED], None),
}


def tiny(root: Path, family: str, template: str | None) -> Path:
    shape = ("hidden_size=32", "intermediate_size=48", "num_hidden_layers=1", "num_attention_heads=4")
    plain = () if family == "phi3" else ("partial_rotary_factor=1.0", "long_factor_growth=0.0")
    output = (f"run.output={root / family}", f"family={family}")
    run_base(load_config(BaseConfig, Path("conf/base/tiny.yaml"), [*output, *shape, *plain]))
    source = root / family / "hf"
    settings = json.loads((source / "tokenizer_config.json").read_text("utf-8"))
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}), "utf-8")
    return source


@pytest.mark.parametrize("family", TOOL_TEMPLATES)
def test_a_conversation_with_tools_is_rendered_as_the_models_own_template_does(family: str, tmp_path: Path) -> None:
    source, ready, again = tiny(tmp_path, family, TOOL_TEMPLATES[family]), tmp_path / "ready", tmp_path / "again"
    adopt(source, ready, system_prompt="Think.")
    adopt(ready, again, system_prompt="Think.")
    own, *adopted = (load_tokenizer(place) for place in (source, ready, again))
    for tokenizer in adopted:
        for name, (messages, tools) in WITH_TOOLS.items():
            for opened in (True, False):
                wanted, found = (
                    one.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=opened)
                    for one in (own, tokenizer)
                )
                assert found == wanted, name
        assert "Think." in tokenizer.decode(render_prompt(tokenizer, QUESTION))
        assert "Think." not in own.decode(render_prompt(own, QUESTION))
        # No tools are no tools, however that is said.
        empty = tokenizer.apply_chat_template(ASKED, tools=[], tokenize=False)
        assert empty == tokenizer.apply_chat_template(ASKED, tokenize=False)
        assert "Think." in empty
        assert tokenizer.get_added_vocab() == own.get_added_vocab()
        assert stop_token_ids(tokenizer) == stop_token_ids(own)
    assert (ready / "generation_config.json").read_bytes() == (again / "generation_config.json").read_bytes()


@pytest.mark.parametrize("template", [None, INSTRUCT], ids=["no template", "one without tools"])
def test_tools_that_the_model_never_knew_are_refused_with_a_word(template: str | None, tmp_path: Path) -> None:
    from jinja2 import TemplateError

    adopt(tiny(tmp_path, "phi3", template), tmp_path / "ready", system_prompt="Think.")
    tokenizer = load_tokenizer(tmp_path / "ready")
    for messages, tools in WITH_TOOLS.values():
        with pytest.raises(TemplateError, match="no tools"):
            tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    assert "Think." in tokenizer.apply_chat_template(ASKED, tokenize=False)


def test_phi_4_minis_own_template_keeps_its_tools(shared_data: Path, tmp_path: Path) -> None:
    settings = json.loads((shared_data / "phi4-mini" / "tokenizer_config.json").read_text("utf-8"))
    source = tiny(tmp_path, "phi3", settings["chat_template"])
    adopt(source, tmp_path / "ready", system_prompt=None)
    own, ready = load_tokenizer(source), load_tokenizer(tmp_path / "ready")
    messages, _ = WITH_TOOLS["in the system turn"]
    text = ready.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == own.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert '<|tool|>[{"name": "add"}]<|/tool|>' in text


def test_a_base_that_is_none_is_one_message(instruct: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no single quote"):
        adopt(instruct, tmp_path / "ready", system_prompt="It's {{ 1 }}")
    (instruct / "tokenizer_config.json").write_text("[", "utf-8")
    with pytest.raises(UserError, match="tokenizer_config"):
        adopt(instruct, tmp_path / "ready", system_prompt="ok")
    shutil.rmtree(instruct)
    with pytest.raises(UserError):
        adopt(instruct, tmp_path / "ready", system_prompt="ok")
    assert not (tmp_path / "ready").exists()
