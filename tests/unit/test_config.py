"""Configs load into frozen dataclasses, and every mistake in one is named."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from phimr_nemo.config import (
    CurateConfig,
    EvaluateConfig,
    ExportConfig,
    FileProblems,
    GenerateConfig,
    GRPOConfig,
    ModelTeacher,
    PrepareConfig,
    ProgrammaticTeacher,
    RecordedTeacher,
    SFTConfig,
    SyntheticProblems,
    VerifyConfig,
    find_config,
    load_config,
    parse_config,
    to_dict,
    to_yaml,
)
from phimr_nemo.errors import UserError

VERIFY: dict[str, Any] = {
    "run": {"output": "out", "seed": 3},
    "rollouts": "in",
    "workers": 2,
    "deadline_seconds": 5,
}
GENERATE: dict[str, Any] = {
    "run": {"output": "out", "seed": 3},
    "problems": {"kind": "synthetic", "count": 10, "split": "train"},
    "teacher": {"kind": "programmatic", "mistake_rate": 0.25},
    "rollouts_per_problem": 2,
    "shard_size": 5,
}


@pytest.fixture
def verify_file(tmp_path: Path) -> Path:
    path = tmp_path / "verify.yaml"
    path.write_text(yaml.safe_dump(VERIFY))
    return path


@pytest.fixture
def generate_file(tmp_path: Path) -> Path:
    path = tmp_path / "generate.yaml"
    path.write_text(yaml.safe_dump(GENERATE))
    return path


def problem(schema: type, path: Path | None, *overrides: str) -> str:
    """What the user is told is wrong, without rule and remedy."""
    with pytest.raises(UserError) as caught:
        load_config(schema, path, overrides)
    return caught.value.problem


def test_file_and_overrides_fill_typed_fields(verify_file: Path) -> None:
    config = load_config(VerifyConfig, verify_file, ["workers=7", "run.seed=11", "rollouts=a/b"])
    assert (config.workers, config.run.seed, config.rollouts) == (7, 11, Path("a/b"))
    assert config.run.output == Path("out")
    assert isinstance(config.deadline_seconds, float)  # the file holds the integer 5
    assert (config.shard.index, config.shard.count) == (0, 1)  # defaults of the schema


def test_the_last_of_two_overrides_counts(verify_file: Path) -> None:
    assert load_config(VerifyConfig, verify_file, ["workers=7", "workers=8"]).workers == 8


def test_overrides_alone_make_a_config() -> None:
    overrides = ["run.output=out", "run.seed=3", "rollouts=in", "workers=2", "deadline_seconds=5"]
    assert load_config(VerifyConfig, None, overrides) == parse_config(VerifyConfig, VERIFY)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("wokers=3", "unknown key 'wokers' (did you mean workers?)"),
        ("run.sed=3", "run.seed"),
        ("shard.cuont=3", "shard.count"),
        ("qqqqqq=3", "unknown key 'qqqqqq'"),
    ],
)
def test_unknown_key_is_named_with_what_may_have_been_meant(verify_file: Path, override: str, expected: str) -> None:
    message = problem(VerifyConfig, verify_file, override)
    assert expected in message
    assert f"unknown key {override.partition('=')[0]!r}" in message
    # Nothing resembles it: no suggestion is better than a wild one.
    assert ("did you mean" in message) == (not override.startswith("q"))


def test_every_mistake_is_listed_at_once(verify_file: Path) -> None:
    message = problem(VerifyConfig, verify_file, "wokers=3", "deadline_seconds=soon", "run.seed=-1")
    assert all(part in message for part in ("wokers", "deadline_seconds='soon'", "run.seed=-1"))


@pytest.mark.parametrize(
    "override",
    [
        "workers=two",
        "workers=2.5",
        "workers=null",
        "workers=[1]",
        "run.seed={a: 1}",
        "deadline_seconds=soon",
        "run=5",
    ],
)
def test_wrong_type_names_key_and_value(verify_file: Path, override: str) -> None:
    key = override.partition("=")[0]
    assert problem(VerifyConfig, verify_file, override).startswith(f"{key}=")


@pytest.mark.parametrize("override", ["workers=0", "workers=-1", "run.seed=-1", "shard.count=0", "shard.index=-1"])
def test_a_number_out_of_range_names_key_and_value(verify_file: Path, override: str) -> None:
    assert override in problem(VerifyConfig, verify_file, override)


@pytest.mark.parametrize(
    "override", ["parallel.tensor=0", "parallel.pipeline=-2", "micro_batch=0", "global_batch=0", "epochs=0"]
)
def test_a_layout_or_batch_of_nothing_is_refused(override: str) -> None:
    assert override in problem(SFTConfig, Path("conf/sft/tiny.yaml"), override)


@pytest.mark.parametrize("key", ["run", "rollouts", "workers", "deadline_seconds"])
def test_missing_value_is_named(tmp_path: Path, key: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in VERIFY.items() if name != key}))
    assert problem(VerifyConfig, path) == f"{key!r} is not given"


def test_a_value_that_a_preset_leaves_open_is_missing_until_it_is_given(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**VERIFY, "rollouts": "???"}))
    assert problem(VerifyConfig, path) == "'rollouts' is not given"
    assert load_config(VerifyConfig, path, ["rollouts=in"]) == parse_config(VerifyConfig, VERIFY)


@pytest.mark.parametrize("override", ["workers", "--workers=3", "-w=3", "workers=[1", "a b"])
def test_malformed_override_is_refused(verify_file: Path, override: str) -> None:
    problem(VerifyConfig, verify_file, override)


def test_an_override_reaches_into_a_list(tmp_path: Path) -> None:
    preset = tmp_path / "prepare.yaml"
    listed = "sources:\n  - {name: mine, path: a.jsonl, question: q}\n  - {name: yours, path: z.jsonl}\n"
    preset.write_text(f"run: {{output: out, seed: 0}}\nshard_size: 10\n{listed}")

    def sources(*overrides: str) -> list[tuple[str, str, str | None]]:
        config: Any = load_config(PrepareConfig, preset, overrides)
        return [(source.name, source.path, source.question) for source in config.sources]

    last = ("yours", "z.jsonl", None)
    assert sources("sources.0.path=b.jsonl", "sources.0.question=null") == [("mine", "b.jsonl", None), last]
    assert sources("sources.1={path: b.jsonl}") == [("mine", "a.jsonl", "q"), ("yours", "b.jsonl", None)]
    # A list that an override gives counts, and what is inside it may be changed as well.
    whole = "sources=[{name: mine, path: b.jsonl}]"
    assert sources(whole) == [("mine", "b.jsonl", None)]
    assert sources(whole, "sources.0.path=c.jsonl") == [("mine", "c.jsonl", None)]
    for place in ("sources.2.path=b.jsonl", "sources.first.path=b.jsonl", "sources.-3.path=b.jsonl"):
        with pytest.raises(UserError, match="names no place in the list sources") as caught:
            sources(place)
        assert "2 entries are counted from 0" in caught.value.rule


@pytest.mark.parametrize(("encoding", "remedy"), [("utf-8", "rename"), ("ascii", "PYTHONUTF8=1")])
def test_bytes_that_are_no_letters_are_named_with_what_helps(
    encoding: str, remedy: str, verify_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Latin-1 name in UTF-8, any name where Python was told to read arguments as ASCII."""
    monkeypatch.setattr("sys.getfilesystemencoding", lambda: encoding)
    given = b"run.output=runs/\xf6".decode("ascii", "surrogateescape")
    with pytest.raises(UserError, match=f"no {encoding} text") as caught:
        load_config(VerifyConfig, verify_file, [given])
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b"run: [1\n", "line 1"),
        (b"run: {output: o, seed: 1}\nworkers: 1\nworkers: 2\n", "line 3"),
        (b"- a\n- b\n", "ListConfig"),
        (b"5\n", "int"),
        (b"\xff\xfe\x00", "0xff"),
        (b"workers: \x00", "#x0000"),
        (b"workers: ${oc.env:NO_SUCH_VARIABLE_HERE}", "NO_SUCH_VARIABLE_HERE"),
    ],
)
def test_malformed_file_is_named_with_the_place(tmp_path: Path, content: bytes, place: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    message = problem(VerifyConfig, path)
    assert str(path) in message
    assert place in message


def test_yaml_makes_no_objects(tmp_path: Path) -> None:
    path, proof = tmp_path / "hostile.yaml", tmp_path / "proof"
    path.write_text(f"run: !!python/object/apply:os.mkdir ['{proof}']\n")
    problem(VerifyConfig, path)
    assert not proof.exists()


def test_missing_file_lists_its_siblings(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_config(VerifyConfig, Path("conf/verify/nano.yaml"))
    assert "conf/verify/nano.yaml" in caught.value.problem
    assert "tiny.yaml" in caught.value.remedy
    assert "paper.yaml" in caught.value.remedy


def test_a_file_of_the_working_directory_comes_before_the_source_trees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    name = Path("conf/verify/tiny.yaml")
    assert find_config(name).samefile(repository / name)
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text(yaml.safe_dump(VERIFY))
    assert load_config(VerifyConfig, name).run.output == Path("out")


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({"kind": "programmatic", "mistake_rate": 0.5}, ProgrammaticTeacher),
        ({"kind": "recorded", "path": "f.jsonl"}, RecordedTeacher),
        (
            {
                "kind": "model",
                "path": "hf",
                "engine": {"kind": "local", "dtype": "bf16"},
                "temperature": 1,
                "top_p": 1,
                "max_new_tokens": 9,
            },
            ModelTeacher,
        ),
    ],
)
def test_kind_chooses_the_dataclass(values: dict[str, Any], kind: type) -> None:
    config = parse_config(GenerateConfig, {**GENERATE, "teacher": values})
    assert type(config.teacher) is kind
    assert {**to_dict(config)["teacher"], "engine": None}.items() >= {**values, "engine": None}.items()


