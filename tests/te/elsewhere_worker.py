"""What is computed on the device ``elsewhere`` (see elsewhere.py), and by what it is judged."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import elsewhere
import model_worker
import numpy as np
import torch
from elsewhere import Elsewhere
from megatron.core import utils as megatron_utils
from nemo.lightning.megatron_parallel import MaskedTokenLossReduction
from torch import Tensor

from phimr_nemo.align.dpo.objective import DPOObjective
from phimr_nemo.align.grpo.objective import GRPOObjective
from phimr_nemo.align.policy import MegatronPolicy
from phimr_nemo.config import DPOConfig, GRPOConfig, ParallelConfig, load_config
from phimr_nemo.data.rows.batches import Row, collate_packed, collate_padded
from phimr_nemo.generate.local.engine import LocalSampler
from phimr_nemo.generate.sampler import Completion, Request, SamplingParams
from phimr_nemo.losses import IGNORED_LABEL, token_logprobs
from phimr_nemo.losses.logprobs import token_logprobs_and_entropy
from phimr_nemo.model.files.hf import HFDirectory
from phimr_nemo.model.megatron import gpt
from phimr_nemo.model.megatron.convert import export_tensors
from phimr_nemo.supervised import nemo_model
from phimr_nemo.training import platform
from phimr_nemo.training.throughput import WorkCounter

PAD = 0
TOLERANCE = 1e-5
"""Float32 sums in another order, where a wrapper is read with other strides; absolute and relative."""

GRPO_KINDS = ("grpo", "dr_grpo", "dapo", "gspo")
DPO_LOSSES = (
    ("loss.kind=dpo",),
    ("loss.kind=ipo",),
    ("loss.kind=length_normalized_dpo",),
    ("loss.kind=length_normalized_ipo",),
    ("loss.kind=label_smoothed_dpo", "loss.label_smoothing=0.1"),
    ("loss.kind=rpo", "loss.nll_weight=0.7"),
)


def _rows(lengths: list[int], seed: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels [n, longest]; the first third of each row is a prompt."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.full((len(lengths), max(lengths)), PAD)
    labels = torch.full_like(tokens, IGNORED_LABEL)
    for row, length in enumerate(lengths):
        tokens[row, :length] = torch.randint(1, 50, (length,), generator=generator)
        labels[row, length // 3 : length] = torch.randint(1, 50, (length - length // 3,), generator=generator)
    return tokens, labels


def _logprobs(tokens: Tensor, labels: Tensor) -> Tensor:
    return torch.where(labels == IGNORED_LABEL, 0.0, -0.01 * tokens - 0.002 * labels)


def _objective_case(objective: Any, batch: dict[str, Tensor]) -> Callable[[torch.device], list[Tensor]]:
    """Loss, count, sums and the gradient of every micro-batch, as the policy calls them."""

    def run(device: torch.device) -> list[Tensor]:
        found: list[Tensor] = []
        for micro in objective.micro_batches(batch):
            logprobs = _logprobs(micro.tokens, micro.labels).to(device).requires_grad_()
            loss, count, sums = objective.loss(logprobs, micro)
            loss.backward()
            assert logprobs.grad is not None
            found += [loss.detach(), count, *(sums[name] for name in sorted(sums)), logprobs.grad]
        return found

    return run


def _grpo_batch() -> dict[str, Tensor]:
    tokens, labels = _rows([6, 2, 11, 4, 3, 9], 3)
    noise = 0.3 * torch.randn(labels.shape, generator=torch.Generator().manual_seed(5))
    logprobs = _logprobs(tokens, labels)
    return {
        "response_tokens": tokens,
        "labels": labels,
        "advantages": torch.tensor([1.0, 9.0, -1.0, 0.5, 9.0, -0.7]),
        "sampler_logprobs": logprobs + 0.001 + 0.5 * noise,
        "old_logprobs": logprobs + noise,
        "reference_logprobs": logprobs - noise,
    }


def _dpo_batch() -> dict[str, Tensor]:
    (chosen, chosen_labels), (rejected, rejected_labels) = _rows([7, 3, 12, 5], 0), _rows([4, 12, 6, 8], 1)
    reference = torch.linspace(-2.0, -1.0, 8)
    return {
        "chosen": chosen,
        "chosen_labels": chosen_labels,
        "rejected": rejected,
        "rejected_labels": rejected_labels,
        "ref_policy_log_probs_chosen": reference[:4],
        "ref_policy_log_probs_rejected": reference[4:],
    }


def objective_cases(repository: Path) -> Iterable[tuple[str, Callable[[torch.device], list[Tensor]]]]:
    """Every loss of both objectives, padded and packed."""
    corrections = ((), ("correction.kind=truncated", "correction.cap=1.05"))
    for kind, packed, correction in itertools.product(GRPO_KINDS, (False, True), corrections):
        changes = [f"loss.kind={kind}", f"packed={packed}", *correction]
        sizes = [
            "loss.clip_low=0.2",
            "loss.clip_high=0.28",
            "micro_batch=2",
            "sequence_length=12",
            "max_new_tokens=8",
        ]
        config = load_config(GRPOConfig, repository / "conf/grpo/tiny.yaml", [*changes, *sizes, "kl=0.1"])
        yield " ".join(changes), _objective_case(GRPOObjective(config, multiple=1, pad_id=PAD), _grpo_batch())
    for loss, packed in itertools.product(DPO_LOSSES, (False, True)):
        changes = [*loss, f"packed={packed}"]
        sizes = ["beta=0.3", "micro_batch=1", "sequence_length=12"]
        preference = load_config(DPOConfig, repository / "conf/dpo/tiny.yaml", [*changes, *sizes])
        yield " ".join(changes), _objective_case(DPOObjective(preference, multiple=1, pad_id=PAD), _dpo_batch())


def _head(device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(shape, generator=generator) for shape in ((7, 2, 16), (50, 16)))
    labels = torch.randint(50, (7, 2), generator=generator).to(device)
    hidden, weight = hidden.to(device).requires_grad_(), weight.to(device).requires_grad_()
    token_logprobs(hidden, weight, labels, chunk_size=4).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return [hidden.grad, weight.grad, *token_logprobs_and_entropy(hidden, weight, labels, chunk_size=4)]


def _model_case(directory: str) -> Callable[[torch.device], list[Tensor]]:
    """The model in plain PyTorch, padded and packed, forward and backward."""

    def run(device: torch.device) -> list[Tensor]:
        # A device is no CPU, whose layers have kernels of its own.
        with mock.patch.object(gpt, "has_cpu_layers", return_value=False):
            model = model_worker.build(directory, ParallelConfig(), policy="per_sequence").to(device)
        ids, labels = (x.to(device) for x in model_worker.batch())
        row = torch.cat(model_worker.documents())[None].to(device)
        documents = model_worker.packed(model_worker.DOCUMENTS)
        documents.cu_seqlens_q = documents.cu_seqlens_kv = documents.cu_seqlens_q.to(device)
        # Megatron gives a tensor another's memory by assigning `data`, which a wrapper cannot follow.
        with mock.patch.object(megatron_utils, "_kernel_make_viewless_tensor", lambda x, _: x.clone()):
            outputs = [model(ids, labels=labels), model(row, labels=row, packed_seq_params=documents)]
        (outputs[0].sum() + outputs[1].sum()).backward()
        return [*(x.detach() for x in outputs), *(p.grad for p in model.parameters() if p.grad is not None)]

    return run


def _sampler(directory: str, device: torch.device, stop_token_ids: tuple[int, ...]) -> LocalSampler:
    source = HFDirectory(Path(directory))
    return LocalSampler(
        source.architecture,
        ((name, source.read(name)) for name in source.names()),
        stop_token_ids=stop_token_ids,
        max_batch=2,
        longrope_policy="long_when_max_length_exceeds_original",
        max_length=32,
        device=device,
    )


@torch.no_grad()
def _sampled(sampler: LocalSampler, count: int, params: SamplingParams) -> list[Completion]:
    """Responses to some prompts, in order. Tensors of the inference mode cannot be wrapped."""
    requests = [Request(f"{i}", tuple(range(1, 4 + i)), seed=i) for i in range(count)]
    done: list[Completion] = []
    LocalSampler._sample.__wrapped__(sampler, requests, params, threading.Event(), done.append, 2)
    return sorted(done, key=lambda completion: completion.request_id)


def _sampler_case(directory: str) -> Callable[[torch.device], list[Tensor]]:
    """Sampled words and their log-probabilities; they leave the device as numbers."""

    def run(device: torch.device) -> list[Tensor]:
        sampler = _sampler(directory, device, (0,))
        done = _sampled(sampler, 3, SamplingParams(temperature=1.0, top_p=0.9, max_new_tokens=5))
        sampler.close()
        return [torch.tensor([*one.token_ids, *one.logprobs]) for one in done]

    return run


def count_sampler_waits(directory: str, lengths: Sequence[int]) -> list[list[str]]:
    """What made the CPU wait while two responses of each length were sampled."""
    device = elsewhere.install()
    model_worker.hugging_face(directory, model_worker.ARCHITECTURE)
    sampler, found = _sampler(directory, device, ()), []
    for length in lengths:
        elsewhere.waits.clear()
        done = _sampled(sampler, 2, SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=length))
        assert [len(one.token_ids) for one in done] == [length] * 2
        found.append(list(elsewhere.waits))
    return found


def compare(directory: str, repository: str) -> dict[str, str]:
    """By case, what is wrong with it on the device; nothing where it gives what the CPU gives, on the device."""
    # Before anything is differentiated: the devices are counted then.
    device = elsewhere.install()
    model_worker.hugging_face(directory, model_worker.ARCHITECTURE)
    cases = {
        **dict(objective_cases(Path(repository))),
        "log-probabilities": _head,
        "model": _model_case(directory),
        "sampler": _sampler_case(directory),
    }
    faults: dict[str, str] = {}
    for name, run in cases.items():
        wanted = run(elsewhere.CPU)
        right = platform.device
        platform.device = lambda: device
        try:
            found = run(device)
            away = [x for x in found if not isinstance(x, Elsewhere)]
            if away and name != "sampler":
                faults[name] = f"{len(away)} of {len(found)} results on the CPU"
            for number, (a, b) in enumerate(zip(found, wanted, strict=True)):
                distance = float((_home(a) - b).abs().max()) / max(1.0, float(b.abs().max()))
                if not distance < TOLERANCE:
                    faults[name] = f"result {number} is {distance:.1e} away"
        except Exception as error:  # noqa: BLE001  (each case tells of itself)
            import traceback

            at = traceback.extract_tb(error.__traceback__)
            ours = [f"{Path(f.filename).name}:{f.lineno}" for f in at if "phimr_nemo" in f.filename][-2:]
            faults[name] = f"{type(error).__name__} {str(error)[:200]} {ours}"
        finally:
            platform.device = right
    return faults | {"cases": str(len(cases))}


def planted() -> dict[str, bool]:
    """By kind of mixture, whether the device refuses it."""
    device = elsewhere.install()
    x = torch.randn(4, 3).to(device)

    def refused(mix: Callable[[], Any]) -> bool:
        try:
            mix()
        except RuntimeError as error:
            return "same device" in str(error)
        return False

    return {
        "a mask made on the CPU": refused(lambda: x.masked_fill(torch.ones(4, 3, dtype=torch.bool), 0.0)),
        "an index from the CPU, as a GPU takes it": refused(lambda: x[torch.tensor([0, 2])]),
        "a number from the CPU, as a GPU takes it": refused(lambda: x * torch.tensor(2.0)),
        "results gathered on the CPU": refused(lambda: torch.cat((x, torch.zeros(1, 3)))),
        "a copy to the device": refused(lambda: x.copy_(torch.zeros(4, 3))),
    }


def _home(x: Tensor) -> Tensor:
    return x.held if isinstance(x, Elsewhere) else x


def count_waits(directory: str, repository: str) -> dict[str, list[str]]:
    """By stage and way, what made the CPU wait for the device in one optimizer step's forward and backward passes."""
    device = elsewhere.install()
    model_worker.hugging_face(directory, model_worker.ARCHITECTURE)
    model = model_worker.build(directory, ParallelConfig()).to(device)
    steps: dict[str, Callable[[], Any]] = {}
    for packed in (False, True):
        way = "packed" if packed else "padded"
        sizes = ["micro_batch=1", f"packed={packed}"]
        preference = load_config(
            DPOConfig, Path(repository) / "conf/dpo/tiny.yaml", [*sizes, "sequence_length=12", "loss.kind=dpo"]
        )
        pairs = DPOObjective(preference, multiple=1, pad_id=PAD)
        steps[f"dpo, {way}"] = functools.partial(_aligned, model, pairs, _dpo_batch())
        for bonus in ("0.0", "0.01"):
            changes = [*sizes, "sequence_length=12", "max_new_tokens=8", "kl=0.1", f"entropy_bonus={bonus}"]
            config = load_config(GRPOConfig, Path(repository) / "conf/grpo/tiny.yaml", changes)
            rollouts = GRPOObjective(config, multiple=1, pad_id=PAD)
            steps[f"grpo, {way}, entropy bonus {bonus}"] = functools.partial(_aligned, model, rollouts, _grpo_batch())
        steps[f"supervised, {way}"] = functools.partial(_supervised, model, packed)
    steps["log-probabilities of a round"] = functools.partial(_scored, model)
    steps["weights for a sampler"] = lambda: [tensor for _, tensor in export_tensors([model], model.architecture)]
    found = {}
    # A device's own copy, as CUDA's is: `platform.prepare` has made it one that copies nothing.
    moved = mock.patch.object(Tensor, "cuda", lambda self, **how: self.to(device, **how))
    here = mock.patch.object(platform, "device", return_value=device)
    # One process, and gloo knows no such device.
    alone = mock.patch.object(torch.distributed, "all_reduce", return_value=None)
    # See _model_case.
    copied = mock.patch.object(megatron_utils, "_kernel_make_viewless_tensor", lambda x, _: x.clone())
    with moved, here, alone, copied:
        for name, step in steps.items():
            # The first step has things to bring to the device.
            step()
            elsewhere.waits.clear()
            step()
            found[name] = list(elsewhere.waits)
    return found


