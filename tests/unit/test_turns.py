"""The turn formats: prompts put together by hand, what is learnt of a conversation, and templates of other makers."""

from __future__ import annotations

import copy

import pytest
from transformers import PreTrainedTokenizerBase

from phimr_nemo.data import chat
from phimr_nemo.data.synthetic.tokenizer import build_tokenizer, synthetic_corpus
from phimr_nemo.data.turns import CHATML, CHATML_LLAMA3, FORMATS, LLAMA3, PHI, TurnFormat, format_of
from phimr_nemo.errors import UserError

CHATML_PROMPT = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
# What each format's makers write: Phi-4-mini's, Qwen2.5's, SmolLM3's and Llama 3's model cards.
PROMPTS = {
    PHI.name: "<|system|>Be brief.<|end|><|user|>2+2?<|end|><|assistant|>",
    CHATML.name: CHATML_PROMPT,
    CHATML_LLAMA3.name: CHATML_PROMPT,
    LLAMA3.name: "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
}
ENDS = {
    PHI.name: ("<|end|>", "<|endoftext|>"),
    CHATML.name: ("<|im_end|>", "<|endoftext|>"),
    CHATML_LLAMA3.name: ("<|im_end|>", "<|end_of_text|>"),
    LLAMA3.name: ("<|eot_id|>", "<|end_of_text|>"),
}
TURNS = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "<think>two</think>4"},
    {"role": "user", "content": "And 1 more?"},
    {"role": "assistant", "content": "5"},
]


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, PreTrainedTokenizerBase]:
    texts = list(synthetic_corpus())
    return {one.name: build_tokenizer(texts, system_prompt="Be brief.", turns=one) for one in FORMATS}


@pytest.mark.parametrize("turns", FORMATS, ids=lambda one: one.name)
def test_the_prompt_and_what_is_learnt(turns: TurnFormat, tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    tokenizer, end = tokenizers[turns.name], ENDS[turns.name][0]
    prompt = chat.prompt_text(tokenizer, "2+2?")
    assert prompt == PROMPTS[turns.name]
    ids, mask = chat.render_conversation(tokenizer, "2+2?", "<think>two</think>4")
    assert ids[: len(ids) - sum(mask)] == chat.render_prompt(tokenizer, "2+2?")
    assert tokenizer.decode(ids) == f"{prompt}<think>two</think>4{end}"
    assert tokenizer.decode(ids[-sum(mask) :]) == f"<think>two</think>4{end}"
    assert ids[-1] == tokenizer.convert_tokens_to_ids(end), "the end is one token"


@pytest.mark.parametrize("turns", FORMATS, ids=lambda one: one.name)
def test_several_turns_are_the_templates_own(
    turns: TurnFormat, tokenizers: dict[str, PreTrainedTokenizerBase]
) -> None:
    tokenizer, end = tokenizers[turns.name], ENDS[turns.name][0]
    ids, mask = chat.render_messages(tokenizer, TURNS)
    whole = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert whole.startswith(tokenizer.decode(ids))
    learnt = [token for token, counts in zip(ids, mask, strict=True) if counts]
    assert tokenizer.decode(learnt) == f"<think>two</think>4{end}5{end}"


@pytest.mark.parametrize("turns", FORMATS, ids=lambda one: one.name)
def test_a_response_ends_at_the_turn_and_at_the_text(
    turns: TurnFormat, tokenizers: dict[str, PreTrainedTokenizerBase]
) -> None:
    tokenizer = tokenizers[turns.name]
    stops = chat.stop_token_ids(tokenizer)
    assert tuple(tokenizer.convert_ids_to_tokens(list(stops))) == ENDS[turns.name]
    with pytest.raises(UserError, match="special token"):
        chat.render_prompt(tokenizer, f"2+2?{turns.end}")
    assert format_of(tokenizer.get_added_vocab()) is turns


def with_template(tokenizer: PreTrainedTokenizerBase, template: str) -> PreTrainedTokenizerBase:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def test_the_end_of_a_turn_is_the_templates_and_not_the_formats(
    tokenizers: dict[str, PreTrainedTokenizerBase],
) -> None:
    """A template of another maker, which ends the assistant's turn as Llama 2 and Mistral do, by the text's end."""
    mistral = with_template(
        tokenizers[PHI.name],
        "{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}",
    )
    assert chat.end_of_turn(mistral) == "<|endoftext|>"
    assert chat.stop_token_ids(mistral) == (mistral.eos_token_id,)
    ids, mask = chat.render_conversation(mistral, "2+2?", "4")
    assert mistral.decode(ids) == "[INST] 2+2? [/INST]4<|endoftext|>"
    assert mistral.decode(ids[-sum(mask) :]) == "4<|endoftext|>"


def test_a_template_that_refuses_an_answer_at_the_end_falls_back_to_the_format(
    tokenizers: dict[str, PreTrainedTokenizerBase],
) -> None:
    template = tokenizers[CHATML.name].chat_template
    refusing = with_template(
        tokenizers[CHATML.name],
        "{% if messages[-1]['role'] == 'assistant' %}{{ raise_exception('no') }}{% endif %}" + str(template),
    )
    assert chat.end_of_turn(refusing) == "<|im_end|>"


def test_a_tokenizer_of_no_format_is_refused_with_what_each_needs(
    tokenizers: dict[str, PreTrainedTokenizerBase],
) -> None:
    tokenizer = with_template(tokenizers[PHI.name], "{{ messages[0]['content'] }}")
    assert chat.end_of_turn(tokenizer) == "<|end|>"
    plain = build_tokenizer(
        list(synthetic_corpus()), turns=TurnFormat("none", ("<|x|>",), ("", ""), "", "", "", "", "")
    )
    plain.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(UserError, match="turn formats") as caught:
        chat.end_of_turn(plain)
    assert all(one.name in caught.value.rule for one in FORMATS)


def test_a_tokenizer_with_the_tokens_of_two_formats_has_that_of_its_model() -> None:
    """SmolLM3's tokenizer is Llama 3's with ChatML's tokens in place of reserved ones."""
    assert format_of({*LLAMA3.tokens, "<|im_start|>", "<|im_end|>", "<think>", "</think>"}) is CHATML_LLAMA3
    assert format_of(LLAMA3.tokens) is LLAMA3
    assert format_of(CHATML.tokens) is CHATML
