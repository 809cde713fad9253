"""docs/paper.md: each claim and open question of the paper, with our command, table, verdict and price.

    python docs/site/paper.py

Figures are read from the tables of the other pages and from the planner; none stands here.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple

from figures import DOCS, Cell, Figure, difference, look_up, tables

REPOSITORY: Final = Path(__file__).resolve().parents[2]
PAGE: Final = DOCS / "paper.md"
CPU_TIME: Final = re.compile(r"quickstart`, one seed.*?\((?P<minutes>\d+) min of CPU\)")
ERRORS: Final = 2.0
"""A difference counts when it is larger than so many of its standard errors."""
HOLDS: Final = "holds"
FAILS: Final = "does not hold at this size"
UNSEEN: Final = "not visible at this size"
CLUSTER: Final = "needs a cluster"

Sign = Literal[-1, 1]


class Claim(NamedTuple):
    """A sentence of the paper and what we have about it.

    Attributes:
        says: the sentence.
        command: of ours.
        preset: that it begins with.
        sign: of the difference, if the sentence holds.
        unit: of the figures.
        cells: one difference; or two values, of which the second minus the first is one.
    """

    says: str
    command: str
    preset: str
    sign: Sign
    unit: str
    cells: tuple[Cell, ...]


QUICKSTART: Final = "phimr quickstart --seeds 0,1,2"
TINY: Final = "conf/quickstart/tiny.yaml"


def _change(row: str) -> Cell:
    return Cell("results.md", "points", row)


def _ablation(name: str) -> tuple[str, str]:
    """The command of an ablation, as its page has it, and its preset.

    Raises:
        LookupError: no page shows it.
    """
    shown = re.compile(rf"^python -m recipes\.ablations\.{name} (?:.*\\\n)*.*$", re.MULTILINE)
    for path in sorted(DOCS.glob("*.md")):
        match = shown.search(path.read_text("utf-8")) if path != PAGE else None
        if match is not None:
            return " ".join(match[0].replace("\\\n", " ").split()), f"conf/ablations/{name}.yaml"
    raise LookupError(f"no page of docs/ shows how to run recipes.ablations.{name}")


def _without(row: str) -> tuple[Cell, ...]:
    return (Cell("grpo.md", "minus annealed", row),)


CLAIMS: Final = (
    Claim(
        "Distillation as mid-training makes the model reason.",
        QUICKSTART,
        TINY,
        1,
        "points",
        (_change("mid-training minus base"),),
    ),
    Claim(
        "SFT on a high-quality subset adds to it.",
        QUICKSTART,
        TINY,
        1,
        "points",
        (_change("SFT minus mid-training"),),
    ),
    Claim("Rollout DPO adds to SFT.", QUICKSTART, TINY, 1, "points", (_change("DPO minus SFT"),)),
    Claim("RL with a verifiable reward adds to DPO.", QUICKSTART, TINY, 1, "points", (_change("GRPO minus DPO"),)),
    Claim(
        "SFT needs mid-training before it.",
        QUICKSTART,
        TINY,
        1,
        "points",
        (_change("SFT minus SFT without mid-training"),),
    ),
    Claim(
        "SFT on a small set of hard examples (LIMO, S1K) makes a model worse.",
        *_ablation("direct_sft"),
        -1,
        "points",
        (Cell("supervised-ablations.md", "points", "mid-training + small set minus mid-training"),),
    ),
    Claim(
        "Mid-training gains with the size of its set.",
        *_ablation("midtrain_scaling"),
        1,
        "% pass@1",
        (
            Cell("supervised-ablations.md", "pass@1", "1,500 problems, 5 epochs"),
            Cell("supervised-ablations.md", "pass@1", "whole set, 5 epochs"),
        ),
    ),
    Claim(
        "SFT without packing teaches the model when to stop.",
        *_ablation("stopping"),
        1,
        "% of responses that end with an answer",
        (
            Cell("supervised-ablations.md", "ended before the limit with an answer", "mid-training"),
            Cell("supervised-ablations.md", "ended before the limit with an answer", "SFT"),
        ),
    ),
)
TECHNIQUES: Final = (
    Claim(
        "Temperature annealing: a fixed T = 1.0 is worse.",
        *_ablation("grpo_remedies"),
        -1,
        "points",
        _without("temperature 1.0"),
    ),
    Claim(
        "Reward rebalancing: training without it is worse.",
        *_ablation("grpo_remedies"),
        -1,
        "points",
        _without("no rebalancing"),
    ),
    Claim(
        "Prompt optimization: uniform lengths make training better.",
        *_ablation("grpo_remedies"),
        1,
        "points",
        _without("prompt optimisation at 0.05"),
    ),
    Claim(
        "Prompt optimization: and steadier.",
        *_ablation("grpo_remedies"),
        -1,
        "points of the worst drop",
        (
            Cell("grpo.md", "worst drop", "annealed"),
            Cell("grpo.md", "worst drop", "prompt optimisation at 0.05"),
        ),
    ),
    Claim(
        "All three together: training without any is worse.",
        *_ablation("grpo_remedies"),
        -1,
        "points",
        _without("no technique (T = 1.0)"),
    ),
    Claim(
        "RL without them is unstable.",
        *_ablation("grpo_remedies"),
        1,
        "points of the worst drop",
        (Cell("grpo.md", "worst drop", "annealed"), Cell("grpo.md", "worst drop", "no technique (T = 1.0)")),
    ),
)
QUESTIONS: Final = (
    Claim(
        "Do four times as many documents beat four times the passes over them, at equal updates (width 192)?",
        *_ablation("repetition"),
        1,
        "% pass@1",
        (
            Cell("supervised-ablations.md", "pass@1", "hidden-192, 1,500 problems"),
            Cell("supervised-ablations.md", "pass@1", "hidden-192, whole set"),
        ),
    ),
    Claim(
        "Are near misses better rejected responses than random ones?",
        *_ablation("dpo_negatives"),
        1,
        "points",
        (Cell("results.md", "points", "near misses minus random negatives"),),
    ),
    Claim(
        "Is packed mid-training as good as unpacked (lower loss with randomized packing)?",
        *_ablation("midtrain_packing"),
        -1,
        "nats per token",
        (
            Cell("supervised-ablations.md", "held-out loss", "unpacked"),
            Cell("supervised-ablations.md", "held-out loss", "packed, mixed (`placement=mixed`)"),
        ),
    ),
    Claim(
        "Does the instability come from a small model (gradient norm, width 192 against 64)?",
        *_ablation("grpo_sizes"),
        -1,
        "gradient norm",
        (
            Cell("grpo.md", "gradient norm", "width 64, all techniques"),
            Cell("grpo.md", "gradient norm", "width 192, all techniques"),
        ),
    ),
    Claim(
        "Does SFT on the harder tiers cost the easier problems?",
        *_ablation("forgetting"),
        -1,
        "points",
        (Cell("generality.md", "SFT", "word problem, middle", table=1),),
    ),
    Claim(
        "Does a grader that rejects a fifth of what is correct cost RL?",
        *_ablation("grader_errors"),
        -1,
        "points",
        (Cell("grader-errors.md", "minus exact", "missed-20"),),
    ),
    Claim(
        "Does the teacher's style matter once its answers are verified?",
        *_ablation("teachers"),
        -1,
        "points",
        (Cell("generality.md", "minus careful, 10 %", "terse, 10 % errors"),),
    ),
)
STAGES: Final = ("midtrain", "sft", "dpo", "grpo")
GPUS: Final = 128
GPU: Final = "h100-80g"
DECIMALS: Final = 3


def verdict(found: Figure, sign: Sign) -> str:
    """What a difference says about a sentence that wants it to have a sign."""
    if math.isnan(found.error) or abs(found.mean) <= ERRORS * found.error:
        return UNSEEN
    return HOLDS if found.mean * sign > 0 else FAILS


def _row(claim: Claim) -> str:
    found = difference([look_up(cell) for cell in claim.cells])
    page = claim.cells[0].page
    return (
        f"| {claim.says} | `{claim.command}` | `{claim.preset}` | {found.text} {claim.unit} ([table]({page})) "
        f"| {verdict(found, claim.sign)} |"
    )


def _table(claims: Sequence[Claim]) -> str:
    head = "| the paper | command | preset | ours | verdict |\n|---|---|---|---|---|\n"
    return head + "\n".join(_row(claim) for claim in claims)


def _price(stage: str) -> str:
    from phimr_nemo.config import GenerationPlanConfig
    from phimr_nemo.plan.request import read_request
    from phimr_nemo.plan.search import plan_training

    # Of those of a stage with rollouts half are its servers'.
    train = [f"gpus={GPUS // 2}", f"server_gpus={GPUS // 2}"] if stage == "grpo" else [f"gpus={GPUS}"]
    arguments = ["model=phi4mini", f"stage={stage}", *train, f"gpu={GPU}"]
    request = read_request(arguments, None)
    if isinstance(request, GenerationPlanConfig):
        raise TypeError(f"{stage} is no training stage")
    best = plan_training(request.plan, request.config, request.arch, request.pinned).fitting[0]
    command = f"phimr plan {' '.join(arguments)}"
    return f"| {stage} | `conf/{stage}/paper.yaml` | `{command}` | {best.days:.2g} | {best.days * GPUS:.3g} |"


def _models() -> str:
    """The paper's scores as docs/results.md has them, and whether we have run them."""
    header, *rows = next(table for table in tables("results.md") if table[0][0] == "model")
    paper, ours = ([n for n, title in enumerate(header) if title.endswith(end)] for end in ("paper", "ours"))
    titles = " / ".join(header[n].removesuffix(", paper") for n in paper)
    lines = [f"| model | paper ({titles}) | ours | verdict |", "|---|---|---|---|"]
    for row in rows:
        measured = " / ".join(row[n] for n in ours)
        state = CLUSTER if {row[n] for n in ours} == {"not run"} else "measured"
        lines.append(f"| {row[0]} | {' / '.join(row[n] for n in paper)} | {measured} | {state} |")
    return "\n".join(lines)


