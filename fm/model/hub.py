"""A model in a repository of the Hugging Face Hub."""

import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import ModelHubMixin
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from data_pipeline.errors import UserError
from data_pipeline.files import inside

# Files that an upload may replace: cards, scores and pictures of another model must not stay in the repository.
UPLOADED = [
    *("README.md", "LICENSE", "artefact.json", "recipe.yaml", "scores.json"),
    *("cards/*", "pictures/*", "programs/*"),
]
_ADDRESS = re.compile(r"hf://([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?/?")


def download(address: str) -> Path:
    """Return the local folder of `hf://organization/name[@revision]`, fetched if it was not fetched before.

    FileNotFoundError where the repository or revision does not exist, ConnectionError where the Hub cannot be reached
    and nothing was fetched before, ValueError for an address of another form.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise ValueError(
            f"{address}: expected an address such as hf://organization/name or hf://organization/name@main"
        )
    repository, revision = match.groups()
    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision))
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise FileNotFoundError(
            f"{address}: no such repository or revision at {huggingface_hub.constants.ENDPOINT}, or it is private: "
            "look at the name, or log in with `hf auth login`"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ConnectionError(
            f"{address}: {huggingface_hub.constants.ENDPOINT} cannot be reached, and this model was not fetched before "
            f"({type(error).__name__}). Fetch it where there is a network, and give the folder instead."
        ) from error


class HubFolder(ModelHubMixin):
    """A model's folder for huggingface_hub's `push_to_hub`, which makes the repository and uploads.

    The models themselves do not inherit the mixin: it would write its own config.json and model card, and load models
    without the checks above.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save_pretrained(self, save_directory: Path | str, **options: Any) -> None:
        """Copy the folder. `options` are a configuration and a card, which the folder has."""
        shutil.copytree(self.folder, save_directory, dirs_exist_ok=True)


def upload(folder: Path, repository: str, **options: Any) -> str:
    """Make `organization/name` hold a model's folder, and return the commit's address.

    Files of an earlier upload that the folder does not have are deleted. `options` are those of
    ModelHubMixin.push_to_hub. ValueError for a name of another form or a link out of the folder, ConnectionError where
    the Hub refuses the upload.
    """
    try:
        for path in folder.rglob("*"):
            inside(folder, path.relative_to(folder))
        return str(HubFolder(folder).push_to_hub(repository, **{"delete_patterns": UPLOADED, **options}))
    except ValueError:
        raise
    except UserError as error:  # a link out of the folder
        raise ValueError(str(error)) from error
    except Exception as error:  # the classes depend on the HTTP client of huggingface_hub's version
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConnectionError(
            f"{repository}: {huggingface_hub.constants.ENDPOINT} did not take the upload ({reason}). Look at the "
            "network, the name, and whether you are logged in (`hf auth login`) and may write there."
        ) from error
