"""Finds the files of a model: a local folder, or a download from the Hugging Face hub by the model's name there.

The package huggingface_hub downloads the files. It reads the environment variables HF_ENDPOINT (address of the hub),
HF_HOME (folder of the cache), HF_HUB_OFFLINE (if set, use only the cache) and HF_TOKEN (access token). Without
HF_TOKEN, it reads the token from the file that `hf auth login` writes. This module never reads the token.
"""

import contextlib
import dataclasses
import fnmatch
import hashlib
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tqdm
from etils import epath

from geotoken_jax.settings import SettingsError

#: Name of a model on the hub, ORG/NAME, where ORG is an organization or a user; then, optionally, an @ and a branch, a
#: tag or a commit.
_REFERENCE = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>\S+))?")
#: The cache names a file by its hash: SHA-256 (64 digits) for a large file, git's SHA-1 (40 digits) for any other file.
#: Length of the name -> function from the file's size to the bytes that are hashed before the contents, and algorithm.
_HASHES: dict[int, tuple[Callable[[int], bytes], Callable[..., Any]]] = {
    64: (lambda size: b"", hashlib.sha256),
    40: (lambda size: b"blob %d\0" % size, hashlib.sha1),
}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of model on the hub, such as exports.

    first: name of a file that every such model has; it is downloaded first. lacking: end of the error message if a
    model lacks this file. patterns: function that returns the names, or glob patterns, of all files to download. Its
    arguments are the model's name, for messages, and the folder with the file `first`. It raises SettingsError if the
    model cannot be used. has_sums: whether the caller compares the files with checksums of its own. Then only the file
    `first` is compared with its hash on the hub.
    """

    first: str
    lacking: str
    patterns: Callable[[str, epath.Path], Sequence[str]]
    has_sums: bool = False


def resolve(model: epath.PathLike, kind: Kind, revision: str | None = None) -> epath.Path:
    """Returns the path of a model: `model` itself if this path exists, else the model's folder in the hub's cache.

    Files that the cache has are not downloaded again, and need no network. Files are compared with their hashes on the
    hub (see Kind.has_sums).

    model: local path, or name on the hub, ORG/NAME or ORG/NAME@REVISION. revision: branch, tag or commit on the hub; it
    replaces the REVISION in `model`. Without both, the main branch is used.

    Raises SettingsError if there is neither such a path nor such a model, or if the download fails.
    """
    path = epath.Path(model)
    if path.exists():
        return path
    reference = _REFERENCE.fullmatch(os.fspath(model))
    if not reference:
        raise SettingsError(
            f"there is no file or folder {model}: correct the path, or name a model on the Hugging Face hub, as "
            "ORG/NAME or ORG/NAME@REVISION"
        )
    return _download(reference["name"], revision or reference["revision"], kind)


def is_name(text: str) -> bool:
    """Returns whether a text is a name on the hub, ORG/NAME, without a revision."""
    reference = _REFERENCE.fullmatch(text)
    return bool(reference) and reference["revision"] is None


def pinned(folder: epath.PathLike) -> str | None:
    """Returns the name ORG/NAME@COMMIT of a model in the hub's cache, or None if the folder is not in the cache.

    The folder of a model in the cache is models--ORG--NAME/snapshots/COMMIT.
    """
    *_, model, snapshots, commit = ("", "", "", *pathlib.Path(folder).absolute().parts)
    if not model.startswith("models--") or snapshots != "snapshots":
        return None
    return f"{'/'.join(model.split('--')[1:])}@{commit}"


def client() -> Any:
    """Returns the module huggingface_hub. Raises SettingsError if it is not installed."""
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise SettingsError(
            "huggingface_hub is not installed, and the hub needs it: pip install huggingface_hub"
        ) from None
    return huggingface_hub


def _download(name: str, revision: str | None, kind: Kind) -> epath.Path:
    snapshot = client().snapshot_download
    with one_line_errors(name, revision):
        # hf_hub_download would retry for 24 s when there is no network.
        folder = epath.Path(snapshot(name, revision=revision, allow_patterns=[kind.first], tqdm_class=_Hidden))
    if not (folder / kind.first).exists():
        raise SettingsError(f"{name} has no {kind.first}: {kind.lacking}")
    _check_hashes(name, folder, [kind.first])
    # The second download names the commit of the first. Otherwise, after a push in between, versions would be mixed.
    commit, patterns = folder.name, [kind.first, *kind.patterns(name, folder)]
    with one_line_errors(name, commit), _reported(name, commit, patterns) as bar:
        snapshot(name, revision=commit, allow_patterns=patterns, tqdm_class=bar)
    if not kind.has_sums:
        _check_hashes(name, folder, patterns)
    return folder


def _check_hashes(name: str, folder: epath.Path, patterns: Sequence[str]) -> None:
    """Compares files in the cache with the hub's hashes. Raises SettingsError for a damaged file, which is removed."""
    for path in sorted(pathlib.Path(folder).rglob("*")):
        file = path.relative_to(folder).as_posix()
        if path.is_file() and any(fnmatch.fnmatchcase(file, pattern) for pattern in patterns) and _damaged(path):
            remove(path)
            raise SettingsError(
                f"{name}: {file} does not match its hash on the hub: it was damaged in transfer or on the disk; run "
                "the same command again, which downloads it again"
            )


