"""A plan as tables for the terminal, and as plain values for JSON."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from phimr_nemo.config import GenerationPlanConfig, RoundsConfig, ServerEngine
from phimr_nemo.model.flops import model_flops_per_token
from phimr_nemo.plan.generation import GenerationPlan
from phimr_nemo.plan.hardware import find_gpu
from phimr_nemo.plan.request import TrainingRequest
from phimr_nemo.plan.search import SECONDS_A_DAY, Candidate, Fitting, Refused, TrainingPlan
from phimr_nemo.process.memory import GIBIBYTE

SHOWN: Final = 10
SHOWN_REFUSED: Final = 5
TERABYTE: Final = 1e12

PAPER_GPUS: Final = 128
PAPER_GPU: Final = "h100-80g"
PAPER_DAYS: Final = 2
PAPER_TOKENS: Final = 150e9
"""Model card of Phi-4-mini-reasoning: 150 B training tokens, 128 H100-80G, 2 days."""

MEASURED_MEMORY: Final = "weights, gradients, optimizer: formulas within 10 % of measured steps of tiny models on CPU"
NOTES: Final = (
    "activations and buffers on GPU: extrapolated from the CPU's formulas to Transformer Engine's kernels",
    "framework and fragmentation: assumptions",
    "times: extrapolated from data sheets and published efficiencies (docs/planner.md), not measured with this code",
    "lengths: exponentially distributed around mean_tokens (assumption)",
)
SAMPLING_NOTE: Final = "sampling: extrapolated for a tuned engine on every GPU; the built-in engine is slower"
SYNC_NOTE: Final = "weights to rollout servers: sync_bytes_a_second was measured between processes of a CPU's machine"
COLOCATED_NOTE: Final = (
    "colocated servers: what one keeps while it sleeps, and the speed of PCIe, are assumptions; nothing overlaps"
)
GENERATION_NOTES: Final = (
    "teacher: tokens_a_gpu_second is a published figure of other hardware and prompts (conf/plan/generate.yaml), "
    "extrapolated",
    "verification: measured by bench/verify.py on recorded rollouts, extrapolated to this number",
    "storage: measured on recorded rollouts, extrapolated to this number",
)
SAMPLING_STAGES: Final = ("grpo", "distill")
TEACHER_NOTE: Final = "teacher: counted as a model of the student's size, weights and forward pass"


def notes(request: TrainingRequest) -> list[str]:
    """What of a training plan is measured, and what is not."""
    found = [MEASURED_MEMORY, *NOTES, *find_gpu(request.plan.gpu).guesses]
    if request.plan.stage in SAMPLING_STAGES:
        found += [SAMPLING_NOTE, SYNC_NOTE]
    engine = request.config.engine if isinstance(request.config, RoundsConfig) else None
    if isinstance(engine, ServerEngine) and engine.colocated:
        found.append(COLOCATED_NOTE)
    if request.plan.stage == "distill":
        found.append(TEACHER_NOTE)
    return found


def describe(candidate: Candidate) -> str:
    """A layout in a few letters: TP2 PP1 CP1 DP16 SP."""
    parallel = candidate.parallel
    virtual = f"x{parallel.virtual}" if parallel.virtual > 1 else ""
    sizes = f"TP{parallel.tensor} PP{parallel.pipeline}{virtual} CP{parallel.context} DP{parallel.data}"
    return sizes + (" SP" if parallel.sequence else "")


def paper_line(request: TrainingRequest, best: Fitting) -> str | None:
    """Where the paper's run stands beside the best layout; None for another stage, model or machine."""
    plan = request.plan
    if (plan.stage, plan.gpus, plan.gpu, plan.model) != ("midtrain", PAPER_GPUS, PAPER_GPU, "phi4mini"):
        return None
    speed = PAPER_TOKENS / (PAPER_GPUS * PAPER_DAYS * SECONDS_A_DAY)
    peak = find_gpu(PAPER_GPU).peak["bf16"]
    mfu = speed * model_flops_per_token(request.arch, request.config.sequence_length) / peak
    ratio = best.tokens_a_gpu_second / speed
    return (
        f"paper: {PAPER_TOKENS / 1e9:.0f} B tokens in {PAPER_DAYS} days on {PAPER_GPUS} H100 = {speed:,.0f} "
        f"tokens/s/GPU, {mfu:.1%} MFU with one document a row; "
        f"the first layout above is {ratio:.2f} times as fast (extrapolated)"
    )


