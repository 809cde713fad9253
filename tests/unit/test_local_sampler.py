"""The built-in sampler against transformers, against closed forms, and against itself in other batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from smollm3 import made_like
from torch import Tensor

from phimr_nemo.errors import UserError
from phimr_nemo.generate.local import engine as local
from phimr_nemo.generate.local import prompts, sampling
from phimr_nemo.generate.local.decoder import Decoder, KVCache
from phimr_nemo.generate.local.engine import LocalSampler
from phimr_nemo.generate.local.sampling import request_uniforms
from phimr_nemo.generate.sampler import Completion, Request, SamplingParams
from phimr_nemo.model.architecture import Architecture

VOCAB = 61
ORIGINAL_LENGTH = 48
LOGPROB_TOLERANCE = 1e-4
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def make_hf_model(seed: int = 0, *, tied: bool = True) -> Any:
    from transformers import Phi3Config, Phi3ForCausalLM

    rotary_pairs = int(16 * 0.75) // 2
    config = Phi3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        partial_rotary_factor=0.75,
        max_position_embeddings=1024,
        original_max_position_embeddings=ORIGINAL_LENGTH,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.15,
        rope_scaling={
            "type": "longrope",
            "short_factor": [1.0] * rotary_pairs,
            "long_factor": [1.0 + 0.5 * i for i in range(rotary_pairs)],
        },
    )
    torch.manual_seed(seed)
    return Phi3ForCausalLM(config).eval()


def named_tensors(model: Any) -> list[tuple[str, Tensor]]:
    tied = model.config.tie_word_embeddings
    return [(n, t) for n, t in model.state_dict().items() if not (tied and n == "lm_head.weight")]


def make_sampler(model: Any, *, max_batch: int = 8, max_length: int = ORIGINAL_LENGTH, **kw: Any) -> LocalSampler:
    return LocalSampler(
        Architecture.from_hf_config(model.config.to_dict()),
        named_tensors(model),
        stop_token_ids=kw.pop("stop_token_ids", ()),
        max_batch=max_batch,
        longrope_policy="long_when_max_length_exceeds_original",
        max_length=max_length,
        **kw,
    )


def make_requests(lengths: list[int], samples: int = 1, first_seed: int = 0) -> list[Request]:
    generator = torch.Generator().manual_seed(7)
    prompts = [tuple(torch.randint(1, VOCAB, (n,), generator=generator).tolist()) for n in lengths]
    return [
        Request(f"{p}/{s}", prompt, seed=first_seed + 1000 * p + s)
        for p, prompt in enumerate(prompts)
        for s in range(samples)
    ]


@torch.inference_mode()
def hf_greedy(model: Any, prompt: tuple[int, ...], max_new: int) -> tuple[int, ...]:
    model.generation_config.eos_token_id = None
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new)
    return tuple(out[0, len(prompt) :].tolist())


@torch.inference_mode()
def largest_logprob_error(model: Any, requests: list[Request], done: list[Completion], temperature: float) -> float:
    """Largest difference between the sampler's log-probabilities and those of transformers."""
    worst = 0.0
    for request, completion in zip(requests, done, strict=True):
        ids = torch.tensor([request.prompt_ids + completion.token_ids])
        first = len(request.prompt_ids) - 1
        logprobs = torch.log_softmax(model(ids).logits[0, first:-1] / temperature, dim=-1)
        wanted = logprobs.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        worst = max(worst, float((wanted - torch.tensor(completion.logprobs)).abs().max()))
    return worst


@pytest.fixture(scope="module")
def model() -> Any:
    return make_hf_model()


@pytest.mark.parametrize("tied", [True, False])
def test_greedy_tokens_equal_transformers(tied: bool) -> None:
    model = make_hf_model(3, tied=tied)
    requests = make_requests([5, 11, 1, 8, 20])
    done = make_sampler(model, max_batch=3).sample(requests, SamplingParams(0.0, 1.0, 20))
    assert [c.token_ids for c in done] == [hf_greedy(model, r.prompt_ids, 20) for r in requests]
    assert [c.request_id for c in done] == [r.id for r in requests]
    assert {c.finish_reason for c in done} == {"length"}
    assert largest_logprob_error(model, requests, done, 1.0) < LOGPROB_TOLERANCE


