"""The model card of a release: intended use, limits, how to run it, what it was trained on, and what was measured.

Every figure is a run's own; the tables are those of `phimr report`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from phimr_nemo.config import ExportConfig
from phimr_nemo.data.turns import format_of
from phimr_nemo.errors import UserError
from phimr_nemo.evaluate.evaluate import evaluated_model
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.origin import Origin
from phimr_nemo.model.regime import NAMES, was_trained_long
from phimr_nemo.report.collect import Evaluated, read_evaluation
from phimr_nemo.report.scores import as_in_the_paper, reference_table
from phimr_nemo.report.tables import (
    Seeds,
    Table,
    difference_table,
    markdown,
    markdown_text,
    percent,
    score_table,
)
from phimr_nemo.store.check import recorded_kind
from phimr_nemo.store.inputs import is_hub_name
from phimr_nemo.store.provenance import MADE_FROM, content_of, read_made_from
from phimr_nemo.store.runs import CONFIG_FILE, DONE_FILE, RESULTS_FILE, RUN_FILE, RunDirectory
from phimr_nemo.store.shards import Manifest, is_complete, read_manifest

ARCHITECTURES: Final = {
    "phi3": "Phi-4-mini",
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "smollm3": "SmolLM3",
}
SAMPLING: Final = {"temperature": 0.6, "top_p": 0.95, "max_new_tokens": 1024}
"""Of the examples, where no evaluation says otherwise; the first two are those of Microsoft's published scripts."""
EXAMPLE: Final = "Compute (3+4)*2."
READS: Final = ("data", "pairs", "prompts")
"""The settings of training stages that name records."""
DROPPED: Final = "dropped: "
RECIPE: Final = "arXiv 2504.21233"


def model_card(config: ExportConfig, architecture: Architecture, origin: Origin) -> str:
    """The model card: hub metadata, use and limits, how to run it, what was trained how and on what, and measured.

    Args:
        config: names the runs to report.
        architecture: of the model.
        origin: how it was trained, and what it can be asked.

    Raises:
        UserError: a stage or an evaluation has not finished.
    """
    evaluations = {name: read_evaluation(directory) for name, directory in config.evaluations.items()}
    own = _own(config.model, evaluations)
    parts = [
        front_matter(config),
        f"# {markdown_text(config.run.output.name)}",
        f"A model of {architecture.num_parameters:,} parameters in the architecture of "
        f"{ARCHITECTURES.get(architecture.family, architecture.family.capitalize())} "
        f"(`{architecture.traits.hf_class}`), trained "
        f"from {markdown_text(config.base_model)} with the Phi-4-Mini-Reasoning recipe "
        f"({RECIPE}) in phimr-nemo.",
        "## Intended use\n\n" + _use(origin),
        "## Limits\n\n" + _limits(own),
        "## How to run it\n\n" + _running(config, architecture, origin, own),
    ]
    if config.stages:
        parts.append("## Training\n\n" + _stage_table(config.stages))
    if config.stages or config.data:
        parts.append("## Training data\n\n" + _training_data(config))
    if evaluations:
        parts.append("## Evaluation\n\n" + _measured(evaluations))
    parts.append(
        f"## Citation and licence\n\nPlease cite the paper of the recipe, {RECIPE}, and phimr-nemo. "
        f"Licence of the weights: {markdown_text(config.licence)}."
    )
    return "\n\n".join(parts) + "\n"


def _own(model: Path, evaluations: Mapping[str, Evaluated]) -> list[Evaluated]:
    """The evaluations of the released weights themselves."""
    content = content_of(model)
    return [one for one in evaluations.values() if evaluated_model(one.path / RESULTS_FILE) == content]


def _use(origin: Origin) -> str:
    lines = ["Questions with an answer that can be checked. The model writes its reasoning, then its answer."]
    if origin.knows:
        lines.append(f"What it can be asked: {markdown_text(origin.knows)}")
    if origin.single_turn:
        lines.append("Each question stands alone: it has never seen a conversation of several.")
    return "\n\n".join(lines)