def print_training(request: TrainingRequest, plan: TrainingPlan, console: Console) -> None:
    """Ranked layouts, the parts of the first one, and what was refused."""
    if plan.fitting:
        _print_ranking(request, plan, console)
        _print_parts(plan.fitting[0], plan, console)
    if plan.refused:
        _print_refused(plan, console)
    console.print("rows: of a micro-batch; GiB: on the fullest GPU; waits: for communication that nothing hides")
    console.print(f"{plan.impossible} further combinations cannot hold the model or share the batch.")
    if plan.fitting and (line := paper_line(request, plan.fitting[0])):
        console.print(line)
    for note in notes(request):
        console.print(f"- {note}", highlight=False)


def _print_ranking(request: TrainingRequest, plan: TrainingPlan, console: Console) -> None:
    chosen = request.plan
    rollouts = plan.fitting[0].rollouts if plan.fitting else None
    servers = f" and {rollouts.servers} of servers" if rollouts is not None and rollouts.servers else ""
    on = f"{chosen.gpus} x {chosen.gpu}{servers}"
    title = f"{chosen.stage} of {chosen.model} on {on}: layouts that fit: {len(plan.fitting)}"
    table = Table(title=title, title_justify="left")
    names = ["#", "layout", "rows", "recompute", "GiB"]
    names += ["sample s", "train s"] if chosen.stage in SAMPLING_STAGES else ["step s"]
    for name in [*names, "tok/s/GPU", "MFU %", "waits %", "bubble %", "days"]:
        table.add_column(name, justify="left" if name in ("layout", "recompute") else "right", no_wrap=True)
    for number, option in enumerate(plan.fitting[:SHOWN], start=1):
        step = option.step
        exposed = step.tensor + step.context + step.neighbours + step.data
        times = [f"{option.seconds:.3g}"]
        if option.rollouts is not None and option.rollouts.sampling is not None:
            times = [f"{value:.0f}" for value in (option.rollouts.sampling.seconds, option.training)]
        table.add_row(
            str(number),
            describe(option.candidate),
            str(option.candidate.micro_batch),
            option.candidate.recompute,
            f"{option.memory.total / GIBIBYTE:.1f}",
            *times,
            f"{option.tokens_a_gpu_second:,.0f}",
            f"{100 * option.mfu:.1f}",
            f"{100 * exposed / step.total:.1f}",
            f"{100 * step.bubble / step.total:.1f}",
            f"{option.days:.2f}",
        )
    console.print(table)


def _print_parts(best: Fitting, plan: TrainingPlan, console: Console) -> None:
    free = plan.usable - best.memory.total
    table = Table(
        title=f"memory of layout 1: {free / GIBIBYTE:.1f} GiB free beyond the head-room", title_justify="left"
    )
    table.add_column("part")
    table.add_column("GiB", justify="right")
    for name, size in best.memory.parts().items():
        table.add_row(name, f"{size / GIBIBYTE:.2f}")
    table.add_row("total", f"{best.memory.total / GIBIBYTE:.2f}")
    console.print(table)
    table = Table(title="time of a step of layout 1, predicted", title_justify="left")
    table.add_column("part")
    table.add_column("s", justify="right")
    for name, seconds in dataclasses.asdict(best.step).items():
        if seconds:
            table.add_row(name.replace("_", " "), f"{seconds:.4g}")
    rollouts = best.rollouts
    if rollouts is not None and rollouts.sampling is not None:
        meanwhile = ", while a step trains" if rollouts.overlaps else ""
        sequences = f"sampling{meanwhile}, {rollouts.sampling.at_once} sequences at once"
        table.add_row(sequences, f"{rollouts.sampling.seconds:.4g}")
        table.add_row("weights to what samples", f"{rollouts.sync:.4g}")
        if rollouts.offload:
            table.add_row("optimizer to the host and back", f"{rollouts.offload:.4g}")
    console.print(table)
    if best.waiting > 0:
        console.print(f"padding and waiting for the longest sequences: {best.waiting:.0%} of the training time")


def _print_refused(plan: TrainingPlan, console: Console) -> None:
    title = f"layouts that do not fit {plan.usable / GIBIBYTE:.1f} GiB: {len(plan.refused)}, the nearest"
    table = Table(title=title, title_justify="left")
    for name in ("layout", "rows", "recompute", "GiB", "too much", "largest part"):
        table.add_column(name, justify="right" if name in ("rows", "GiB", "too much") else "left", no_wrap=True)
    for item in plan.refused[:SHOWN_REFUSED]:
        table.add_row(
            describe(item.candidate),
            str(item.candidate.micro_batch),
            item.candidate.recompute,
            f"{item.memory.total / GIBIBYTE:.1f}",
            f"{item.excess / GIBIBYTE:.1f}",
            largest_part(item),
        )
    console.print(table)