def test_unknown_kind_lists_the_known_ones(generate_file: Path) -> None:
    message = problem(GenerateConfig, generate_file, "teacher.kind=oracle")
    assert all(kind in message for kind in ("oracle", "programmatic", "recorded", "model"))


def test_another_kind_drops_what_the_file_says_of_the_first(generate_file: Path) -> None:
    overrides = ["teacher.kind=recorded", "teacher.path=f.jsonl", "problems.kind=file", "problems.path=p.jsonl"]
    for order in (overrides, overrides[::-1]):
        config = load_config(GenerateConfig, generate_file, order)
        assert config.teacher == RecordedTeacher(kind="recorded", path=Path("f.jsonl"))
        assert config.problems == FileProblems(kind="file", path=Path("p.jsonl"))
        assert config.rollouts_per_problem == GENERATE["rollouts_per_problem"]


def test_the_same_kind_keeps_what_the_file_says(generate_file: Path) -> None:
    config = load_config(GenerateConfig, generate_file, ["problems.kind=synthetic", "problems.count=4"])
    assert config.problems == SyntheticProblems(kind="synthetic", count=4, split="train")


def test_a_section_can_be_left_out(generate_file: Path) -> None:
    overrides = ["problems=null", "teacher.kind=recorded", "teacher.path=f.jsonl"]
    assert load_config(GenerateConfig, generate_file, overrides).problems is None


