"""A link in a model directory is not followed out of it; the hub's own cache is made of links and is read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from phimr_nemo.errors import UserError
from phimr_nemo.model.architecture import CONFIG_FILE
from phimr_nemo.model.files.companions import TOKENIZER_FILES
from phimr_nemo.store.links import refuse_links_out


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "models--a--b" / "snapshots" / "0123"
    directory.mkdir(parents=True)
    for name in (CONFIG_FILE, "tokenizer.json", "model.safetensors"):
        (directory / name).write_text(name)
    return directory


@pytest.mark.parametrize("name", [*TOKENIZER_FILES, CONFIG_FILE, "model.safetensors", "generation_config.json"])
@pytest.mark.parametrize("how", ["absolute", "relative", "through a link", "to nothing", "a directory"])
def test_a_link_out_is_refused(name: str, how: str, model: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("key")
    (model / name).unlink(missing_ok=True)
    if how == "through a link":
        (model / "inner").symlink_to(secret)
    target = {
        "absolute": secret,
        "relative": Path(os.path.relpath(secret, model)),
        "through a link": Path("inner"),
        "to nothing": tmp_path / "nothing",
        "a directory": tmp_path,
    }[how]
    (model / name).symlink_to(target)
    with pytest.raises(UserError, match="outside its directory"):
        refuse_links_out(model)


def test_links_within_and_of_the_hubs_cache_are_read(model: Path, tmp_path: Path) -> None:
    (model / "vocab.json").symlink_to("tokenizer.json")
    blobs = model.parent.parent / "blobs"
    blobs.mkdir()
    (blobs / "abc").write_text("{}")
    (model / "merges.txt").symlink_to("../../blobs/abc")
    refuse_links_out(model)
    (tmp_path / "mine").symlink_to(model)
    refuse_links_out(tmp_path / "mine")
    # Elsewhere such a directory has no meaning.
    other = tmp_path / "other"
    other.mkdir()
    (other / "merges.txt").symlink_to(blobs / "abc")
    with pytest.raises(UserError, match="outside its directory"):
        refuse_links_out(other)


def test_what_is_no_file_is_refused_and_not_waited_for(model: Path) -> None:
    os.mkfifo(model / "merges.txt")
    with pytest.raises(UserError, match="is no file"):
        refuse_links_out(model)
