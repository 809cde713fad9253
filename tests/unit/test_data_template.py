"""A chat template is a program: one that does not end, or fills the memory, is one message."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from phimr_nemo.data.chat import REASONING_TEMPLATE, load_tokenizer, prompt_text, render_prompt
from phimr_nemo.data.synthetic.tokenizer import build_tokenizer
from phimr_nemo.data.template import MAX_TEMPLATE_CHARS, check_template
from phimr_nemo.errors import UserError

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x"
HOSTILE = {
    "nested loops": LOOP,
    "a huge text": "{{ 'a' * 10 ** 10 }}",
    "a text that doubles": "{% set ns = namespace(t='a') %}{% for i in range(60) %}{% set ns.t = ns.t + ns.t %}"
    "{% endfor %}{{ ns.t }}",
    "a long prompt": "{{ 'a' * 200000 }}",
    "broken": "{% if",
    "the machine": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "a refusal": "{{ raise_exception('no') }}",
    "a long template": "{# " + "x" * MAX_TEMPLATE_CHARS + " #}",
    "deep": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
}
ORDINARY = {
    "own": REASONING_TEMPLATE,
    "instruct": "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and "
    "message['tools'] is not none %}{{ message['tools'] }}{% else %}{{ '<|' + message['role'] + '|>' + "
    "message['content'] + '<|end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}"
    "{% else %}{{ eos_token }}{% endif %}",
    "newer": "{%- for m in messages -%}{% generation %}{{ m.content | trim | tojson }}{% endgeneration %}"
    "{% if loop.index > 9 %}{% break %}{% endif %}{%- endfor -%}{{ strftime_now('%Y') }}{{ bos_token }}",
    "one turn": "{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}{{ messages[0].content }}",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_template_that_cannot_be_rendered_is_one_message(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="chat template in") as caught:
        check_template(HOSTILE[kind], tmp_path, {"eos_token": "<|endoftext|>"})
    assert len(caught.value.problem) < 1000


@pytest.mark.parametrize("kind", ORDINARY)
def test_an_ordinary_template_passes(kind: str, tmp_path: Path) -> None:
    check_template(ORDINARY[kind], tmp_path, {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(["1 + 1"], vocab_size=261, system_prompt="Be exact.").save_pretrained(directory)
    return directory


def edited(source: Path, target: Path, **changes: object) -> Path:
    shutil.copytree(source, target)
    (target / "chat_template.jinja").unlink(missing_ok=True)
    file = target / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **changes}), "utf-8")
    return target


def test_every_reader_of_a_tokenizer_is_protected(tokenizer: Path, tmp_path: Path) -> None:
    assert "Be exact." in prompt_text(load_tokenizer(tokenizer), "1 + 1")
    with pytest.raises(UserError, match=r"GiB to render|processor time"):
        load_tokenizer(edited(tokenizer, tmp_path / "huge", chat_template="{{ 'a' * 10 ** 10 }}"))
    several = [{"name": "default", "template": REASONING_TEMPLATE}, {"name": "rag", "template": "{{ 1 // 0 }}"}]
    named = edited(tokenizer, tmp_path / "named", chat_template=several)
    with pytest.raises(UserError, match="does not render"):
        load_tokenizer(named)


@pytest.mark.parametrize(
    "content",
    [b"[" * 200_000, b"{}", b'{"model": 1}', b"\xff", b'{"version":"1.0","model":{"type":"BPE","vocab":5}}', b""],
    ids=["deep", "empty object", "a number", "no text", "no vocabulary", "empty"],
)
def test_a_tokenizer_that_is_none_is_one_message(content: bytes, tokenizer: Path, tmp_path: Path) -> None:
    shutil.copytree(tokenizer, tmp_path / "t")
    (tmp_path / "t" / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer"):
        load_tokenizer(tmp_path / "t")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_a_tokenizers_file_of_absurd_size_is_not_read(name: str, tokenizer: Path, tmp_path: Path) -> None:
    shutil.copytree(tokenizer, tmp_path / "t")
    with (tmp_path / "t" / name).open("ab") as file:
        file.truncate(1 << 32)
    with pytest.raises(UserError, match=f"{name} has 4,294,967,296 bytes"):
        load_tokenizer(tmp_path / "t")


def test_a_pattern_that_finds_no_end_is_one_message(tokenizer: Path, tmp_path: Path) -> None:
    """Of a tokenizer from elsewhere, whose regular expression goes back over a text again and again."""
    shutil.copytree(tokenizer, tmp_path / "t")
    file = tmp_path / "t" / "tokenizer.json"
    content = json.loads(file.read_text("utf-8"))
    pattern = {
        "type": "Split",
        "pattern": {"Regex": "(a|a)*$|(?:(?:a+)+)+b"},
        "behavior": "Isolated",
        "invert": False,
    }
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [pattern, content["pre_tokenizer"]]}
    file.write_text(json.dumps(content), "utf-8")
    opened = load_tokenizer(tmp_path / "t")
    assert render_prompt(opened, "2+2?")
    with pytest.raises(UserError, match="fails at a text"):
        render_prompt(opened, "a" * 5000 + "!")
