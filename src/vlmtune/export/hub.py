"""Upload a folder to the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from vlmtune.errors import ConfigError, StorageError
from vlmtune.export.options import Options

NAME = re.compile(r"([\w.-]{1,96}/)?[\w.-]{1,96}")


def client() -> Any:
    from huggingface_hub import HfApi

    return HfApi()


def check(options: Options) -> None:
    """Raise ConfigError where an upload can't work, before hours are spent on what it would upload."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    if options.push_to_hub is None:
        return
    key = f"push_to_hub={options.push_to_hub}"
    if not NAME.fullmatch(options.push_to_hub):
        raise ConfigError(f"{key}: must be OWNER/NAME, of letters, digits, dots, dashes and underscores")
    try:
        client().whoami()
    except LocalTokenNotFoundError as error:
        raise ConfigError(f"{key}: needs a login: `hf auth login`, or HF_TOKEN") from error
    except HfHubHTTPError as error:
        raise ConfigError(f"{key}: the hub refuses the login: {_reason(error)}") from error
    except OSError as error:
        raise ConfigError(
            f"{key}: the hub can't be reached ({_reason(error)}); leave it out and upload later"
        ) from error


def push(folder: Path, options: Options) -> str | None:
    """Upload `folder` to the repository of `push_to_hub`, made private if it is new. Returns its address.

    Raises StorageError where the hub refuses; the folder stays.
    """
    if options.push_to_hub is None:
        return None
    try:
        api = client()
        made = api.create_repo(options.push_to_hub, private=not options.public, repo_type="model", exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=str(folder), commit_message="Merged by vlmtune")
    except OSError as error:  # those of huggingface_hub are
        again = f"hf upload {options.push_to_hub} {options.output}"
        raise StorageError(f"push_to_hub: {_reason(error)}; {options.output} is written; try again: {again}") from error
    return str(made)


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