def test_long_factors_equal_transformers_above_the_original_length(model: Any) -> None:
    requests = make_requests([ORIGINAL_LENGTH + 1, ORIGINAL_LENGTH + 9])
    params = SamplingParams(0.0, 1.0, 16)
    done = make_sampler(model, max_length=200).sample(requests, params)
    assert [c.token_ids for c in done] == [hf_greedy(model, r.prompt_ids, 16) for r in requests]


def test_growing_the_cache_changes_nothing(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    requests, params = make_requests([5, 3, 9]), SamplingParams(0.0, 1.0, 30)
    wanted = make_sampler(model).sample(requests, params)
    monkeypatch.setattr(local, "FIRST_CAPACITY", 4)
    assert [c.token_ids for c in make_sampler(model).sample(requests, params)] == [c.token_ids for c in wanted]


def test_prompts_computed_in_small_blocks_change_nothing(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    requests, params = make_requests([5, 3, 9, 17, 2], samples=2), SamplingParams(0.0, 1.0, 12)
    wanted = make_sampler(model, max_batch=10).sample(requests, params)
    blocks: list[int] = []
    prefill = Decoder.prefill

    def counting_prefill(self: Decoder, block: list[tuple[int, ...]]) -> Any:
        blocks.append(len(block) * max(map(len, block)))
        return prefill(self, block)

    monkeypatch.setattr(Decoder, "prefill", counting_prefill)
    monkeypatch.setattr(prompts, "PREFILL_TOKENS", 18)
    got = make_sampler(model, max_batch=10).sample(requests, params)
    assert [c.token_ids for c in got] == [c.token_ids for c in wanted]
    assert len(blocks) == 4
    assert max(blocks) <= 18


FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"rope_scaling": LLAMA3, "rope_theta": 1000.0, "tie_word_embeddings": False},
    "Mistral": {"sliding_window": 64, "tie_word_embeddings": False},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 24, "tie_word_embeddings": True},
    "SmolLM3": {"no_rope_layers": [0, 1], "rope_theta": 1000.0, "tie_word_embeddings": True},
}


def make_family(name: str) -> Any:
    """A model of another family than Phi's, its norms and biases drawn too."""
    torch.manual_seed(5)
    model = made_like(
        name,
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.15,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        **FAMILIES[name],
    ).eval()
    for tensor, parameter in model.named_parameters():
        if "norm" in tensor or tensor.endswith(".bias"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_transformers_tokens_and_logprobs(family: str) -> None:
    model = make_family(family)
    requests = make_requests([5, 11, 1, 8])
    greedy = make_sampler(model, max_batch=3).sample(requests, SamplingParams(0.0, 1.0, 12))
    assert [c.token_ids for c in greedy] == [hf_greedy(model, r.prompt_ids, 12) for r in requests]
    sampled = make_sampler(model).sample(requests, SamplingParams(0.8, 0.9, 12))
    assert largest_logprob_error(model, requests, sampled, 0.8) < LOGPROB_TOLERANCE


@pytest.mark.parametrize(("family", "tensor"), [("Qwen2", "k_proj.bias"), ("Qwen3", "q_norm.weight")])
def test_a_fault_in_what_a_family_has_of_its_own_is_caught(family: str, tensor: str) -> None:
    model = make_family(family)
    sampler = make_sampler(model)
    faulty = [(name, torch.ones_like(t) if name.endswith(tensor) else t) for name, t in named_tensors(model)]
    sampler.update_weights(faulty, version=1)
    requests = make_requests([5, 11])
    done = sampler.sample(requests, SamplingParams(1.0, 1.0, 12))
    assert largest_logprob_error(model, requests, done, 1.0) > 2 * LOGPROB_TOLERANCE


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 0.95), (1.7, 0.5)])
def test_logprobs_equal_transformers(model: Any, temperature: float, top_p: float) -> None:
    """Also under top_p: of the whole tempered distribution, as the trainer computes them."""
    requests = make_requests([4, 9, 6], samples=3)
    done = make_sampler(model, max_batch=4).sample(requests, SamplingParams(temperature, top_p, 16))
    assert largest_logprob_error(model, requests, done, temperature) < LOGPROB_TOLERANCE


def test_a_stale_weight_is_caught(model: Any) -> None:
    """Planted fault for the test above: one of the model's tensors is one per cent off in the sampler."""
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors = [(n, t * 1.01 if n == name else t) for n, t in named_tensors(model)]
    sampler = make_sampler(model)
    sampler.update_weights(tensors, version=1)
    requests = make_requests([4, 9, 6], samples=3)
    done = sampler.sample(requests, SamplingParams(1.0, 1.0, 16))
    assert largest_logprob_error(model, requests, done, 1.0) > 2 * LOGPROB_TOLERANCE


