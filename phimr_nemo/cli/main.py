"""The console command `phimr`. Needs no torch to answer --help."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer

from phimr_nemo import __version__
from phimr_nemo.cli.bridge import bridge
from phimr_nemo.cli.data import data_app
from phimr_nemo.cli.help import StageCommand
from phimr_nemo.cli.options import ConfigFile, Overrides
from phimr_nemo.cli.runs import report, status
from phimr_nemo.cli.show import compare, show
from phimr_nemo.errors import UserError, exit_with_message
from phimr_nemo.generate.serving.serve import serve
from phimr_nemo.jobs.cluster import check_layout, parse_allocation
from phimr_nemo.jobs.cluster import launch as launch_on_cluster
from phimr_nemo.process.memory import choose_returning_allocator
from phimr_nemo.process.stopping import stoppable
from phimr_nemo.store.atomic import keep_others_from_writing
from phimr_nemo.text.printable import say

app = typer.Typer(
    name="phimr",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")
app.command()(bridge)


def _version(asked: bool) -> None:
    if asked:
        say(f"phimr-nemo {__version__}")
        raise typer.Exit


@app.callback()
def phimr(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """The Phi-4-Mini-Reasoning recipe on NeMo, Megatron-Core and NeMo-Aligner."""


STAGE_HELP: Final = {
    "base": "Make a tiny randomly initialised model of the Phi-4-mini architecture with its tokenizer.",
    "prepare": "Sources -> problems, and rollouts from sources with trajectories: dedup, decontamination, labels.",
    "generate": "Problems -> rollouts: an endpoint, vLLM, a model, recorded responses or a programmatic teacher.",
    "curate": "Verdicts -> mid-training set, SFT subset, preference pairs, RL prompts.",
    "pack": "Conversations -> packed rows of one length.",
    "midtrain": "Stage 1: packed next-token prediction on the full verified set (NeMo 2.0).",
    "sft": "Stage 2: supervised fine-tuning on unpacked conversations (NeMo 2.0).",
    "dpo": "Stage 3: rollout DPO (NeMo-Aligner).",
    "grpo": "Stage 4: GRPO with a verifiable reward (NeMo-Aligner).",
    "distill": "On-policy distillation: the student samples, a teacher scores every token (NeMo-Aligner).",
    "evaluate": "pass@1, pass@k and maj@k on held-out or benchmark problems.",
    "export": "A trained directory -> a release directory with its model card.",
}

DryRun = Annotated[bool, typer.Option("--dry-run", help="Check, print the resolved config and derived numbers.")]
Allocation = Annotated[
    str | None,
    typer.Option(metavar="NODESxPROCESSES", help="With --dry-run: the job that the layout has to fit, as 16x8."),
]


def _run_stage(
    stage: str, overrides: list[str] | None, config: Path | None, dry_run: bool, allocation: str | None = None
) -> Any:
    """Run a stage, or with `dry_run` describe it; its resolved configuration."""
    from phimr_nemo.config import STAGES, load_config, to_yaml
    from phimr_nemo.jobs.launch import start_stage
    from phimr_nemo.jobs.preflight import derived_numbers

    path = config if config is not None else Path("conf") / stage / "paper.yaml"
    if dry_run:
        resolved: Any = load_config(STAGES[stage], path, overrides or [])
        if allocation is not None:
            check_layout(stage, resolved, *parse_allocation(allocation))
        say(to_yaml(resolved), end="")
        for name, value in derived_numbers(stage, resolved).items():
            say(f"# {name}: {value}")
        return resolved
    started = time.monotonic()
    resolved = start_stage(stage, path, overrides or [], is_default=config is None)
    _close(stage, resolved, path, time.monotonic() - started)
    return resolved


def _close(stage: str, resolved: Any, preset: Path, seconds: float) -> None:
    """Say what was made; of several ranks the first speaks, or the process that started them."""
    from phimr_nemo.jobs.closing import PART_OF, closing_lines
    from phimr_nemo.jobs.launch import CHECKED

    if os.environ.get("RANK", "0") != "0" or CHECKED in os.environ:
        return
    for line in closing_lines(stage, resolved, preset, seconds, is_part=PART_OF in os.environ):
        say(line)


def _stage_command(stage: str) -> Callable[..., None]:
    def command(
        overrides: Overrides = None,
        config: ConfigFile = None,
        dry_run: DryRun = False,
        allocation: Allocation = None,
    ) -> None:
        _run_stage(stage, overrides, config, dry_run, allocation)

    command.__doc__ = STAGE_HELP[stage]
    return command


for _stage in STAGE_HELP:
    if _stage != "export":
        app.command(_stage, cls=StageCommand)(_stage_command(_stage))


@app.command(help=STAGE_HELP["export"], cls=StageCommand)
def export(
    overrides: Overrides = None,
    config: ConfigFile = None,
    dry_run: DryRun = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="ORG/NAME", help="Upload the release; the token is HF_TOKEN or the saved one."),
    ] = None,
    public: Annotated[bool, typer.Option(help="A repository that the upload makes is public.")] = False,
) -> None:
    """Write the release, unless that was done before, and upload it if asked to."""
    from phimr_nemo.config import STAGES, load_config
    from phimr_nemo.report.card import front_matter
    from phimr_nemo.report.hub import check_card, check_hub, push

    if push_to_hub is not None and not dry_run:
        check_hub(push_to_hub)
        settings = load_config(STAGES["export"], config or Path("conf/export/paper.yaml"), overrides or [])
        check_card(front_matter(settings) + "\n", push_to_hub)
    resolved = _run_stage("export", overrides, config, dry_run)
    if push_to_hub is not None and not dry_run:
        with stoppable("the upload"):
            say(push(resolved.run.output / "hf", push_to_hub, private=not public))


@app.command(cls=StageCommand)
def verify(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[IN OUT | KEY=VALUE...]", help="A file to grade and where to write it; or overrides."
        ),
    ] = None,
    config: ConfigFile = None,
    dry_run: DryRun = False,
    response: Annotated[str, typer.Option(help="IN OUT: column of the response.")] = "response",
    answer: Annotated[str, typer.Option(help="IN OUT: column of the reference answer.")] = "answer",
    workers: Annotated[int, typer.Option(help="IN OUT: grader processes.")] = 2,
) -> None:
    """Grade answers with math-verify: a file IN into OUT, or rollouts -> verdicts as a stage of the recipe."""
    given = arguments or []
    if not given or all("=" in item for item in given):
        _run_stage("verify", given, config, dry_run)
        return
    if len(given) != 2:
        raise UserError(
            f"phimr verify with {len(given)} arguments: {given}",
            rule="either IN and OUT, or KEY=VALUE overrides",
            remedy="for example: phimr verify answers.jsonl graded.jsonl --response response --answer answer",
        )
    from phimr_nemo.verify.stage import verify_file

    counts = verify_file(Path(given[0]), Path(given[1]), response=response, answer=answer, workers=workers)
    say("  ".join(f"{name}: {count}" for name, count in counts.items()))


@app.command(cls=StageCommand)
def quickstart(
    overrides: Overrides = None,
    config: ConfigFile = None,
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas.")] = "0",
    out: Annotated[Path, typer.Option(help="Output directory.")] = Path("runs/quickstart"),
    redo: Annotated[
        bool, typer.Option("--redo", help="Make steps again whose command, settings or inputs have changed.")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """The whole recipe on a tiny model: data, four training stages, evaluation, export, table, plots."""
    from phimr_nemo.jobs.quickstart import plan_quickstart, run_quickstart

    path = config if config is not None else Path("conf/quickstart/tiny.yaml")
    numbers = _parse_seeds(seeds)
    if dry_run:
        for step in plan_quickstart(path, numbers, out, overrides or []):
            say(step)
        return
    with stoppable("quickstart"):
        run_quickstart(path, numbers, out, overrides or [], redo=redo)


def _parse_seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(
            f"--seeds {text!r}", rule="whole numbers separated by commas", remedy="for example --seeds 0,1,2"
        ) from error
    if any(seed < 0 for seed in seeds) or len(set(seeds)) != len(seeds):
        raise UserError(
            f"--seeds {text!r}", rule="distinct numbers of at least 0", remedy="for example --seeds 0,1,2"
        )
    return seeds


@app.command()
def adopt(
    source: Annotated[Path, typer.Argument(help="A Phi-family Hugging Face directory with its tokenizer.")],
    target: Annotated[Path, typer.Argument(help="Where to write; must not exist.")],
    system_prompt: Annotated[
        str | None, typer.Option(help="Before every conversation; default Phi-4-mini-reasoning's own.")
    ] = None,
) -> None:
    """Make a base model ready for the recipe: a copy with the reasoning chat template, which every stage hands on."""
    with stoppable("adopt"):
        from phimr_nemo.model.adopt import adopt as adopt_model

        adopt_model(source, target, system_prompt=system_prompt)
    say(f"{target}: {source} with the reasoning chat template; stages start from it by base={target}")


@app.command("import")
def import_model(
    source: Annotated[
        str, typer.Argument(help="A GGUF file of the Llama family with SmolLM2's kind of tokenizer; or smollm2-135m.")
    ],
    target: Annotated[Path, typer.Argument(help="Where to write; must not exist.")],
    system_prompt: Annotated[str, typer.Option(help="Before every conversation; none by default.")] = "",
) -> None:
    """A small Llama-family model from a GGUF file as a Hugging Face directory with the reasoning chat template."""
    with stoppable("import"):
        from phimr_nemo.model.files.gguf import import_gguf

        architecture = import_gguf(source, target, system_prompt=system_prompt)
    say(f"{target}: {architecture.num_parameters:,} parameters")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A Hugging Face directory, Megatron or NeMo 2.0 checkpoint.")],
    target: Annotated[Path, typer.Argument(help="Where to write; must not exist.")],
    tp: Annotated[int, typer.Option(help="Tensor-parallel ranks of a Megatron or NeMo target.")] = 1,
    pp: Annotated[int, typer.Option(help="Pipeline stages of a Megatron or NeMo target.")] = 1,
    to: Annotated[
        str | None, typer.Option(help="hf, megatron or nemo; default megatron from Hugging Face, else hf.")
    ] = None,
    hf: Annotated[
        Path | None, typer.Option(help="Directory of config.json and tokenizer, if SOURCE does not carry them.")
    ] = None,
) -> None:
    """Convert weights between Hugging Face, Megatron (any layout) and NeMo 2.0, one tensor at a time."""
    for name, count in (("--tp", tp), ("--pp", pp)):
        if count < 1:
            raise UserError(f"{name} {count}", rule="at least 1", remedy=f"for example {name} 2")
    from phimr_nemo.config import ParallelConfig
    from phimr_nemo.jobs.launch import silence_import_notes

    silence_import_notes()
    # Loading the trainers takes longer than many a conversion: a stop is heard from the start.
    with stoppable("convert"):
        from phimr_nemo.supervised.conversion import convert as convert_checkpoint

        kind = convert_checkpoint(source, target, kind=to, layout=ParallelConfig(tensor=tp, pipeline=pp), hf=hf)
    say(f"{target}: {kind}" + ("" if kind == "hf" else f", tensor {tp} x pipeline {pp}"))


ModelDirectory = Annotated[Path, typer.Argument(help="A Hugging Face directory: an export, or any stage's hf/.")]
Temperature = Annotated[float, typer.Option(help="0 = greedy.")]
TopP = Annotated[float, typer.Option(help="Nucleus mass.")]
NewTokens = Annotated[int, typer.Option(help="Longest reply, in tokens.")]
MaxLength = Annotated[
    int | None, typer.Option(help="Longest conversation in tokens; above LongRoPE's original length long factors.")
]
SeedOption = Annotated[int, typer.Option(help="The same seed and words give the same reply.")]
DtypeOption = Annotated[Literal["fp32", "bf16", "fp16"], typer.Option(help="What to compute in.")]


@app.command()
def chat(
    model: ModelDirectory,
    temperature: Temperature = 0.6,
    top_p: TopP = 0.95,
    max_new_tokens: NewTokens = 32768,
    max_length: MaxLength = None,
    seed: SeedOption = 0,
    dtype: DtypeOption = "fp32",
) -> None:
    """Chat with a model in the terminal; its thinking is dimmed."""
    from phimr_nemo.cli import chat as terminal
    from phimr_nemo.generate.sampler import SamplingParams

    params = SamplingParams(temperature, top_p, max_new_tokens)
    terminal.chat(model, params, seed=seed, max_length=max_length, dtype=dtype)


@app.command()
def sample(
    model: ModelDirectory,
    question: Annotated[str, typer.Argument(help="What to ask.")],
    count: Annotated[int, typer.Option("-n", min=1, help="Replies.")] = 1,
    temperature: Temperature = 0.6,
    top_p: TopP = 0.95,
    max_new_tokens: NewTokens = 32768,
    max_length: MaxLength = None,
    seed: SeedOption = 0,
    dtype: DtypeOption = "fp32",
) -> None:
    """Print a model's replies to one question."""
    from phimr_nemo.cli import chat as terminal
    from phimr_nemo.generate.sampler import SamplingParams

    params = SamplingParams(temperature, top_p, max_new_tokens)
    terminal.sample(model, question, params, count=count, seed=seed, max_length=max_length, dtype=dtype)


