"""A hundred config.json files: published models and what people make of them, and whether they are to be read.

`READ`: transformers 5 gives the same numbers. `REFUSED`: name -> (config, a word of the refusal). The published ones
have the shapes and settings of the models named; factors, where there are any, are made up in the right number.
"""

from __future__ import annotations

from typing import Any, Final

Config = dict[str, Any]

NOT_THERE: Final = object()
PAIRS: Final = 12
SHORT: Final = [1.0 + 0.01 * index for index in range(PAIRS)]
LONG: Final = [1.0 + 0.5 * index for index in range(PAIRS)]
LONGROPE: Final[Config] = {"type": "longrope", "short_factor": SHORT, "long_factor": LONG}
FOUR: Final[Config] = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "vocab_size": 200064,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "partial_rotary_factor": 0.75,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "rope_scaling": LONGROPE,
    "sliding_window": 262144,
    "tie_word_embeddings": True,
    "bos_token_id": 199999,
    "eos_token_id": 199999,
    "pad_token_id": 199999,
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0",
    "use_cache": True,
}
"""Phi-4-mini's in the style of transformers 4, small."""
PARAMETERS: Final[Config] = {
    "rope_type": "longrope",
    "short_factor": SHORT,
    "long_factor": LONG,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 4096,
}


def four(**changes: Any) -> Config:
    """Phi-4-mini's of transformers 4 with changes; `NOT_THERE` removes a field."""
    return {name: value for name, value in {**FOUR, **changes}.items() if value is not NOT_THERE}


def scaled(**changes: Any) -> Config:
    """The same, with changes within rope_scaling."""
    scaling = {name: value for name, value in {**LONGROPE, **changes}.items() if value is not NOT_THERE}
    return four(rope_scaling=scaling)


def five(**changes: Any) -> Config:
    """What transformers 5 saves of it, with changes within rope_parameters."""
    parameters = {name: value for name, value in {**PARAMETERS, **changes}.items() if value is not NOT_THERE}
    away = dict.fromkeys(("rope_scaling", "rope_theta", "torch_dtype"), NOT_THERE)
    return four(**away, rope_parameters=parameters, dtype="bfloat16", transformers_version="5.24.0")


def plain(**changes: Any) -> Config:
    """A model without LongRoPE."""
    return four(rope_scaling=None, partial_rotary_factor=1.0, sliding_window=None, **changes)


def published(heads: int, key_value_heads: int, hidden: int, inner: int, layers: int, **changes: Any) -> Config:
    """One of Microsoft's, at its own shape."""
    shape = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    return four(
        **{**shape, "num_attention_heads": heads, "num_key_value_heads": key_value_heads, **PHI3, **changes},
    )


PHI3: Final[Config] = {
    "vocab_size": 32064,
    "bos_token_id": 1,
    "eos_token_id": 32000,
    "pad_token_id": 32000,
    "tie_word_embeddings": False,
    "partial_rotary_factor": NOT_THERE,
    "rope_scaling": None,
    "max_position_embeddings": 4096,
    "sliding_window": 2047,
}
PHI4: Final[Config] = {
    "vocab_size": 100352,
    "bos_token_id": 100257,
    "eos_token_id": 100257,
    "pad_token_id": 100257,
    "max_position_embeddings": 16384,
    "original_max_position_embeddings": 16384,
    "rope_theta": 250000,
    "sliding_window": None,
}


def factors(pairs: int, kind: str = "longrope") -> Config:
    """LongRoPE's settings for a head of 2 * pairs rotated dimensions."""
    grown = [1.0 + 0.02 * index for index in range(pairs)]
    return {"long_factor": grown, "short_factor": [1.0] * pairs, "type": kind}