def largest_part(refused: Refused) -> str:
    """The part of the memory that takes most, with its size."""
    parts = refused.memory.parts()
    name = max(parts, key=lambda part: parts[part])
    return f"{name}, {parts[name] / GIBIBYTE:.1f} GiB"


def print_generation(config: GenerationPlanConfig, plan: GenerationPlan, console: Console) -> None:
    """The cost of a data set."""
    title = f"{config.problems:,} problems x {config.rollouts} rollouts of {config.mean_tokens:,} tokens"
    table = Table(title=title, title_justify="left")
    table.add_column("what")
    table.add_column("amount", justify="right")
    table.add_column("from")
    rows = (
        ("rollouts", f"{plan.rollouts:,}", ""),
        ("tokens", f"{plan.tokens:.3g}", ""),
        (
            "teacher, GPU-hours",
            f"{plan.gpu_hours:,.0f}",
            f"{config.tokens_a_gpu_second:,.0f} tokens/s/GPU, extrapolated",
        ),
        ("teacher, days", f"{plan.gpu_days:,.1f}", f"{config.gpus} x {config.gpu} at once"),
        (
            "verification, core-hours",
            f"{plan.core_hours:,.0f}",
            f"{config.answers_a_core_second:g} answers/s/core, measured",
        ),
        ("verification, days", f"{plan.core_days:,.2f}", f"{config.cores} cores at once"),
        (
            "judge, questions",
            f"{plan.judge_requests:,}",
            f"{config.judged_share:.0%} of the rollouts called wrong, assumed",
        ),
        (
            "judge, US dollars",
            f"{plan.judge_dollars:,.0f}",
            f"{config.judge_prompt_tokens} + {config.judge_reply_tokens} tokens per question, measured",
        ),
        ("text, TB", f"{plan.text_bytes / TERABYTE:.3g}", f"{config.bytes_a_token:g} bytes per token, measured"),
        (
            "record directory, TB",
            f"{plan.stored_bytes / TERABYTE:.3g}",
            f"compressed {config.compression:g} times, measured",
        ),
    )
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for note in GENERATION_NOTES:
        console.print(f"- {note}", highlight=False)


def training_values(request: TrainingRequest, plan: TrainingPlan) -> dict[str, Any]:
    """A training plan as plain values: bytes and seconds."""
    chosen = request.plan
    best = plan.fitting[0] if plan.fitting else None
    return {
        "stage": chosen.stage,
        "model": chosen.model,
        "gpu": chosen.gpu,
        "gpus": chosen.gpus,
        "usable_bytes": plan.usable,
        "head_room": chosen.head_room,
        "steps": plan.workload.steps,
        "tokens_a_step": plan.workload.tokens,
        "attention_length": plan.workload.lengths.weighted,
        "fitting": [_fitting_values(option) for option in plan.fitting],
        "refused": [
            {
                **_candidate_values(item.candidate),
                "bytes": item.memory.parts(),
                "total_bytes": item.memory.total,
                "excess_bytes": item.excess,
            }
            for item in plan.refused
        ],
        "impossible": plan.impossible,
        "paper": paper_line(request, best) if best else None,
        "is_extrapolated": True,
        "notes": notes(request),
    }


def _candidate_values(candidate: Candidate) -> dict[str, Any]:
    return {
        "parallel": dataclasses.asdict(candidate.parallel),
        "micro_batch": candidate.micro_batch,
        "recompute": candidate.recompute,
    }


def _fitting_values(option: Fitting) -> dict[str, Any]:
    return {
        **_candidate_values(option.candidate),
        "bytes": option.memory.parts(),
        "total_bytes": option.memory.total,
        "pipeline_stage": option.memory.rank.stage,
        "micro_batches": option.micro_batches,
        "in_flight": option.memory.rank.in_flight,
        "step_seconds": dataclasses.asdict(option.step),
        "training_seconds": option.training,
        "rollouts": None if option.rollouts is None else dataclasses.asdict(option.rollouts),
        "waiting_share": option.waiting,
        "seconds": option.seconds,
        "tokens_a_gpu_second": option.tokens_a_gpu_second,
        "mfu": option.mfu,
        "days": option.days,
    }


def generation_values(config: GenerationPlanConfig, plan: GenerationPlan) -> dict[str, Any]:
    """A generation plan as plain values."""
    return {
        **dataclasses.asdict(config),
        **dataclasses.asdict(plan),
        "is_extrapolated": True,
        "notes": list(GENERATION_NOTES),
    }