def test_tokens_do_not_depend_on_the_batch(model: Any) -> None:
    requests = make_requests([4, 9, 6, 13], samples=5)
    params = SamplingParams(1.0, 0.9, 12)
    alone = make_sampler(model, max_batch=1, stop_token_ids=(3, 9)).sample(requests, params)
    lengths = {len(c.token_ids) for c in alone}
    assert len(lengths) > 2, "the rows must finish at different times for this test to mean anything"
    for max_batch in (3, 7, 64):
        sampler = make_sampler(model, max_batch=max_batch, stop_token_ids=(3, 9))
        assert [c.token_ids for c in sampler.sample(requests, params)] == [c.token_ids for c in alone]
        backwards = sampler.sample(requests[::-1], params)[::-1]
        assert [c.token_ids for c in backwards] == [c.token_ids for c in alone]


def test_other_seeds_give_other_tokens(model: Any) -> None:
    sampler, params = make_sampler(model), SamplingParams(1.0, 1.0, 12)
    first, again, other = (
        [c.token_ids for c in sampler.sample(make_requests([4, 9], 2, seed), params)] for seed in (0, 0, 50)
    )
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_a_request_has_its_own_uniforms() -> None:
    long, short = request_uniforms(5, 64), request_uniforms(5, 8)
    np.testing.assert_array_equal(long[:8], short)
    assert not np.isin(request_uniforms(6, 64), long).any()
    many = request_uniforms(2**63 - 1, 200_000)
    assert many.min() >= 0.0
    assert many.max() < 1.0
    # Mean 1/2 with standard error 1/sqrt(12 n); five of them.
    assert abs(many.mean() - 0.5) < 5 / np.sqrt(12 * len(many))


def test_responses_stop_at_the_first_stop_token(model: Any) -> None:
    requests, params = make_requests([4, 9, 6, 13, 2], samples=2), SamplingParams(1.0, 1.0, 24)
    unstopped = make_sampler(model, max_batch=4).sample(requests, params)
    stops = {unstopped[0].token_ids[5], unstopped[3].token_ids[11]}
    done = make_sampler(model, max_batch=4, stop_token_ids=tuple(stops)).sample(requests, params)
    for free, stopped in zip(unstopped, done, strict=True):
        ends = [i for i, token in enumerate(free.token_ids) if token in stops]
        count = ends[0] + 1 if ends else len(free.token_ids)
        assert stopped.token_ids == free.token_ids[:count]
        assert len(stopped.logprobs) == count
        assert stopped.finish_reason == ("stop" if ends else "length")
    assert {c.finish_reason for c in done} == {"stop", "length"}


