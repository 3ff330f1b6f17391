"""The Hugging Face hub: an export goes there as a model, and comes from there by that model's name.

The token is huggingface_hub's own affair: HF_TOKEN, or what `hf auth login` has stored. Nothing here reads it.
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

#: A name on the hub: of who owns the model, and of the model.
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def located(model: epath.PathLike, revision: str | None = None) -> epath.Path:
    """Returns the folder of an export: `model` itself where there is such a folder, else what the hub has of that name.

    revision: branch, tag or commit there. Raises ExportError, in one sentence, for what cannot be had.
    """
    if epath.Path(model).exists() or not _NAME.fullmatch(str(model)):
        return epath.Path(model)
    return download(str(model), revision)


def download(name: str, revision: str | None = None) -> epath.Path:
    """Returns the folder in huggingface_hub's cache that holds an export, every file as its SHA256SUMS says.

    What is in the cache is not fetched again, and is found without a network. A damaged file is removed from it.
    """
    client = _client()
    with _sentences(name, revision):
        # Not hf_hub_download, which without a network tries for 24 s.
        commit = epath.Path(client.snapshot_download(name, revision=revision, allow_patterns=SUMS))
        if not (commit / SUMS).exists():
            raise ExportError(f"{name} has no {SUMS}: it is not an export, which `geotoken export --push` brings there")
        wanted = bundle.sums(commit)
        # Of one commit, whatever is pushed meanwhile; and nothing that the sums do not know.
        patterns = [SUMS, *(glob.escape(file) for file in wanted)]
        folder = epath.Path(client.snapshot_download(name, revision=commit.name, allow_patterns=patterns))
    for file, expected in wanted.items():
        path = folder / file
        if not path.exists():
            raise ExportError(f"{name} lacks {file}, which its {SUMS} has: whoever pushed it should push it again")
        if bundle.sha256(path) != expected:
            os.unlink(os.path.realpath(path))  # the cache holds it once, and links to it by commit
            path.unlink(missing_ok=True)
            raise ExportError(
                f"{name}: {file} is not what its {SUMS} says: it was cut short or changed, on the way or on the hub; "
                "the same command downloads it again"
            )
    return folder


def push(folder: epath.PathLike, name: str) -> str:
    """Brings a whole export to the hub, where the model is made if there is none, and returns its address.

    What the hub has already is not sent again, so an interrupted push goes on. Raises ExportError.
    """
    if not _NAME.fullmatch(name):
        raise settings.SettingsError(f"--push={name} is not a name on the hub: give ORG/NAME, as in --push=me/geotoken")
    bundle.check(folder, everything=True)
    client = _client()
    files = [SUMS, *bundle.sums(folder)]
    with _sentences(name, None):
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
        raise settings.SettingsError("the hub is spoken to by huggingface_hub: pip install huggingface_hub") from None
    return huggingface_hub


@contextlib.contextmanager
def _sentences(name: str, revision: str | None) -> Iterator[None]:
    """Says in one sentence what the hub or the network refuses."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{name}"
    broken: Any = errors.HfHubHTTPError.__bases__  # the HTTP client's errors, and the machine's
    login = "log in with `hf auth login`, or set HF_TOKEN to a token that may"
    try:
        yield
    except errors.GatedRepoError:
        raise ExportError(f"{name} is gated: accept its terms at {page}, and {login} read it") from None
    except errors.RepositoryNotFoundError:
        raise ExportError(
            f"{name} is neither a folder here nor a model on the hub that you may see: name a folder that `geotoken "
            f"export` made, or, if it is private, {login} read it"
        ) from None
    except errors.RevisionNotFoundError:
        raise ExportError(f"{page} has no revision {revision!r}: name a branch, a tag or a commit of it") from None
    except errors.LocalEntryNotFoundError:
        raise ExportError(
            f"{constants.ENDPOINT} cannot be reached, and {name} is not in the cache whole: look at the network, and "
            "whether HF_HUB_OFFLINE is set"
        ) from None
    except errors.HFValidationError as error:
        raise ExportError(f"{name} is not a name on the hub: {error}") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise ExportError(f"the hub refuses {name} ({status}): {login} write to it") from None
        raise ExportError(f"the hub answers {status} about {name}: try again later") from None
    except RuntimeError as error:  # one file of an upload
        raise ExportError(f"{error} The same command goes on from there") from None
    except broken as error:
        raise ExportError(
            f"{name} could not be brought all the way ({error}): look at the network and the disk, and run the same "
            "command again"
        ) from None