def test_a_key_in_a_union_is_named_as_it_is_written(generate_file: Path) -> None:
    message = problem(GenerateConfig, generate_file, "problems.cuont=3")
    assert message.startswith("unknown key 'problems.cuont' (did you mean problems.count")
    assert problem(GenerateConfig, generate_file, "problems.count=many").startswith("problems.count='many'")
    # mistake_rate belongs to another teacher.
    message = problem(GenerateConfig, generate_file, "teacher.kind=recorded", "teacher.mistake_rate=0.1")
    assert "'teacher.path' is not given" in message
    assert "unknown key 'teacher.mistake_rate'" in message
    assert "did you mean teacher.mistake_rate" not in message


CONFIGS = [
    parse_config(VerifyConfig, VERIFY),
    parse_config(GenerateConfig, GENERATE),
    parse_config(
        EvaluateConfig,
        {
            "run": {"output": "o", "seed": 0},
            "model": "hf",
            "problems": {"kind": "file", "path": "p.jsonl"},
            "samples": 1,
            # Text that YAML would read as something else, and the paper's own braces and backslash.
            "prompt": "yes: 'no' #1 \\boxed{}. {question}\n- ünïcödé",
            "temperature": 1e-7,
            "top_p": 1,
            "max_new_tokens": 1,
            "engine": {"kind": "local", "max_batch": 1, "dtype": "fp32"},
            "shard_questions": 1,
        },
    ),
    parse_config(
        CurateConfig,
        {
            "run": {"output": "2024", "seed": 0},
            "verdicts": "1e5",
            "workers": 1,
            "sft": {
                "difficulties": ["middle", "graduate"],
                "max_per_problem": 1,
                "max_repetition": 0.5,
                "one_boxed_answer": True,
            },
        },
    ),
    parse_config(
        ExportConfig,
        {
            "run": {"output": "o", "seed": 0},
            "model": "hf",
            "base_model": "null",
            "licence": "mit",
            "stages": {"SFT": "a", "1": "b"},
        },
    ),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_yaml_round_trip_through_a_file(config: Any, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(type(config), path) == config
    assert parse_config(type(config), to_dict(config)) == config


def assert_frozen(value: Any) -> None:
    for field in dataclasses.fields(value):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field.name, None)
        inner = getattr(value, field.name)
        if dataclasses.is_dataclass(inner):
            assert_frozen(inner)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_a_config_cannot_be_changed(config: Any) -> None:
    assert_frozen(config)


def test_every_section_is_keyword_only() -> None:
    with pytest.raises(TypeError):
        SyntheticProblems("synthetic", 1, "train")  # type: ignore[call-arg]


def test_loading_needs_no_torch(repository: Path) -> None:
    heavy = ("torch", "transformers", "nemo", "megatron")
    program = (
        "import sys; from pathlib import Path; from phimr_nemo.config import SFTConfig, load_config, to_yaml;"
        "print(to_yaml(load_config(SFTConfig, Path('conf/sft/tiny.yaml'), ['run.seed=4'])).count('seed: 4'),"
        f"[name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=repository, check=True)
    assert done.stdout.split(maxsplit=1) == ["1", "[]\n"]


def test_a_file_changes_what_it_extends(verify_file: Path) -> None:
    path = verify_file.with_name("more.yaml")
    path.write_text(yaml.safe_dump({"extends": verify_file.name, "workers": 7, "run": {"seed": 9}}))
    changed, below = load_config(VerifyConfig, path), load_config(VerifyConfig, verify_file)
    assert changed == dataclasses.replace(below, workers=7, run=dataclasses.replace(below.run, seed=9))
    assert load_config(VerifyConfig, path, ["workers=1"]).workers == 1


def test_a_file_may_choose_another_kind_than_what_it_extends(tmp_path: Path) -> None:
    """Nothing of the other kind stays: `cap` belongs to truncated weights alone."""
    (tmp_path / "tiny.yaml").write_text(Path("conf/grpo/tiny.yaml").read_text("utf-8"))
    changes = {"kind": "masked", "low": 0.5, "high": 5.0}
    below = yaml.safe_load((tmp_path / "tiny.yaml").read_text()) | {"correction": {"kind": "truncated", "cap": 2.0}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(below))
    (tmp_path / "more.yaml").write_text(yaml.safe_dump({"extends": "tiny.yaml", "correction": changes}))
    config = load_config(GRPOConfig, tmp_path / "more.yaml")
    assert to_dict(config)["correction"] == changes


@pytest.mark.parametrize("below", ["none.yaml", "more.yaml"])
def test_a_file_extends_one_plain_file(below: str, verify_file: Path) -> None:
    path = verify_file.with_name("more.yaml")
    path.write_text(yaml.safe_dump({"extends": below}))
    with pytest.raises(UserError, match=rf"more\.yaml extends .*{below}"):
        load_config(VerifyConfig, path)