def _damaged(path: pathlib.Path) -> bool:
    """Returns whether the contents of a file in the cache do not match its hash.

    In a cache without links, file names are no hashes, and nothing is compared.
    """
    stored = pathlib.Path(os.path.realpath(path))
    if stored.name == path.name or len(stored.name) not in _HASHES:
        return False
    prefix, algorithm = _HASHES[len(stored.name)]
    with stored.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: algorithm(prefix(stored.stat().st_size), usedforsecurity=False))
    return digest.hexdigest() != stored.name


def remove(path: epath.PathLike) -> None:
    """Removes a file from the cache. Its next use downloads it again."""
    os.unlink(os.path.realpath(path))  # the stored file; `path` is only a link to it
    pathlib.Path(path).unlink(missing_ok=True)


class _Hidden(tqdm.tqdm):
    """A progress bar that is not shown."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **{**options, "disable": True})


@contextlib.contextmanager
def _reported(name: str, commit: str, patterns: Sequence[str]) -> Iterator[type[tqdm.tqdm] | None]:
    """Prints to standard error which download begins, and how long it took.

    Yields the class of progress bars for snapshot_download. It is None, for the hub's own bars, if there are files to
    download and standard error is a terminal. If not, the bars are hidden.
    """
    hub, missing = client(), []
    with contextlib.suppress(hub.errors.DryRunError, hub.errors.LocalEntryNotFoundError):
        files = hub.snapshot_download(name, revision=commit, allow_patterns=patterns, dry_run=True, tqdm_class=_Hidden)
        missing = [file for file in files if file.will_download]
    if not missing:
        yield _Hidden
        return
    size, begun = sum(file.file_size for file in missing), time.monotonic()
    print(
        f"download {name} from {hub.constants.ENDPOINT}: {len(missing)} files, {size / 1e6:,.1f} MB",
        file=sys.stderr,
        flush=True,
    )
    yield None if sys.stderr.isatty() else _Hidden
    print(f"download {name}: complete in {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)


@contextlib.contextmanager
def one_line_errors(name: str, revision: str | None) -> Iterator[None]:
    """Turns errors of the hub, the network and the disk into SettingsErrors of one line, with advice."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{name}"
    broken: Any = errors.HfHubHTTPError.__bases__  # OSError, and the base class of the HTTP client's errors
    login = "log in with `hf auth login`, or set HF_TOKEN to a token that may"
    try:
        yield
    except errors.GatedRepoError:
        raise SettingsError(f"{name} is gated: accept its terms at {page}, and {login} read it") from None
    except errors.RepositoryNotFoundError:
        raise SettingsError(
            f"{name} is neither a folder here nor a model on the hub that you may read: correct the name; if the model "
            f"is private, {login} read it"
        ) from None
    except errors.RevisionNotFoundError:
        raise SettingsError(f"{page} has no revision {revision!r}: name a branch, a tag or a commit of it") from None
    except errors.LocalEntryNotFoundError:
        reason, advice = f"{constants.ENDPOINT} cannot be reached", "check the network"
        if constants.HF_HUB_OFFLINE:
            reason, advice = "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE to download it"
        raise SettingsError(
            f"there is no folder {name} here, {reason}, and no model {name} is complete in the cache "
            f"{constants.HF_HUB_CACHE}: correct the name, or {advice}"
        ) from None
    except errors.HFValidationError as error:
        raise SettingsError(f"{name} breaks the hub's rules for names ({error}): correct the name") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise SettingsError(f"the hub refuses {name} ({status}): {login} read it or, to push, write it") from None
        advice = "try again later" if status == 429 or status >= 500 else "check the name and the files"
        raise SettingsError(f"the hub returned HTTP status {status} for {name}: {advice}") from None
    except RuntimeError as error:  # a file could not be uploaded
        raise SettingsError(
            f"the transfer of {name} failed ({error}): run the same command again; files that were sent are not sent "
            "again"
        ) from None
    except broken as error:
        if getattr(error, "errno", None):  # an error of the disk: errors of the HTTP client have no number
            raise SettingsError(
                f"{name} cannot be stored in the cache {constants.HF_HUB_CACHE} ({os.strerror(error.errno)}): make "
                "room there and check its permissions, or set HF_HOME to another folder, then run the same command "
                "again"
            ) from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SettingsError(
            f"the transfer of {name} failed ({reason}): check the network, then run the same command again"
        ) from None
