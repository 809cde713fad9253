"""The table of recipes: the README shows it, its presets exist, and a recipe is the command that a user types."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from phimr_nemo.cli.main import app
from phimr_nemo.config import STAGES, load_config
from phimr_nemo.store.runs import RunDirectory
from recipes import RECIPES, default_preset, phimr, recipe, table

REPOSITORY = Path(__file__).resolve().parents[2]
BASE = "base=models/b"


def test_the_readme_shows_the_table() -> None:
    assert table() in (REPOSITORY / "recipes" / "README.md").read_text("utf-8")


def test_every_stage_has_a_recipe_and_every_recipe_is_a_command() -> None:
    # The tiny base is made for the quickstart alone.
    assert set(RECIPES) - {"quickstart"} == set(STAGES) - {"base"}
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output
    for name, row in RECIPES.items():
        assert f" {name} " in shown
        assert (REPOSITORY / default_preset(name)).is_file()
        assert (REPOSITORY / "slurm" / row.script).is_file()


@pytest.mark.parametrize("stage", ["midtrain", "sft", "dpo", "grpo"])
def test_the_gpus_of_the_table_are_the_presets(stage: str) -> None:
    parallel = load_config(STAGES[stage], REPOSITORY / default_preset(stage), [BASE]).parallel
    nodes, gpus = map(int, RECIPES[stage].gpus.split(" x "))
    assert (parallel.nodes, parallel.world_size) == (nodes, nodes * gpus)


def test_a_recipe_can_be_shipped_and_runs_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

    monkeypatch.chdir(REPOSITORY)
    task = recipe("generate", "conf/generate/tiny.yaml", [f"run.output={tmp_path / 'a b'}", "problems.count=2"])
    serializer = ZlibJSONSerializer()
    shipped = serializer.deserialize(serializer.serialize(task))
    assert shipped == task
    shipped.__fn_or_cls__(**{name: getattr(shipped, name) for name in ("arguments",)})
    assert RunDirectory(tmp_path / "a b").closing_facts()["rows"] > 0


def test_a_recipe_that_is_refused_ends_as_the_command_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        phimr(["sft", "--config", "no-such.yaml"])
    assert ended.value.code == 2
    assert "no-such.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("factory", "named"),
    [
        (
            "phi4mini_midtrain(base={tmp},data={tmp}/absent,config={tiny},accelerator=cpu)",
            "absent does not exist",
        ),
        ("phi4mini_no_such()", "phi4mini_no_such"),
    ],
    ids=["no data", "no such recipe"],
)
def test_nemo_runs_command_line_ends_with_2_for_a_users_mistake(factory: str, named: str, tmp_path: Path) -> None:
    tiny = REPOSITORY / "conf" / "midtrain" / "tiny.yaml"
    words = ["--yes", "--factory", factory.format(tmp=tmp_path, tiny=tiny)]
    done = subprocess.run(
        [sys.executable, "-m", "recipes", *words], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    # Rich breaks lines where it likes.
    assert named in (done.stdout + done.stderr).replace("\n", "")
