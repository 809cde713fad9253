"""How a conversation's turns are marked: Phi's, ChatML (Qwen, SmolLM2 and 3) and Llama 3's headers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Final

from phimr_nemo.errors import UserError

ROLES: Final = ("system", "user", "assistant")
# A conversation has tools when some are given to the template, or a message brings, calls or answers for one.
HAS_TOOLS: Final = (
    "{% set about = namespace(tools=tools is defined and tools) %}{% for message in messages %}"
    "{% if message['role'] not in ('system', 'user', 'assistant') or message['tool_calls'] or message['tools'] %}"
    "{% set about.tools = true %}{% endif %}{% endfor %}{% if about.tools %}"
)
OTHERWISE: Final = "{# without tools, the reasoning template #}{% else %}"
END: Final = "{% endif %}"
NO_TOOLS: Final = (
    "{{ raise_exception('the model was adopted with a chat template that has no tools: "
    "it knows messages of system, user and assistant') }}"
)
"""In the place of a template for tools."""


@dataclass(frozen=True)
class TurnFormat:
    """The marks of a format.

    Attributes:
        name: for people.
        tokens: the special tokens that a tokenizer has to have; that which ends a text comes first.
        role: what stands before and after the name of a turn's role.
        end: the token that ends a turn, the last one that is learnt of a response.
        after: what follows it before the next turn.
        beginning: Jinja, before the first turn.
        closing: Jinja, behind the last turn where no generation is asked for.
        system_prompt: what the reasoning template puts before every conversation unless something else is given.
    """

    name: str
    tokens: tuple[str, ...]
    role: tuple[str, str]
    end: str
    after: str
    beginning: str
    closing: str
    system_prompt: str

    @property
    def end_of_text(self) -> str:
        """The token that ends a text."""
        return self.tokens[0]

    def template(self, system_prompt: str) -> str:
        """The reasoning chat template (Jinja) with a given system text.

        It always opens with the system text, to which the user's own system message is appended after a space; then
        come the turns and, where a generation is asked for, the beginning of the assistant's.

        Raises:
            UserError: the system text holds a quote, a backslash, a line break or a brace, which Jinja would read.
        """
        if any(character in system_prompt for character in "'\\\n{}"):
            raise UserError(
                f"system prompt {system_prompt!r}",
                rule="a system prompt holds no single quote, backslash, line break or brace",
                remedy="rephrase it",
            )
        before, behind, end = (text.replace("\n", "\\n") for text in (*self.role, self.end + self.after))
        return (
            self.beginning + "{{ '" + before + "system" + behind + system_prompt + "' }}"
            "{% for message in messages %}{% if message['role'] == 'system' %}"
            "{{ ' ' + message['content'] }}"
            "{% endif %}{% endfor %}"
            "{{ '" + end + "' }}"
            "{% for message in messages %}{% if message['role'] != 'system' %}"
            "{{ '" + before + "' + message['role'] + '" + behind + "' + message['content'] + '" + end + "' }}"
            "{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ '"
            + before
            + "assistant"
            + behind
            + "' }}"
            + self.closing
            + "{% endif %}"
        )


PHI: Final = TurnFormat(
    name="Phi",
    tokens=("<|endoftext|>", *(f"<|{role}|>" for role in ROLES), "<|end|>"),
    role=("<|", "|>"),
    end="<|end|>",
    after="",
    beginning="",
    closing="{% else %}{{ eos_token }}",
    system_prompt="Your name is Phi, an AI math expert developed by Microsoft.",
)
CHATML: Final = TurnFormat(
    name="ChatML",
    tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    role=("<|im_start|>", "\n"),
    end="<|im_end|>",
    after="\n",
    beginning="",
    closing="",
    system_prompt="You are an AI math expert.",
)
CHATML_LLAMA3: Final = replace(
    CHATML, name="ChatML among Llama 3's tokens", tokens=("<|end_of_text|>", "<|im_start|>", "<|im_end|>")
)
"""SmolLM3's, whose tokenizer is Llama 3's and keeps the tokens of that one's headers."""
LLAMA3: Final = TurnFormat(
    name="Llama 3",
    tokens=("<|end_of_text|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    role=("<|start_header_id|>", "<|end_header_id|>\n\n"),
    end="<|eot_id|>",
    after="",
    beginning="{{ '<|begin_of_text|>' }}",
    closing="",
    system_prompt="You are an AI math expert.",
)
FORMATS: Final = (PHI, CHATML, CHATML_LLAMA3, LLAMA3)


def with_tools(reasoning: str, own: str) -> str:
    """The reasoning template, and for conversations with tools the model's own.

    Args:
        reasoning: Jinja, as :meth:`TurnFormat.template` gives it.
        own: the model's own template, one that was adopted before included; without tools in it, a conversation with
            tools is refused.
    """
    if own.startswith(HAS_TOOLS):
        own = own.removeprefix(HAS_TOOLS).partition(OTHERWISE)[0]
    elif "tool" not in own:
        own = NO_TOOLS
    else:
        # Jinja takes a line break from behind a tag, and one from the end of a template.
        own = ("\n" if own.startswith("\n") else "") + own.removesuffix("\n")
    return HAS_TOOLS + own + OTHERWISE + reasoning + END


def format_of(added: Collection[str]) -> TurnFormat | None:
    """The format whose special tokens are among a tokenizer's added ones; None where there is none."""
    return next((one for one in FORMATS if set(one.tokens) <= set(added)), None)