def _limits(own: list[Evaluated]) -> str:
    lines = [
        f"On {markdown_text(one.benchmark)} {percent(1 - one.result.pass1)} % of its responses are not correct; "
        f"{percent(one.result.truncated)} % meet the token limit, "
        f"{percent(one.result.unparsable)} % hold no readable answer."
        for one in own
    ]
    if not own:
        lines.append("No evaluation of these weights is reported here.")
    lines += [
        "What is not in the tables below has not been measured: other subjects, other languages, other wordings.",
        "A correct answer is no proof that the reasoning before it is correct.",
        "The recipe rewards correct answers and nothing else: it has no training for safety, and none was measured.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _running(config: ExportConfig, architecture: Architecture, origin: Origin, own: list[Evaluated]) -> str:
    """Commands for transformers, vLLM and llama.cpp, with the sampling of the evaluations.

    The evaluations draw from the nucleus alone. transformers (top_k 50), vLLM (what generation_config.json says) and
    llama.cpp (top_k 40, min_p 0.05) have filters of their own unless they are told otherwise.
    """
    params: Mapping[str, Any] = own[0].settings.get("params", {}) if own else {}
    sampling = {name: params.get(name, usual) for name, usual in SAMPLING.items()}
    longest = _longest(architecture, origin)
    temperature, top_p = sampling["temperature"], sampling["top_p"]
    message = {"role": "user", "content": EXAMPLE}
    drawn = {"temperature": temperature, "top_p": top_p, "top_k": -1, "min_p": 0}
    request = json.dumps({"model": "release", "messages": [message], **drawn})
    parts = [
        "The chat template comes with the tokenizer. Generation ends with "
        f"{_end(config.model, architecture)}. In the directory of the weights:",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'tokenizer = AutoTokenizer.from_pretrained(".")\nmodel = AutoModelForCausalLM.from_pretrained(".")\n'
        f'question = [{{"role": "user", "content": {json.dumps(EXAMPLE)}}}]\n'
        "inputs = tokenizer.apply_chat_template(\n"
        '    question, add_generation_prompt=True, return_tensors="pt", return_dict=True\n)\n'
        "output = model.generate(\n"
        f"    **inputs, max_new_tokens={sampling['max_new_tokens']}, do_sample={temperature > 0}"
        + (f", temperature={temperature:g}, top_p={top_p:g}, top_k=0" if temperature > 0 else "")
        + '\n)\nprint(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))\n```',
        "vLLM:",
        f"```bash\nvllm serve . --served-model-name release --max-model-len {longest}\n"
        "curl http://localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f"    -d '{request}'\n```",
        "llama.cpp, whose converter knows tokenizers by name and refuses one that it does not know:",
        f"```bash\npython convert_hf_to_gguf.py . --outfile model.gguf\n"
        f"llama-cli -m model.gguf -c {longest} --jinja --temp {temperature:g} --top-p {top_p:g} --top-k 0 --min-p 0 "
        f"-p {json.dumps(EXAMPLE)}\n```",
        *_length(architecture, origin),
    ]
    return "\n\n".join(parts)


def _longest(architecture: Architecture, origin: Origin) -> int:
    """The maximum length to serve the model with (tokens)."""
    if was_trained_long(architecture, origin) is False:
        return architecture.original_max_position_embeddings
    return architecture.max_position_embeddings


def _end(model: Path, architecture: Architecture) -> str:
    """What ends a response, for people."""
    from phimr_nemo.model.files.companions import read_added_tokens

    turns = format_of(read_added_tokens(model, architecture))
    return "the tokens that generation_config.json names" if turns is None else f"`{turns.end}`"


def front_matter(config: ExportConfig) -> str:
    """The card's metadata for the hub, between lines of dashes; base and data sets are named there if
    they are of the hub."""
    base = {"base_model": config.base_model} if is_hub_name(config.base_model) else {}
    datasets = [one.name for one in config.data if is_hub_name(one.name)]
    metadata = {
        "license": config.licence,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **base,
        **({"datasets": datasets} if datasets else {}),
        "tags": ["math", "reasoning", Architecture.from_directory(config.model).family],
    }
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---"


def _length(architecture: Architecture, origin: Origin) -> list[str]:
    """How long sequences may be, where LongRoPE makes that a matter of accuracy."""
    was_long = was_trained_long(architecture, origin)
    if was_long is None:
        return []
    original = architecture.original_max_position_embeddings
    factors = f"LongRoPE's {NAMES[was_long]} factors"
    trained = f"Trained on sequences of up to {origin.sequence_length:,} tokens with {factors}"
    if was_long:
        return [
            f"{trained}: serve it with a maximum length above {original:,} tokens, for short questions too "
            f"(vLLM's default is the context, {architecture.max_position_embeddings:,}). transformers computes "
            "short sequences with the short factors."
        ]
    return [
        f"{trained}: serve it with a maximum length of at most {original:,} tokens "
        f"(vLLM: `--max-model-len {original}`), because engines take the long factors above it."
    ]


def _stage_table(stages: Mapping[str, Path]) -> str:
    rows = []
    for name, directory in stages.items():
        run = RunDirectory(directory)
        if not run.is_done:
            raise UserError(
                f"stage {name!r} in {directory} has not finished",
                rule="the model card reports finished stages",
                remedy="finish the stage, or leave it out of `stages`",
            )
        rows.append((name, *_trained_with(name, run)))
    header = ("stage", "steps", "longest sequence", "peak learning rate", "seed", "code")
    return markdown(Table("Training", header, tuple(rows))).rstrip("\n")


def _trained_with(name: str, run: RunDirectory) -> tuple[str, ...]:
    """Steps, sequence length, rate, seed and code of a finished training run.

    Raises:
        UserError: it is none, or its files are damaged.
    """
    facts = run.closing_facts()
    try:
        settings = yaml.safe_load((run.path / CONFIG_FILE).read_text("utf-8"))
        made = json.loads((run.path / RUN_FILE).read_text("utf-8"))
        return (
            str(facts["steps"]),
            str(settings["sequence_length"]),
            f"{settings['optim']['lr']:g}",
            str(made["seed"]),
            str(made["versions"]["git"])[:12],
        )
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError, RecursionError) as error:
        raise UserError(
            f"stage {name!r} in {run.path} is no training run, or damaged: {error!r:.200}",
            rule=f"the card reports finished training stages from their {CONFIG_FILE}, {RUN_FILE} and {DONE_FILE}",
            remedy="give the run.output of midtrain, sft, dpo, grpo or distill; restore its files; or leave it out",
        ) from error