def _aligned(model: Any, objective: Any, batch: dict[str, Tensor]) -> None:
    """One step of a policy as NeMo-Aligner calls it, without the optimizer."""
    policy = _policy(model, objective)
    policy.get_loss_and_metrics(batch, forward_only=False)
    assert len(objective.micro_batches(batch)) > 1


def _scored(model: Any) -> None:
    batch = _grpo_batch()
    _policy(model, None).log_probs(batch["response_tokens"], batch["labels"])


def _policy(model: Any, objective: Any) -> MegatronPolicy:
    policy = MegatronPolicy.__new__(MegatronPolicy)
    policy.model, policy.objective, policy.temperature = model, objective, 1.0
    policy.parallel, policy.micro_batch = ParallelConfig(), 2
    policy.guard, policy.work = mock.Mock(), WorkCounter(chunks=1)
    return policy


def _supervised(model: Any, packed: bool) -> None:
    """Two micro-batches as NeMo's steps take them, to the gradient of NeMo's own loss."""
    rows = [
        Row(ids, np.ones(len(ids), np.uint8), np.array([len(ids)], np.int32))
        for ids in (np.arange(1, 1 + n, dtype=np.int32) for n in (9, 5))
    ]
    collate = (
        functools.partial(collate_packed, capacity=12) if packed else functools.partial(collate_padded, multiple=4)
    )
    for row in rows:
        batch = nemo_model.data_step(iter([collate([row], pad_id=PAD)]))
        loss, _, _ = MaskedTokenLossReduction().forward(batch, nemo_model.forward_step(model, batch))
        loss.backward()
