"""A release goes to the Hugging Face hub. The token comes from the environment (HF_TOKEN) or from the file that
`huggingface-cli login` wrote, and is handed to huggingface_hub alone: no setting holds it and no message names it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from phimr_nemo.errors import UserError

CARD_FILE: Final = "README.md"
ANSWER_SECONDS: Final = 60.0
NOT_ITS_ADDRESS: Final = "Unable to retrieve user and repo ID"
"""How huggingface_hub says that a hub has answered with an address that is not below HF_ENDPOINT."""
FIRST_ERROR: Final = 400
"""HTTP statuses from here on are errors."""


def check_hub(repository: str) -> None:
    """Refuse early what the hub would refuse after hours of work.

    Args:
        repository: "organisation/name".

    Raises:
        UserError: an impossible name, or no token.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise _bad_name(repository) from error
    if repository.count("/") != 1:
        raise _bad_name(repository)
    if get_token() is None:
        raise UserError(
            "no token of the Hugging Face hub",
            rule="an upload needs one that may write to the repository",
            remedy="set HF_TOKEN in the environment, or run `huggingface-cli login`",
        )


def check_card(card: str, repository: str) -> None:
    """Ask the hub whether it takes a model card; it refuses an upload whose metadata it does not know.

    Args:
        card: the text of README.md, or its metadata alone.
        repository: where it is to go.

    Raises:
        UserError: it does not, or it cannot be reached.
    """
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.utils import build_hf_headers, get_session

    try:
        answer = get_session().post(
            f"{ENDPOINT}/api/validate-yaml",
            json={"content": card, "repoType": "model"},
            headers=build_hf_headers(),
            timeout=ANSWER_SECONDS,
        )
        messages = [str(error.get("message")) for error in answer.json().get("errors", ())]
    except (OSError, ValueError, AttributeError) as error:
        raise _refused(repository, type(error).__name__) from error
    if messages:
        raise UserError(
            f"the hub refuses the model card: {'; '.join(messages)}",
            rule="a card names licence and base model as the hub does",
            remedy="set licence=mit (or another identifier of the hub) and base_model=OWNER/NAME; a release that was "
            "made with other settings is made anew in another run.output",
        )
    if answer.status_code >= FIRST_ERROR:
        raise _refused(repository, f"HTTP status {answer.status_code}")


def push(directory: Path, repository: str, *, private: bool) -> str:
    """Upload a release as one commit; until the hub takes its card nothing is made there.

    Weights that an interrupted upload brought there are not sent again.

    Args:
        directory: what `phimr export` wrote.
        repository: "organisation/name"; made if it does not exist.
        private: whether a repository that is made here is private.

    Returns:
        The address of the commit; of the repository, where the hub gives one that is not its own.

    Raises:
        UserError: no token, an impossible name, a card that the hub does not take, the hub refuses or cannot be
            reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    check_hub(repository)
    check_card((directory / CARD_FILE).read_text("utf-8"), repository)
    api = HfApi()
    try:
        api.create_repo(repository, repo_type="model", private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository, repo_type="model", folder_path=directory, commit_message=f"Upload {directory.name}"
        )
    except HfHubHTTPError as error:
        status = "no answer" if error.response is None else f"HTTP status {error.response.status_code}"
        raise _refused(repository, status) from error
    except ValueError as error:
        if NOT_ITS_ADDRESS not in str(error):
            raise _refused(repository, str(error)) from error
        # The commit is made: what cannot be read is its address, where HF_ENDPOINT stands in front of another hub.
        return f"{api.endpoint}/{repository}"
    # What is below HTTP: no such host, connection lost. huggingface_hub also raises it around a failed upload.
    except (OSError, RuntimeError) as error:
        raise _refused(repository, f"{type(error).__name__}") from error
    return str(commit.commit_url)


def _bad_name(repository: str) -> UserError:
    return UserError(
        f"--push-to-hub {repository!r}",
        rule="a repository is named organisation/name: letters, digits, '-', '_', '.'",
        remedy="for example --push-to-hub my-team/phi-4-mini-reasoning",
    )


def _refused(repository: str, how: str) -> UserError:
    return UserError(
        f"the upload to {repository} did not succeed: {how}",
        rule="the hub can be reached and the token may write to the repository",
        remedy="check both and run the same command again; files that arrived are not sent again",
    )
