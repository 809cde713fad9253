"""Who ends an answer before the limit: before and after SFT, with and without mid-training.

    python -m recipes.ablations.stopping quickstarts=[runs/quickstart] output=runs/ablation-stopping

From the evaluations of finished quickstarts; this trains and samples nothing. A random model draws a stop token now
and then, so the share that ends by itself is shown beside the share that ends by itself and has given an answer.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from phimr_nemo.config.ablations import StoppingConfig
from phimr_nemo.jobs.quickstart import ROWS
from phimr_nemo.store.atomic import atomic_write_text, write_json
from phimr_nemo.store.shards import read_table
from recipes.ablations.common import TABLE_MARKDOWN, ablation_command, measures_markdown, seed_directories

if TYPE_CHECKING:
    import pyarrow as pa

TINY: Final = "conf/ablations/stopping.yaml"
STEPS: Final = ("base", "sft-without-midtrain", "midtrain", "sft")
"""Before and after SFT, without and with mid-training."""
COLUMNS: Final = ("finish_reason", "verdict", "tokens")
STOPPED: Final = "ended before the limit (%)"
ANSWERED: Final = "ended before the limit with an answer (%)"
TOKENS: Final = "tokens an answer"
DIGITS: Final = {STOPPED: 1, ANSWERED: 1, TOKENS: 1}


def stopping(verdicts: pa.Table) -> dict[str, float]:
    """Shares of all answers, in per cent, and their mean length.

    Args:
        verdicts: at least the `COLUMNS` of kind "verdicts", at least one row.
    """
    rows = verdicts.to_pylist()
    stopped = [row for row in rows if row["finish_reason"] == "stop"]
    answered = [row for row in stopped if row["verdict"] != "unparsable"]
    return {
        STOPPED: 100 * len(stopped) / len(rows),
        ANSWERED: 100 * len(answered) / len(rows),
        TOKENS: sum(row["tokens"] for row in rows) / len(rows),
    }


def report(config: StoppingConfig) -> str:
    """Write the table (markdown, JSON); returns the markdown.

    Raises:
        UserError: no quickstart, or an evaluation that is not finished.
    """
    roots = seed_directories(config.quickstarts, needed=[f"evaluate-{step}" for step in STEPS])
    titles = dict(ROWS)
    table = {}
    for step in STEPS:
        found = [stopping(_verdicts(root / f"evaluate-{step}")) for root in roots.values()]
        table[titles[step]] = {measure: [each[measure] for each in found] for measure in DIGITS}
    write_json(config.output / "stopping.json", {"seeds": list(roots), "table": table})
    text = measures_markdown("model", table, DIGITS, list(roots))
    atomic_write_text(config.output / TABLE_MARKDOWN, text)
    return text


def _verdicts(evaluation: Path) -> pa.Table:
    return read_table(evaluation / "verdicts", "verdicts", COLUMNS)


def main(config: StoppingConfig) -> None:
    """Who ends an answer before the limit, from finished quickstarts."""
    print(report(config))


if __name__ == "__main__":
    ablation_command(StoppingConfig, TINY, main)()