def test_no_work_is_wasted(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each distinct prompt is computed once, and a finished row is never fed again."""
    prompts: list[tuple[int, ...]] = []
    fed: list[int] = []
    prefill, step = Decoder.prefill, Decoder.step

    def counting_prefill(self: Decoder, block: list[tuple[int, ...]]) -> Any:
        prompts.extend(block)
        return prefill(self, block)

    def counting_step(self: Decoder, cache: Any, tokens: Tensor, positions: Tensor, longest: int) -> Tensor:
        fed.append(len(tokens))
        return step(self, cache, tokens, positions, longest)

    monkeypatch.setattr(Decoder, "prefill", counting_prefill)
    monkeypatch.setattr(Decoder, "step", counting_step)
    requests = make_requests([4, 9, 6], samples=7)
    done = make_sampler(model, max_batch=5, stop_token_ids=(3, 9)).sample(requests, SamplingParams(1.0, 1.0, 20))
    assert sorted(prompts) == sorted({r.prompt_ids for r in requests})
    # The last token of a response is never fed: nothing follows it.
    assert sum(fed) == sum(len(c.token_ids) - 1 for c in done)
    assert max(fed) <= 5


@torch.inference_mode()
def test_a_prompts_padding_is_not_computed(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only attention sees prompts of other lengths as one block; logits are those of each prompt alone."""
    computed: list[int] = []
    finish_layer = Decoder._finish_layer

    def counting(self: Decoder, layer: Any, hidden: Tensor, attended: Tensor) -> Tensor:
        computed.append(hidden.shape[0] * hidden.shape[1])
        return finish_layer(self, layer, hidden, attended)

    monkeypatch.setattr(Decoder, "_finish_layer", counting)
    decoder = make_sampler(model)._decoder
    assert decoder is not None
    prompts = [request.prompt_ids for request in make_requests([1, 30, 7, 2])]
    cache, together = decoder.prefill(prompts)
    assert computed == [40, 40]
    for row, prompt in enumerate(prompts):
        own, alone = decoder.prefill([prompt])
        torch.testing.assert_close(together[row], alone[0], rtol=0, atol=1e-5)
        for mine, theirs in zip(cache.layers, own.layers, strict=True):
            torch.testing.assert_close(mine[:, row, :, : len(prompt)], theirs[:, 0], rtol=0, atol=1e-5)


def nucleus_draws(scale: float) -> tuple[Tensor, Tensor]:
    """Tokens of many uniforms from rows of 1,000 probabilities, the same from some of them first and from all."""
    generator = torch.Generator().manual_seed(int(scale * 100))
    # Rounded as a model in bf16 rounds: many probabilities are equal.
    logits = torch.randn(1, 1_000, generator=generator).mul(scale).bfloat16().float()
    probabilities = torch.softmax(logits, dim=-1).expand(4_096, -1).contiguous()
    uniforms = (torch.arange(4_096, dtype=torch.float64) + 0.5) / 4_096
    some = sampling._invert_nucleus(probabilities, uniforms, 0.9)
    ordered, places = sampling._in_order(probabilities)
    return some, sampling._drawn_in_order(ordered, places, uniforms, 0.9)[0]


@pytest.mark.parametrize("vocabulary", [512, 49_152, 100, 321])
def test_a_token_found_in_its_block_is_the_one_of_the_whole_distribution(vocabulary: int) -> None:
    """Against the running sum over all tokens, with impossible tokens and random numbers at both ends."""
    rows = 64
    generator = torch.Generator().manual_seed(vocabulary)
    probabilities = torch.rand(rows, vocabulary, generator=generator).pow(20)
    probabilities[:, ::3] = 0
    probabilities[0, : vocabulary // 2] = 0
    probabilities[1, vocabulary // 2 :] = 0
    probabilities[2] = 0
    probabilities[2, vocabulary - 1] = 1
    uniforms = torch.rand(rows, dtype=torch.float64, generator=generator)
    for extreme in (None, 0.0, 1 - 2.0**-52):
        drawn = uniforms if extreme is None else torch.full_like(uniforms, extreme)
        found = sampling._invert_in_blocks(probabilities, drawn)
        whole = probabilities.double().cumsum(dim=-1)
        expected = sampling._invert(whole, drawn)
        assert bool((probabilities.gather(1, found[:, None]) > 0).all())
        # Sums in another order differ in their last bits, which decide at the very end alone.
        assert torch.equal(found, expected) or extreme == 1 - 2.0**-52
        ends = whole.gather(1, torch.stack((found, (found - 1).clamp(min=0)), dim=1))
        targets = drawn * whole[:, -1]
        slack = 1e-12 * whole[:, -1]
        assert bool((ends[:, 0] > targets - slack).all())
        assert bool(((found == 0) | (ends[:, 1] <= targets + slack)).all())


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, 3.0, 8.0])
def test_a_nucleus_looked_for_in_part_is_that_of_the_whole(scale: float) -> None:
    some, whole = nucleus_draws(scale)
    assert torch.equal(some, whole)
    assert len(whole.unique()) > {0.0: 890, 0.3: 800, 1.0: 400, 3.0: 10, 8.0: 1}[scale]


def test_a_nucleus_that_is_cut_off_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault for the test above: the most probable tokens are taken for all that count."""
    drawn_in_order = sampling._drawn_in_order

    def careless(*arguments: Any) -> tuple[Tensor, Tensor]:
        tokens, ends = drawn_in_order(*arguments)
        return tokens, torch.ones_like(ends)

    monkeypatch.setattr(sampling, "_drawn_in_order", careless)
    some, whole = nucleus_draws(1.0)
    assert not torch.equal(some, whole)


def test_only_rows_with_a_wide_nucleus_are_ordered_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[tuple[int, int]] = []
    in_order = sampling._in_order

    def counting(probabilities: Tensor) -> tuple[Tensor, Tensor]:
        widths.append((probabilities.shape[0], probabilities.shape[1]))
        return in_order(probabilities)

    monkeypatch.setattr(sampling, "_in_order", counting)
    scales = torch.tensor([9.0, 0.0, 9.0, 9.0])[:, None]
    logits = torch.randn(4, 1_000, generator=torch.Generator().manual_seed(1)) * scales
    sampling.sampled_tokens(logits, torch.full((4,), 0.5, dtype=torch.float64), temperature=1.0, top_p=0.9)
    assert widths == [(4, sampling.NUCLEUS), (1, 1_000)]


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom, with rare outcomes (expected < 5) merged into one."""
    wanted = probabilities * counts.sum()
    rare = wanted < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(wanted[~rare], wanted[rare].sum())
    keep = wanted > 0
    return float(((counts - wanted)[keep] ** 2 / wanted[keep]).sum()), int(keep.sum()) - 1


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_tokens_follow_the_softmax(model: Any, top_p: float) -> None:
    """First tokens of many seeds against softmax(logits / T), renormalised over the nucleus when top_p < 1.

    The statistic has mean d and variance 2 d; the bound is five standard deviations above the mean.
    """
    temperature, prompt = 0.7, (5, 9, 2)
    requests = [Request(str(seed), prompt, seed) for seed in range(20_000)]
    sampler = make_sampler(model, max_batch=20_000)
    done = sampler.sample(requests, SamplingParams(temperature, top_p, 1))
    counts = np.bincount([c.token_ids[0] for c in done], minlength=VOCAB)
    with torch.inference_mode():
        logits = model(torch.tensor([prompt])).logits[0, -1].double()

    def nucleus(at_temperature: float) -> np.ndarray:
        probabilities = torch.softmax(logits / at_temperature, -1).numpy()
        kept, mass = np.zeros(VOCAB), 0.0
        for token in np.argsort(-probabilities):
            if mass < top_p:
                kept[token] = probabilities[token]
                mass += probabilities[token]
        return kept / kept.sum()

    wanted = nucleus(temperature)
    assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(wanted))
    statistic, freedom = chi_square(counts, wanted)
    assert statistic < freedom + 5 * np.sqrt(2 * freedom)
    # Planted fault: the same draws are not those of a slightly different temperature.
    if top_p == 1.0:
        statistic, freedom = chi_square(counts, nucleus(temperature * 1.1))
        assert statistic > freedom + 5 * np.sqrt(2 * freedom)


