"""Upload of exports to the Hugging Face hub, and download by the model's name there.

huggingface_hub finds the token itself, in HF_TOKEN or in the file that `hf auth login` writes. This module never reads
the token.
"""

import contextlib
import glob
import os
import re
from collections.abc import Iterator
from typing import Any

from etils import epath

from geotoken_jax import settings
from geotoken_jax.predict import bundle
from geotoken_jax.predict.bundle import SUMS, ExportError

#: Name of a model on the hub: ORG/NAME, where ORG is an organization or a user.
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve(model: epath.PathLike, revision: str | None = None) -> epath.Path:
    """Returns the folder of an export, downloaded from the hub if `model` is a name ORG/NAME and no path that exists.

    revision: branch, tag or commit on the hub; the main branch if None. Raises ExportError if the download fails.
    """
    if epath.Path(model).exists() or not _NAME.fullmatch(str(model)):
        return epath.Path(model)
    return download(str(model), revision)


def download(name: str, revision: str | None = None) -> epath.Path:
    """Returns the folder of an export in huggingface_hub's cache; every file in it matches SHA256SUMS.

    Files in the cache are not downloaded again and need no network. Raises ExportError if the download fails, or if a
    file is damaged; the damaged file is removed from the cache.
    """
    client = _client()
    with _one_line_errors(name, revision):
        # hf_hub_download would retry for 24 s when there is no network.
        commit = epath.Path(client.snapshot_download(name, revision=revision, allow_patterns=SUMS))
        if not (commit / SUMS).exists():
            raise ExportError(
                f"{name} has no {SUMS}: it is not an export; name a model that was uploaded by `geotoken export --push`"
            )
        sums = bundle.sums(commit)
        # The commit is fixed: without it, a push between the two downloads would mix two exports. Files without a sum
        # are not downloaded.
        patterns = [SUMS, *(glob.escape(file) for file in sums)]
        folder = epath.Path(client.snapshot_download(name, revision=commit.name, allow_patterns=patterns))
    for file, expected in sums.items():
        path = folder / file
        if not path.exists():
            raise ExportError(f"{name} lacks {file}, which is in its {SUMS}: ask its owner to push the export again")
        if bundle.sha256(path) != expected:
            os.unlink(os.path.realpath(path))  # the stored file; `path` is only a link to it
            path.unlink(missing_ok=True)
            raise ExportError(
                f"{name}: {file} does not match its sum in {SUMS}: it was damaged in transfer or changed on the hub; "
                "run the same command again, which downloads it again"
            )
    return folder


def push(folder: epath.PathLike, name: str) -> str:
    """Uploads an export to the hub, creates the model there if needed, and returns its address.

    Files that the hub already has are not sent again, so an interrupted push can be continued. Raises SettingsError if
    `name` is not ORG/NAME, ExportError if the export is damaged or the upload fails.
    """
    if not _NAME.fullmatch(name):
        raise settings.SettingsError(f"--push={name} is not of the form ORG/NAME: write it as in --push=me/geotoken")
    bundle.check(folder, everything=True)
    client = _client()
    files = [SUMS, *bundle.sums(folder)]
    with _one_line_errors(name, None):
        url = client.create_repo(name, exist_ok=True)
        client.upload_folder(
            repo_id=url.repo_id,
            folder_path=str(folder),
            allow_patterns=[glob.escape(file) for file in files],
            commit_message="Upload an export of geotoken-jax",
        )
    return str(url)


def _client() -> Any:
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise settings.SettingsError(
            "huggingface_hub is not installed, and the hub needs it: pip install huggingface_hub"
        ) from None
    return huggingface_hub


@contextlib.contextmanager
def _one_line_errors(name: str, revision: str | None) -> Iterator[None]:
    """Turns errors of the hub, the network and the disk into ExportErrors of one line, with advice."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{name}"
    broken: Any = errors.HfHubHTTPError.__bases__  # OSError, and the base class of the HTTP client's errors
    login = "log in with `hf auth login`, or set HF_TOKEN to a token that may"
    try:
        yield
    except errors.GatedRepoError:
        raise ExportError(f"{name} is gated: accept its terms at {page}, and {login} read it") from None
    except errors.RepositoryNotFoundError:
        raise ExportError(
            f"{name} is neither a folder here nor a model on the hub that you may read: check the name; if the model "
            f"is private, {login} read it"
        ) from None
    except errors.RevisionNotFoundError:
        raise ExportError(f"{page} has no revision {revision!r}: name a branch, a tag or a commit of it") from None
    except errors.LocalEntryNotFoundError:
        raise ExportError(
            f"{constants.ENDPOINT} cannot be reached, and {name} is not in the cache in full: check the network, and "
            "unset HF_HUB_OFFLINE if it is set"
        ) from None
    except errors.HFValidationError as error:
        raise ExportError(f"{name} breaks the hub's rules for names ({error}): correct the name") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise ExportError(f"the hub refuses {name} ({status}): {login} read it or, to push, write it") from None
        raise ExportError(f"the hub returned HTTP status {status} for {name}: try again later") from None
    except RuntimeError as error:  # a file could not be uploaded
        raise ExportError(
            f"the upload of {name} failed ({error}): run the same command again; files that were sent are not sent "
            "again"
        ) from None
    except broken as error:
        raise ExportError(
            f"the transfer of {name} failed ({error}): check the network and the free disk space, then run the same "
            "command again"
        ) from None