def _training_data(config: ExportConfig) -> str:
    """The sources with their licences, and the records that each stage read."""
    parts = []
    if config.data:
        sources = (f"- {markdown_text(one.name)}: {markdown_text(one.licence)}" for one in config.data)
        parts.append("Sources and their licences:\n\n" + "\n".join(sources))
    else:
        parts.append("The sources and their licences were not named (`data` of `phimr export`).")
    rows = [
        (name, *facts) for name, directory in config.stages.items() for facts in _read_by(RunDirectory(directory))
    ]
    if rows:
        header = ("stage", "records", "made from", "left out, and why")
        parts.append(markdown(Table("Training data", header, tuple(rows))).rstrip("\n"))
    return "\n\n".join(parts)


def _read_by(run: RunDirectory) -> Iterator[tuple[str, str, str]]:
    """What a training run read, in words; what is not there any more, or is something else by now, is said."""
    settings = yaml.safe_load((run.path / CONFIG_FILE).read_text("utf-8"))
    made_from = read_made_from((run.description() or {}).get(MADE_FROM))
    for name in READS:
        if not isinstance(settings.get(name), str):
            continue
        path = Path(settings[name])
        kind = recorded_kind(path) if path.is_dir() else None
        if kind is None or not is_complete(path, kind):
            yield (f"{name}: not here any more", "", "")
        elif made_from is None or made_from.inputs.get(name) != content_of(path):
            yield (f"{name}: not what is there now", "", "")
        else:
            yield _in_words(read_manifest(path, kind))


def _in_words(manifest: Manifest) -> tuple[str, str, str]:
    counts = manifest.counts
    records = f"{manifest.rows:,} {manifest.kind}"
    if "documents" in counts:
        records += f": {counts['documents']:,} documents, {counts['tokens']:,} tokens"
    made_from = ", ".join(
        f"{count:,} {what.removeprefix('input: ')}" for what, count in counts.items() if what.startswith("input: ")
    )
    dropped = "; ".join(
        f"{count:,} {what.removeprefix(DROPPED)}" for what, count in counts.items() if what.startswith(DROPPED)
    )
    return records, made_from, dropped


def _measured(evaluations: Mapping[str, Evaluated]) -> str:
    """The tables of `phimr report` for these evaluations, the paper's where they hold one of its benchmarks."""
    benchmarks: dict[str, dict[str, Seeds]] = {}
    for name, found in evaluations.items():
        benchmarks.setdefault(found.benchmark, {})[name] = {found.seed: found.result}
    tables = [
        table
        for benchmark, models in benchmarks.items()
        for table in (score_table(benchmark, models), difference_table(benchmark, models))
        if table is not None
    ]
    ours = as_in_the_paper(benchmarks)
    if ours:
        tables.append(reference_table(ours))
    return "\n".join(
        f"### {markdown_text(table.title)}\n\n{markdown(table)}\n{markdown_text(table.note)}\n" for table in tables
    ).rstrip("\n")