def page() -> str:
    """The page.

    Raises:
        LookupError: a table that a claim names is not there.
    """
    minutes = CPU_TIME.search((DOCS / "installation.md").read_text("utf-8"))
    if minutes is None:
        raise LookupError("docs/installation.md does not say what a quickstart costs")
    cost = minutes["minutes"]
    return f"""# The paper, claim by claim

Made by `python docs/site/paper.py` from the tables of the pages that it links to, and from the planner. The tables
are of the tiny model on CPU: they test the recipe, not Phi-4-mini. A figure is a mean ± its standard error across
three seeds, in brackets the one over questions; `a -> b` is two means, whose errors are taken as independent.

| verdict | the difference |
|---|---|
| {HOLDS} | has the sign that the sentence wants, and is larger than {ERRORS:.0f} of its (larger) standard error |
| {FAILS} | has the other sign and is as large |
| {UNSEEN} | is smaller |
| {CLUSTER} | has not been measured: see the price at the end |

A quickstart takes {cost} minutes of CPU per seed ([machine](installation.md)). The ablations begin with three of
them; their own minutes were not recorded.

## Stages

{_table(CLAIMS)}

## Stabilization of RL

{_table(TECHNIQUES)}

## Open questions

{_table(QUESTIONS)}

Not tested at any size: groups of 128 for one positive, and responses of 12 K to 20 K tokens within a group.

## Benchmarks

{_models()}

The price of the training stages, as the planner predicts it for {GPUS} x {GPU} (first layout; [what is measured and
what is not](planner.md)):

| stage | preset | command | days | GPU-days |
|---|---|---|---:|---:|
{chr(10).join(_price(stage) for stage in STAGES)}
"""


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    PAGE.write_text(page(), "utf-8")
