"""Converts an export of an earlier format to the present format."""

import json
import pathlib
import shutil

from etils import epath

from geotoken_jax.export import stablehlo
from geotoken_jax.manifests import write_json
from geotoken_jax.predict import bundle, export_format
from geotoken_jax.settings import SettingsError


def run(source: epath.PathLike, target: epath.PathLike) -> epath.Path:
    """Writes an export of an earlier format to a new folder in the present format, and returns that folder.

    The new export has the same model, gallery, radii and card, and gives the same predictions. Its programs and its
    standalone.py are written again. The folder `target` appears when all of its files are complete. Raises ExportError
    if the export is damaged or cannot be upgraded. Raises SettingsError if it needs no upgrade or if `target` exists.
    """
    source, target = epath.Path(source), epath.Path(target)
    if not (source / "config.json").exists():
        raise FileNotFoundError(f"{source} has no config.json: give the folder that `geotoken export` made")
    if target.exists():
        raise SettingsError(f"{target} exists: remove it, or write another folder with --upgrade=DIR")
    bundle.check(source, everything=True)
    with bundle.reading(source):
        config = export_format.read_config(source)
        if export_format.read_format(source) == export_format.FORMAT:
            raise SettingsError(f"{source} has the present format, {export_format.FORMAT}: use it as it is")
        partial = target.with_name(f"{target.name}.part")  # renamed when complete
        shutil.rmtree(partial, ignore_errors=True)
        unused = json.loads((source / "config.json").read_text()).get("learned", {}).keys() - config["learned"].keys()
        for name in bundle.sums(source):
            if pathlib.PurePosixPath(name).parts[0] not in unused and not name.endswith(".stablehlo"):
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, partial / name)
        write_json(partial / "config.json", config)
        if config["model"]["scheme"].startswith("s2"):  # programs decode S2 cells only
            stablehlo.write(partial)
    bundle.write_sums(partial)
    partial.rename(target)
    return target