LONG_CONTEXT: Final[Config] = {"max_position_embeddings": 131072, "sliding_window": 262144}
MINI: Final = (32, 32, 3072, 8192, 32)
MEDIUM: Final = (40, 10, 5120, 17920, 40)
MINI_4: Final[Config] = {
    **{name: FOUR[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")},
    **LONG_CONTEXT,
    "tie_word_embeddings": True,
    "partial_rotary_factor": 0.75,
    "rope_scaling": factors(48),
}

PUBLISHED: Final[dict[str, Config]] = {
    "Phi-3-mini-4k": published(*MINI),
    "Phi-3-mini-128k": published(*MINI, **LONG_CONTEXT, rope_scaling=factors(48)),
    "Phi-3-mini-128k, first version": published(*MINI, **LONG_CONTEXT, rope_scaling=factors(48, "su")),
    "Phi-3.5-mini": published(*MINI, **LONG_CONTEXT, rope_scaling=factors(48), attention_bias=False),
    "Phi-3-medium-4k": published(*MEDIUM),
    "Phi-3-medium-128k": published(*MEDIUM, **LONG_CONTEXT, rope_scaling=factors(64)),
    "Phi-4": published(*MEDIUM, **PHI4),
    "Phi-4-reasoning": published(*MEDIUM, **{**PHI4, "eos_token_id": 100265, "rope_theta": 500000}),
    "Phi-4-mini-instruct": published(24, 8, 3072, 8192, 32, **MINI_4),
    "Phi-4-mini-reasoning": published(24, 8, 3072, 8192, 32, **MINI_4, _name_or_path="Phi-4-mini-reasoning"),
}
READ: Final[dict[str, Config]] = {
    **PUBLISHED,
    "transformers 4": four(),
    "with lists of code beside it": four(auto_map={"AutoConfig": "configuration_phi3.Phi3Config"}),
    "with fields of other models": four(full_attn_mod=1, interpolate_factor=1, lm_head_bias=False, mlp_bias=False),
    "with fields of nobody": four(something="else", logit_scale=0.5),
    "one more end token": four(eos_token_id=[200020, 199999]),
    "one end token in a list": four(eos_token_id=[199999]),
    "no beginning": four(bos_token_id=None),
    "beginning unsaid": four(bos_token_id=NOT_THERE),
    "padding unsaid": four(pad_token_id=NOT_THERE),
    "no padding": four(pad_token_id=None),
    "end unsaid": four(eos_token_id=NOT_THERE),
    "all three unsaid": four(bos_token_id=NOT_THERE, eos_token_id=NOT_THERE, pad_token_id=NOT_THERE),
    "key/value heads unsaid": four(num_key_value_heads=NOT_THERE),
    "key/value heads null": four(num_key_value_heads=None),
    "one key/value head": four(num_key_value_heads=1),
    "untied": four(tie_word_embeddings=False),
    "tie unsaid": four(tie_word_embeddings=NOT_THERE),
    "epsilon unsaid": four(rms_norm_eps=NOT_THERE),
    "epsilon 1e-6": four(rms_norm_eps=1e-6),
    "initializer unsaid": four(initializer_range=NOT_THERE),
    "classes unsaid": four(architectures=NOT_THERE),
    "classes null": four(architectures=None),
    "head_dim said": four(head_dim=32),
    "no window": four(sliding_window=None),
    "window unsaid": four(sliding_window=NOT_THERE),
    "window of 512": four(sliding_window=512),
    "dtype in the new name": four(torch_dtype=NOT_THERE, dtype="bfloat16"),
    "theta 500000": four(rope_theta=500000.0),
    "theta whole": four(rope_theta=10000),
    "theta unsaid": four(rope_theta=NOT_THERE),
    "original unsaid": four(original_max_position_embeddings=NOT_THERE),
    "original 2048": four(original_max_position_embeddings=2048),
    "context is original": four(max_position_embeddings=4096),
    "context below original": four(max_position_embeddings=2048),
    "context one above": four(max_position_embeddings=4097),
    "context unsaid": four(max_position_embeddings=NOT_THERE),
    "whole factors": scaled(short_factor=[1] * PAIRS, long_factor=[2] * PAIRS),
    "equal factors": scaled(long_factor=SHORT),
    "type su": scaled(type="su"),
    "type yarn with LongRoPE's factors": scaled(type="yarn"),
    "both names of the type": scaled(rope_type="longrope"),
    "new name of the type": scaled(type=NOT_THERE, rope_type="longrope"),
    "factor that follows": scaled(factor=32.0),
    "factor that follows, whole": scaled(factor=32),
    "factor null": scaled(factor=None),
    "attention factor that follows": scaled(attention_factor=1.1902380714238083),
    "attention factor null": scaled(attention_factor=None),
    "original in both": scaled(original_max_position_embeddings=4096),
    "theta in both": scaled(rope_theta=10000.0),
    "share in both": scaled(partial_rotary_factor=0.75),
    "half of each head": four(
        partial_rotary_factor=0.5,
        rope_scaling={"type": "longrope", "short_factor": SHORT[:8], "long_factor": LONG[:8]},
    ),
    "plain": plain(),
    "plain, scaling unsaid": {name: value for name, value in plain().items() if name != "rope_scaling"},
    "plain, scaling empty": {**plain(), "rope_scaling": {}},
    "plain, type default": {**plain(), "rope_scaling": {"type": "default"}},
    "plain, new type default": {**plain(), "rope_scaling": {"rope_type": "default"}},
    "plain, original 16384": plain(original_max_position_embeddings=16384, max_position_embeddings=16384),
    "plain in rope_parameters": {**plain(), "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "plain, theta in rope_parameters": {
        **{name: value for name, value in plain().items() if name != "rope_theta"},
        "rope_parameters": {"rope_type": "default", "rope_theta": 250000.0},
    },
    "transformers 5": five(),
    "transformers 5, old name of the type too": five(type="longrope"),
    "transformers 5, old name alone": five(type="longrope", rope_type=NOT_THERE),
    "transformers 5, theta unsaid": five(rope_theta=NOT_THERE),
    "transformers 5, theta 500000": five(rope_theta=500000.0),
    "transformers 5, original unsaid inside": five(original_max_position_embeddings=NOT_THERE),
    "transformers 5, original only inside": {
        name: value for name, value in five().items() if name != "original_max_position_embeddings"
    },
    "transformers 5, share only inside": {
        name: value for name, value in five().items() if name != "partial_rotary_factor"
    },
    "transformers 5, factor that follows": five(factor=32.0),
    "transformers 5, attention factor null": five(attention_factor=None),
    "transformers 5, rope_scaling null beside": {**five(), "rope_scaling": None},
    "transformers 5, the same in rope_scaling": {**five(), "rope_scaling": LONGROPE, "rope_theta": 10000.0},
    "transformers 5, no beginning": {**five(), "bos_token_id": None},
    "transformers 5, end tokens": {**five(), "eos_token_id": [200020, 199999]},
}
REFUSED: Final[dict[str, tuple[Config, str]]] = {
    "factor 16 for 32": (scaled(factor=16.0), "factor"),
    "factor 1 for 32": (five(factor=1.0), "factor"),
    "attention factor 1": (scaled(attention_factor=1.0), "attention_factor"),
    "attention factor as text": (scaled(attention_factor="1.19"), "attention_factor"),
    "original in two places": (scaled(original_max_position_embeddings=8192), "original_max_position_embeddings"),
    "original in two places, new": (
        five(original_max_position_embeddings=2048),
        "original_max_position_embeddings",
    ),
    "original that transformers would ignore": (
        {name: value for name, value in five(original_max_position_embeddings=8192).items() if name[:3] != "ori"},
        "8192",
    ),
    "theta in two places": (scaled(rope_theta=500000.0), "rope_theta"),
    "theta in two places, new": ({**five(), "rope_theta": 500000.0}, "rope_theta"),
    "share in two places": (five(partial_rotary_factor=1.0), "partial_rotary_factor"),
    "plain in parameters beside LongRoPE": (
        four(rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
        "rope_parameters",
    ),
    "other factors in parameters": ({**five(long_factor=SHORT), "rope_scaling": LONGROPE}, "rope_parameters"),
    "other theta in parameters": (four(rope_parameters={**PARAMETERS, "rope_theta": 5e5}), "rope_theta"),
    "two types": (scaled(rope_type="default"), "default"),
    "no factors": (four(rope_scaling={"type": "longrope"}), "long_factor"),
    "no factors, su": (four(rope_scaling={"type": "su"}), "short_factor"),
    "no factors, new": (five(short_factor=NOT_THERE, long_factor=NOT_THERE), "short_factor"),
    "no long factors": (scaled(long_factor=NOT_THERE), "long_factor"),
    "no short factors": (scaled(short_factor=None), "short_factor"),
    "factors without a type": (scaled(type=NOT_THERE), "without a type"),
    "factors of type default": (scaled(type="default"), "default"),
    "factor of type default": ({**plain(), "rope_scaling": {"type": "default", "factor": 8.0}}, "factor"),
    "linear": ({**plain(), "rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    "dynamic": ({**plain(), "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    "real YaRN": ({**plain(), "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    "llama3": ({**plain(), "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3"),
    "too many factors": (scaled(short_factor=[1.0] * 16), "short_factor"),
    "factor 0": (scaled(long_factor=[0.0] * PAIRS), "long_factor"),
    "factor as text": (scaled(long_factor=["1"] * PAIRS), "long_factor"),
    "factor NaN": (scaled(short_factor=[float("nan")] * PAIRS), "short_factor"),
    "settings of Phi-3.5-MoE": (scaled(short_mscale=1.1), "short_mscale"),
    "settings of Qwen2-VL": (scaled(mrope_section=[1]), "mrope_section"),
    "settings by layer": (
        four(rope_scaling=NOT_THERE, rope_parameters={"full_attention": PARAMETERS}),
        "full_attention",
    ),
    "scaling is a list": (four(rope_scaling=[1]), "rope_scaling"),
    "share unsaid": (four(partial_rotary_factor=NOT_THERE), "short_factor"),
    "theta 0": (four(rope_theta=0), "rope_theta"),
    "theta NaN": (four(rope_theta=float("nan")), "rope_theta"),
    "theta as text": (four(rope_theta="10000"), "rope_theta"),
    "original 0": (four(original_max_position_embeddings=0), "original_max_position_embeddings"),
    "original 1": (four(original_max_position_embeddings=1), "original_max_position_embeddings"),
    "context 0": (four(max_position_embeddings=0), "max_position_embeddings"),
    "no key/value heads": (four(num_key_value_heads=0), "num_key_value_heads"),
    "head_dim 64": (four(head_dim=64), "head_dim"),
    "epsilon 0": (four(rms_norm_eps=0.0), "rms_norm_eps"),
    "epsilon null": (four(rms_norm_eps=None), "rms_norm_eps"),
    "theta null": (four(rope_theta=None), "rope_theta"),
    "original null": (four(original_max_position_embeddings=None), "original_max_position_embeddings"),
    "tie null": (four(tie_word_embeddings=None), "tie_word_embeddings"),
    "epsilon below 0": (four(rms_norm_eps=-1.0), "rms_norm_eps"),
    "vocabulary as text": (four(vocab_size="200064"), "vocab_size"),
    "vocabulary as a float": (four(vocab_size=200064.0), "vocab_size"),
    "tie as text": (four(tie_word_embeddings="false"), "tie_word_embeddings"),
    "window as text": (four(sliding_window="262144"), "sliding_window"),
    "window 0": (four(sliding_window=0), "sliding_window"),
    "end null": (four(eos_token_id=None), "eos_token_id"),
    "end nowhere": (four(eos_token_id=[]), "eos_token_id"),
    "padding outside": (four(pad_token_id=-1), "pad_token_id"),
    "end outside": (four(eos_token_id=200064), "eos_token_id"),
    "end as text": (four(eos_token_id="<|end|>"), "eos_token_id"),
    "bias": (four(attention_bias=True), "attention_bias"),
    "dropout": (four(resid_pdrop=0.1), "resid_pdrop"),
    "gelu": (four(hidden_act="gelu"), "gelu"),
    "a classifier": (four(architectures=["Phi3ForSequenceClassification"]), "Phi3ForSequenceClassification"),
    "Phi-3-small": (four(model_type="phi3small"), "phi3small"),
    "Phi-3.5-MoE": (four(model_type="phimoe"), "phimoe"),
    "Phi-4-multimodal": (four(model_type="phi4mm"), "phi4mm"),
    "a Gemma": (four(model_type="gemma2"), "gemma2"),
    "a Llama of the class of another": (four(model_type="llama"), "Phi3ForCausalLM"),
}
