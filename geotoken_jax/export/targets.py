"""`geotoken export --target`: converts an export for runtimes other than jax, into its folder targets/NAME.

Each converter needs a separate environment because its requirements conflict with the requirements of geotoken-jax.
"""

import importlib
import shutil

from etils import epath

from geotoken_jax import manifests
from geotoken_jax.settings import SettingsError

#: Name of a target -> module of export/ that converts to it, and packages that must be installed for it.
TARGETS = {
    "onnx": ("onnx", "jax2onnx==0.17.1 onnxruntime==1.32.0 array_record==0.8.6 ml_collections pillow safetensors tqdm"),
    "savedmodel": (
        "savedmodel",
        "tensorflow-cpu==2.21.0 jax==0.10.2 etils jaxtyping ml_collections pillow safetensors tqdm",
    ),
    "pytorch": ("pytorch", "geotoken-jax"),
}


def make(folder: epath.PathLike, name: str) -> epath.Path:
    """Converts an export for one target and returns the target's folder. An existing folder is replaced.

    folder: folder of the export. name: a key of TARGETS. Raises SettingsError if the converter is not installed or
    cannot convert this model, and FileNotFoundError if the folder is not an export.
    """
    folder = epath.Path(folder)
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} has no config.json: give the folder that `geotoken export` made")
    from geotoken_jax.predict import export_format

    export_format.read_format(folder)
    module, packages = TARGETS[name]
    try:
        target = importlib.import_module(f"geotoken_jax.export.{module}")
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"--target={name} needs {error.name}: in a separate environment, run `pip install {packages}`, and "
            "`pip install --no-deps FOLDER` with the folder of a clone of geotoken-jax"
        ) from None
    if name != "pytorch" and not (folder / "standalone.py").exists():
        raise SettingsError(
            f"{folder} has no standalone.py, which --target={name} needs: export a model with config.model.scheme "
            "= 's2'"
        )
    out = folder / "targets" / name
    partial = out.with_name(f"{name}.part")  # renamed when complete
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    manifests.write_bytes(partial / "README.md", target.make(folder, partial).encode())
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    return out
