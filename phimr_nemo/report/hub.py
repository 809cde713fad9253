"""A release goes to the Hugging Face hub. The token comes from the environment (HF_TOKEN) or from the file that
`huggingface-cli login` wrote, and is handed to huggingface_hub alone: no setting holds it and no message names it."""

from __future__ import annotations

from pathlib import Path

from phimr_nemo.errors import UserError


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


def push(directory: Path, repository: str, *, private: bool) -> str:
    """Upload a release as one commit. Weights that an interrupted upload brought there are not sent again.

    Args:
        directory: what `phimr export` wrote.
        repository: "organisation/name"; made if it does not exist.
        private: whether a repository that is made here is private.

    Returns:
        The address of the commit.

    Raises:
        UserError: no token, an impossible name, the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    check_hub(repository)
    api = HfApi()
    try:
        api.create_repo(repository, repo_type="model", private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository, repo_type="model", folder_path=directory, commit_message=f"Upload {directory.name}"
        )
    except HfHubHTTPError as error:
        status = "no answer" if error.response is None else f"HTTP status {error.response.status_code}"
        raise _refused(repository, status) from error
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
