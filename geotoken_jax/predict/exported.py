"""Whether the folder of an export is whole: its files against SHA256SUMS, which lies beside them."""

import hashlib

from etils import epath

#: Name of the file of `SHA-256  name` lines.
SUMS = "SHA256SUMS"
#: Files that opening an export reads whole anyway; all others are memory-mapped, and may be many gigabytes.
_READ = (".json", ".safetensors")


def check(folder: epath.PathLike, everything: bool) -> None:
    """Raises ValueError, naming the first, if a file of an export is missing or is not what it was.

    everything: every file's sum is compared (demo: 0.6 GB); else those of the parameters and settings alone.
    """
    folder = epath.Path(folder)
    if not (folder / SUMS).exists():
        raise ValueError(f"{folder} has no {SUMS}: the export is not whole, so copy it, or make it, again")
    for line in (folder / SUMS).read_text().splitlines():
        expected, name = line.split("  ", 1)
        file = folder / name
        if not file.exists():
            raise ValueError(f"{folder} lacks {name}: the export is not whole, so copy it, or make it, again")
        if (everything or file.suffix in _READ) and sha256(file) != expected:
            raise ValueError(f"{file} is not what {SUMS} says: it is damaged or was changed, so copy the export again")


def sha256(file: epath.PathLike) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with epath.Path(file).open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