def test_new_weights_give_exactly_the_new_models_responses(model: Any) -> None:
    other = make_hf_model(seed=1)
    requests, params = make_requests([4, 9, 6], samples=2), SamplingParams(1.0, 1.0, 12)
    sampler = make_sampler(model)
    before = sampler.sample(requests, params)
    assert sampler.version == 0
    sampler.update_weights(iter(named_tensors(other)), version=4)
    assert sampler.version == 4
    after = sampler.sample(requests, params)
    assert after == [
        dataclasses.replace(completion, versions=(4,) * len(completion.token_ids))
        for completion in make_sampler(other).sample(requests, params)
    ]
    assert after != before


def test_the_sampler_owns_its_weights() -> None:
    """Training continues in place on the tensors that were sent; the sampler must not follow."""
    model = make_hf_model(seed=2)
    sampler, requests, params = make_sampler(model), make_requests([4, 9]), SamplingParams(1.0, 1.0, 12)
    before = sampler.sample(requests, params)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    assert sampler.sample(requests, params) == before


def broken_sets(model: Any) -> Iterator[tuple[str, list[tuple[str, Tensor]]]]:
    tensors = named_tensors(model)
    name, tensor = tensors[3]
    yield "missing", tensors[:3] + tensors[4:]
    yield "repeated", [*tensors, (name, tensor)]
    yield "no such tensor", [*tensors, ("model.layers.9.mlp.down_proj.weight", tensor)]
    yield "no such tensor", [*tensors, ("lm_head.weight", tensors[0][1])]
    yield "shape", [(n, t[:-1] if n == name else t) for n, t in tensors]


def test_an_incomplete_update_is_refused_and_the_old_weights_stay(model: Any) -> None:
    sampler, requests, params = make_sampler(model), make_requests([4, 9]), SamplingParams(1.0, 1.0, 12)
    before = sampler.sample(requests, params)
    for wording, tensors in broken_sets(make_hf_model(seed=1)):
        with pytest.raises(UserError, match=wording):
            sampler.update_weights(tensors, version=1)
        assert sampler.version == 0
        assert sampler.sample(requests, params) == before


