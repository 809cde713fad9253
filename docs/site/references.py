"""Pages that are made of the code: keys, commands, and one page for each stage with the same heads."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import messages
from typer.main import get_command

from phimr_nemo.cli.help import examples, keys, presets
from phimr_nemo.cli.main import STAGE_HELP, app

REPOSITORY: Final = Path(__file__).resolve().parents[2]
STAGES: Final = tuple(dict.fromkeys([*STAGE_HELP, "verify", "quickstart"]))
ROW: Final = re.compile(r"^\| (?:\d )?(?P<stage>\w+) \| (?P<through>[^|]* -> [^|]*) \|", re.MULTILINE)


class Guide(NamedTuple):
    """Where a stage is explained and made.

    Attributes:
        page: of docs/.
        title: of the page.
        sources: folders whose messages the stage can raise.
    """

    page: str
    title: str
    sources: tuple[str, ...]


_FLOOR: Final = ("phimr_nemo/training", "phimr_nemo/model")
GUIDES: Final[Mapping[str, Guide]] = {
    "base": Guide("families.md", "families", ("phimr_nemo/model/base.py", "phimr_nemo/model/families")),
    "prepare": Guide("data.md", "data", ("phimr_nemo/data/prepare", "phimr_nemo/data/sources")),
    "generate": Guide("generation.md", "generation", ("phimr_nemo/generate", "phimr_nemo/endpoint")),
    "verify": Guide("verification.md", "verification", ("phimr_nemo/verify",)),
    "curate": Guide("curation.md", "curation", ("phimr_nemo/data/curate",)),
    "pack": Guide("training.md", "training", ("phimr_nemo/data/rows", "phimr_nemo/data/packing.py")),
    "midtrain": Guide("training.md", "training", ("phimr_nemo/supervised", *_FLOOR)),
    "sft": Guide("training.md", "training", ("phimr_nemo/supervised", *_FLOOR)),
    "dpo": Guide("training.md", "training", ("phimr_nemo/align/dpo", *_FLOOR)),
    "grpo": Guide("grpo.md", "GRPO", ("phimr_nemo/align/grpo", *_FLOOR)),
    "distill": Guide("distill.md", "distillation", ("phimr_nemo/align/distill", *_FLOOR)),
    "evaluate": Guide("evaluation.md", "evaluation", ("phimr_nemo/evaluate",)),
    "export": Guide("checkpoints.md", "checkpoints", ("phimr_nemo/report",)),
    "quickstart": Guide("installation.md", "installation", ("phimr_nemo/jobs/quickstart.py",)),
}


def key_table(stage: str) -> str:
    """A stage's keys in Markdown."""
    lines = ["| key | type | default | what it is |", "|---|---|---|---|"]
    for key in keys(stage):
        default = "" if key.default is None else messages.code(key.default or "''")
        text = key.text.replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| `{key.name}` | {messages.code(key.kind)} | {default} | {text} |")
    return "\n".join(lines)


def keys_page() -> str:
    """All keys of all stages."""
    parts = [f"## {stage}\n\n{key_table(stage)}\n" for stage in STAGES]
    return (
        "# Configuration keys\n\nEvery key of every stage, for `KEY=VALUE` on the command line and for the YAML "
        "file. A key without a default has to be given. The values of the paper are in `conf/<stage>/paper.yaml`.\n\n"
        + "\n".join(parts)
    )


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[")


def _options(command: object) -> Iterator[str]:
    for item in getattr(command, "params", []):
        if item.name == "help":
            continue
        is_option = item.param_type_name == "option"
        names = ", ".join(f"`{name}`" for name in [*item.opts, *item.secondary_opts]) if is_option else ""
        default = item.default
        shown = messages.code(str(default)) if default not in (None, False, "") and not callable(default) else ""
        named = names or messages.code(item.metavar or item.name.upper())
        yield f"| {named} | {_cell(getattr(item, 'help', None) or '')} | {shown} |"


def commands_page() -> str:
    """All commands with their options."""
    lines = ["# Commands", "", "`phimr COMMAND --help` says the same, with examples and keys.", ""]

    def describe(name: str, command: object) -> None:
        text = (getattr(command, "help", "") or "").partition("\f")[0]
        lines.extend([f"## phimr {name}", "", _cell(text), ""])
        rows = list(_options(command))
        if rows:
            lines.extend(["| argument or option | what it is | default |", "|---|---|---|", *rows, ""])
        for inner, below in sorted(getattr(command, "commands", {}).items()):
            describe(f"{name} {inner}", below)

    for name, command in sorted(getattr(get_command(app), "commands", {}).items()):
        describe(name, command)
    return "\n".join(lines)


def _through() -> dict[str, str]:
    """Stage -> what goes in and what comes out, of the table of recipes/README.md."""
    text = (REPOSITORY / "recipes" / "README.md").read_text("utf-8")
    return {match["stage"]: match["through"] for match in ROW.finditer(text)}


def stage_page(stage: str) -> str:
    """One stage: run it, in and out, keys, when it fails."""
    guide = GUIDES[stage]
    help_text = STAGE_HELP.get(stage) or getattr(get_command(app), "commands")[stage].help  # noqa: B009
    goes_in, _, comes_out = _through().get(stage, " -> ").partition(" -> ")
    script = REPOSITORY / "slurm" / f"{stage}.sh"
    cluster = (
        f"\n\nOn Slurm: `sbatch slurm/{stage}.sh KEY=VALUE ...` ([cluster](../cluster.md))."
        if script.is_file()
        else ""
    )
    found = [
        message
        for message in messages.messages()
        if any(message.module.startswith(source) for source in guide.sources)
    ]
    listed = messages.listed(found) or "None of its own: what it refuses comes from the stages that it runs."
    return f"""# {stage}

{help_text} Explained on the page [{guide.title}](../{guide.page}).

## Run it

```text
{chr(10).join(examples(stage))}
```

Presets: {", ".join(f"`conf/{stage}/{name}.yaml`" for name in presets(stage))}.{cluster}

## In and out

- **In**: {goes_in or "nothing"}
- **Out**: {comes_out or "a tiny model with its tokenizer, as a Hugging Face directory"}
- **Beside it**: `run.json` (settings, versions, inputs), `DONE` when it has finished

## Keys

{key_table(stage)}

## When it fails

Exit code 2 is a mistake in what was given, with its remedy; nothing was lost. Exit code 3 is a stop that was asked
for. In both cases, and after a kill, the same command continues. `phimr status DIR` says how far a run is,
`phimr doctor` what the machine lacks. Messages of this stage ([all of them](../reference/messages.md)):

{listed}
"""


def pages() -> dict[str, str]:
    """Path in the site's sources -> text, of every page that is made of the code."""
    return {
        "reference/keys.md": keys_page(),
        "reference/commands.md": commands_page(),
        "reference/messages.md": messages.page(),
        **{f"stages/{stage}.md": stage_page(stage) for stage in STAGES},
    }
