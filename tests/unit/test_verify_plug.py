"""A grader of the user's own: it decides in the workers, under their limits, and only the configuration names it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from phimr_nemo.config import VerifyConfig, load_config
from phimr_nemo.errors import UserError
from phimr_nemo.jobs.composed import run_verify
from phimr_nemo.jobs.preflight import preflight
from phimr_nemo.store.shards import finish, read_table, rows_to_table, write_shard
from phimr_nemo.verify import GRADER_VERSION, Grader

MODULE = "the_users_domain"
SOURCE = '''
import os
from phimr_nemo.verify import Verdict

def grade(response, answer):
    """Right when the response's last word spells the answer backwards."""
    if "die" in response:
        os._exit(1)
    if "loop" in response:
        while True:
            pass
    if "raise" in response:
        raise KeyError("secret")
    if "late" in response:
        import difflib
    if "open" in response:
        open(__file__)
    if "nothing" in response:
        return True
    word = response.split()[-1] if response.split() else ""
    if not word:
        return Verdict("unparsable", "", "no word")
    return Verdict("correct" if word == answer[::-1] else "wrong", word, f"pid {os.getpid()}")

def three(a, b, c):
    return None
'''
SOFT_SECONDS = 0.5


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / f"{MODULE}.py").write_text(SOURCE, "utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.syspath_prepend(str(tmp_path))
    return f"{MODULE}:grade"


def test_the_users_function_decides_in_another_process(spec: str) -> None:
    """`1/2` and `0.5` are equal as numbers; to this grader they are words. Answers that break it harm no other."""
    with Grader(workers=1, function=spec, soft_seconds=SOFT_SECONDS) as grader:
        pairs = [
            *(("so abc", "cba"), ("so abc", "abc"), ("\\boxed{0.5}", "1/2"), ("", "x")),
            *(("loop", "x"), ("die", "x"), ("raise", "x"), ("nothing", "x"), ("again abc", "cba")),
        ]
        verdicts = grader.grade_many(pairs)
    assert [verdict.verdict for verdict in verdicts] == [
        *("correct", "wrong", "wrong", "unparsable"),
        *("timeout", "error", "error", "error", "correct"),
    ]
    assert verdicts[0].extracted == "abc"
    assert verdicts[0].reason != f"pid {os.getpid()}"
    assert "KeyError" in verdicts[6].reason
    assert "bool" in verdicts[7].reason


def test_a_grader_that_imports_or_opens_late_is_told_where_to_do_it(spec: str) -> None:
    with Grader(workers=1, function=spec) as grader:
        late, opens, other = grader.grade_many([("late", "x"), ("open", "x"), ("raise", "x")])
    assert [late.verdict, opens.verdict, other.verdict] == ["error"] * 3
    assert "difflib" in late.reason
    assert "at the top of the module" in late.reason
    assert "at the top of the module" in opens.reason
    assert "at the top" not in other.reason


def test_mathematics_is_the_default() -> None:
    with Grader(workers=1) as grader:
        assert grader.name == GRADER_VERSION
        assert grader.grade("\\boxed{0.5}", "1/2").verdict == "correct"


def test_an_edited_grader_is_another_one(spec: str, tmp_path: Path) -> None:
    before = Grader(function=spec).name
    assert Grader(function=spec).name == before
    (tmp_path / f"{MODULE}.py").write_text(SOURCE + "\n# changed\n", "utf-8")
    assert Grader(function=spec).name != before
    assert before.startswith(spec)


def test_the_stage_takes_it_from_the_configuration_alone(spec: str, tmp_path: Path) -> None:
    """A rollout whose metadata names a grader is graded by mathematics all the same."""
    text = dict.fromkeys(("question", "teacher", "domain"), "")
    row = {
        **text,
        "id": "1",
        "problem_id": "1",
        "response": "so \\boxed{12}",
        "answer": "}21{dexob\\",
        "sample_index": 0,
        "seed": 0,
        "finish_reason": "stop",
        "tokens": 1,
        "difficulty": None,
        "metadata": f'{{"grader": "{spec}"}}',
    }
    write_shard(tmp_path / "rollouts", 0, rows_to_table([row], "rollouts"), kind="rollouts")
    finish(tmp_path / "rollouts", kind="rollouts", config={}, counts={})
    found = {}
    for name, override in (("own", f"grader={spec}"), ("mathematics", "grader=null")):
        settings = [f"run.output={tmp_path / name}", f"rollouts={tmp_path / 'rollouts'}", "workers=1", override]
        run_verify(load_config(VerifyConfig, Path("conf/verify/tiny.yaml"), settings))
        (graded,) = read_table(tmp_path / name, "verdicts").to_pylist()
        found[name] = (graded["verdict"], graded["grader"])
    assert found["own"] == ("correct", Grader(function=spec).name)
    assert found["mathematics"][0] != "correct"
    assert found["mathematics"][1] == GRADER_VERSION


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("no_such_module_at_all:grade", "there is no module"),
        (f"{MODULE}:missing", "no function missing"),
        (f"{MODULE}:three", "missing a required argument"),
        ("os.system('true'):grade", "MODULE:FUNCTION"),
        ("grade", "MODULE:FUNCTION"),
    ],
)
def test_a_grader_that_cannot_be_had_is_refused_before_the_work(
    spec: str, tmp_path: Path, named: str, told: str
) -> None:
    assert spec
    write_shard(tmp_path / "rollouts", 0, rows_to_table([], "rollouts"), kind="rollouts")
    finish(tmp_path / "rollouts", kind="rollouts", config={}, counts={})
    settings = [f"run.output={tmp_path / 'out'}", f"rollouts={tmp_path / 'rollouts'}", f'grader="{named}"']
    with pytest.raises(UserError, match=told):
        preflight("verify", load_config(VerifyConfig, Path("conf/verify/tiny.yaml"), settings))
