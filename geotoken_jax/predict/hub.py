"""Upload of exports to the Hugging Face hub, and download by the model's name there (see geotoken_jax.hub)."""

import glob
from collections.abc import Sequence

from etils import epath

from geotoken_jax import hub
from geotoken_jax.predict import bundle
from geotoken_jax.predict.bundle import SUMS, ExportError
from geotoken_jax.settings import SettingsError


def _patterns(name: str, folder: epath.Path) -> Sequence[str]:
    """Returns glob patterns of the files to download: all files that SHA256SUMS of the export lists."""
    del name
    return [glob.escape(file) for file in bundle.sums(folder)]


_EXPORT = hub.Kind(
    SUMS, "it is not an export; name a model that was uploaded by `geotoken export --push`", _patterns, has_sums=True
)


def resolve(model: epath.PathLike, revision: str | None = None) -> epath.Path:
    """Returns the folder of an export, downloaded from the hub if `model` is no path that exists.

    Every file of a downloaded export matches SHA256SUMS. model, revision: see geotoken_jax.hub.resolve. Raises
    SettingsError if there is no such folder and the download fails, and ExportError if a file is damaged; the damaged
    file is removed from the cache.
    """
    folder = hub.resolve(model, _EXPORT, revision)
    if epath.Path(model).exists():
        return folder
    for file, expected in bundle.sums(folder).items():
        path = folder / file
        if not path.exists():
            raise ExportError(f"{model} lacks {file}, which is in its {SUMS}: ask its owner to push the export again")
        if bundle.sha256(path) != expected:
            hub.remove(path)
            raise ExportError(
                f"{model}: {file} does not match its sum in {SUMS}: it was damaged in transfer or changed on the hub; "
                "run the same command again, which downloads it again"
            )
    return folder


def push(folder: epath.PathLike, name: str) -> str:
    """Uploads an export to the hub, creates the model there if needed, and returns its address.

    Files that the hub already has are not sent again, so an interrupted push can be continued. Raises SettingsError if
    `name` is not ORG/NAME or the upload fails, and ExportError if the export is damaged.
    """
    if not hub.is_name(name):
        raise SettingsError(f"{name!r} is not a name on the hub of the form ORG/NAME: write it as in me/geotoken")
    bundle.check(folder, everything=True)
    client = hub.client()
    files = [SUMS, *bundle.sums(folder)]
    with hub.one_line_errors(name, None):
        url = client.create_repo(name, exist_ok=True)
        client.upload_folder(
            repo_id=url.repo_id,
            folder_path=str(folder),
            allow_patterns=[glob.escape(file) for file in files],
            commit_message="Upload an export of geotoken-jax",
        )
    return str(url)