def test_max_length_bounds_prompt_and_response(model: Any) -> None:
    requests = make_requests([10, 4])
    done = make_sampler(model, max_length=14).sample(requests, SamplingParams(1.0, 1.0, 8))
    assert [len(c.token_ids) for c in done] == [4, 8]
    assert [c.finish_reason for c in done] == ["length", "length"]


@pytest.mark.parametrize("prompt", [(), tuple([1] * 14), (1, VOCAB), (1, -1)])
def test_bad_prompts_are_refused(model: Any, prompt: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="request 'bad'"):
        make_sampler(model, max_length=14).sample([Request("bad", prompt, 0)], SamplingParams(1.0, 1.0, 4))


@pytest.mark.parametrize(
    ("values", "name"),
    [((-0.1, 1.0, 4), "temperature"), ((1.0, 0.0, 4), "top_p"), ((1.0, 1.5, 4), "top_p"), ((1.0, 1.0, 0), "max_new")],
)
def test_bad_sampling_parameters_are_refused(values: tuple[float, float, int], name: str) -> None:
    with pytest.raises(UserError, match=name):
        SamplingParams(*values)


def test_a_policy_that_needs_the_future_is_refused(model: Any) -> None:
    arch = Architecture.from_hf_config(model.config.to_dict())
    with pytest.raises(UserError, match="per_sequence"):
        LocalSampler(
            arch,
            named_tensors(model),
            stop_token_ids=(),
            max_batch=1,
            longrope_policy="per_sequence",
            max_length=ORIGINAL_LENGTH + 1,
        )


def test_a_window_shorter_than_the_run_is_refused(model: Any) -> None:
    arch = dataclasses.replace(Architecture.from_hf_config(model.config.to_dict()), sliding_window=16)
    with pytest.raises(UserError, match="sliding window of 16"):
        LocalSampler(
            arch,
            named_tensors(model),
            stop_token_ids=(),
            max_batch=1,
            longrope_policy="always_short",
            max_length=17,
        )


def test_the_cache_stays_within_its_budget(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for three sequences of prompt and response: three at once instead of six, and the same tokens."""
    sizes = []

    class Measured(KVCache):
        def reserve(self, positions: int) -> None:
            super().reserve(positions)
            sizes.append(sum(layer.nbytes for layer in self.layers))

    monkeypatch.setattr(local, "KVCache", Measured)
    monkeypatch.setattr(local, "FIRST_CAPACITY", 4)
    requests, params = make_requests([5, 3], samples=3), SamplingParams(1.0, 1.0, 20)
    arch = Architecture.from_hf_config(model.config.to_dict())
    longest = 5 + 20
    budget = 3 * longest * 2 * arch.num_hidden_layers * arch.num_key_value_heads * arch.head_dim * 4
    bounded = make_sampler(model, max_length=longest, cache_bytes=budget).sample(requests, params)
    assert budget / 2 < max(sizes) <= budget
    sizes.clear()
    free = make_sampler(model, max_length=longest).sample(requests, params)
    assert max(sizes) > budget
    assert [completion.token_ids for completion in bounded] == [completion.token_ids for completion in free]


def test_a_cache_that_cannot_hold_one_sequence_is_refused_with_the_numbers() -> None:
    """Phi-4-mini: 2 x 32 layers x 8 heads x 128 x 2 bytes = 128 KiB a token, 3.125 GiB for 25,600."""
    arch = dataclasses.replace(
        Architecture.from_hf_config(make_hf_model().config.to_dict()),
        hidden_size=3072,
        num_hidden_layers=32,
        num_attention_heads=24,
        num_key_value_heads=8,
        short_factor=None,
        long_factor=None,
    )
    with pytest.raises(UserError, match=r"25,600 tokens take 3\.12 GiB, of 256 together 800 GiB; .* may have 3 GiB"):
        LocalSampler(
            arch,
            (),
            stop_token_ids=(),
            max_batch=256,
            longrope_policy="long_when_max_length_exceeds_original",
            max_length=25_600,
            dtype=torch.bfloat16,
            cache_bytes=3 * 2**30,
        )


def test_diverged_weights_are_reported(model: Any) -> None:
    sampler = make_sampler(model)
    sampler.update_weights([(n, t * float("nan")) for n, t in named_tensors(model)], version=3)
    for temperature in (0.0, 1.0):
        with pytest.raises(UserError, match="version 3"):
            sampler.sample(make_requests([4]), SamplingParams(temperature, 1.0, 4))


def test_no_requests_no_completions(model: Any) -> None:
    assert make_sampler(model).sample([], SamplingParams(1.0, 1.0, 4)) == []