app.command("serve")(serve)
app.command("launch")(launch_on_cluster)
app.command()(report)
app.command()(status)
app.command()(show)
app.command()(compare)


@app.command("continue")
def continue_run(
    run: Annotated[Path, typer.Argument(help="The run directory of a training stage to go on from.")],
    target: Annotated[Path, typer.Argument(help="The new run's directory.")],
    overrides: Overrides = None,
    step: Annotated[int | None, typer.Option(help="The checkpoint's step; default the newest.")] = None,
    dry_run: DryRun = False,
) -> None:
    """A new run from another's checkpoint: a finished run with more steps, or an earlier step with another rate."""
    from phimr_nemo.jobs.continuing import continuation

    going_on = continuation(run, target, step, overrides or [])
    if not dry_run:
        going_on.begin()
    _run_stage(going_on.stage, going_on.settings, going_on.config, dry_run)


@app.command()
def plan(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="stage=NAME [KEY=VALUE]...", help="gpus, gpu, model, ... and the stage's own keys."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of the stage: plan the layout that it has.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Memory, step time and days of a stage in every layout, or the cost of a data set, before a GPU is touched."""
    from phimr_nemo.plan.command import run_plan

    run_plan(overrides or [], config, as_json=as_json)


@app.command()
def doctor() -> None:
    """What this machine has and lacks against the tested versions, and what falls back to what."""
    from phimr_nemo.jobs.doctor import diagnose, exit_code, print_report

    findings = diagnose()
    print_report(findings)
    raise typer.Exit(exit_code(findings))


def main() -> None:
    """Entry point: errors of the user become one clear message and exit code 2, preemption 3."""
    keep_others_from_writing()
    choose_returning_allocator()
    with exit_with_message():
        app()


if __name__ == "__main__":
    main()
