"""`geotoken export --target`: what runtimes other than jax answer with, made from an export's folder.

Each is a folder `targets/NAME` in it. Converters need environments of their own: their requirements and ours exclude
each other.
"""

import importlib
import shutil

from etils import epath

from geotoken_jax import workdir
from geotoken_jax.settings import SettingsError

#: Name of a target -> the module here that makes it, and what its environment holds beside this package.
TARGETS = {
    "onnx": ("onnx", "jax2onnx==0.17.1 onnxruntime==1.32.0 array_record==0.8.6 ml_collections pillow safetensors tqdm"),
    "savedmodel": ("savedmodel", "tensorflow-cpu==2.21.0 jax==0.10.2 etils safetensors tqdm"),
    "pytorch": ("pytorch", "geotoken-jax"),
}


def make(folder: epath.PathLike, name: str) -> epath.Path:
    """Makes one target, anew where it is there, and returns its folder.

    Raises SettingsError where the environment lacks what converts, or the model has what the target cannot be made of;
    FileNotFoundError if the folder is not an export.
    """
    folder = epath.Path(folder)
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} has no config.json: give the folder that `geotoken export` made")
    module, packages = TARGETS[name]
    try:
        target = importlib.import_module(f"geotoken_jax.interop.{module}")
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"--target={name} needs {error.name}: in an environment of its own, `pip install {packages}` and "
            "`pip install --no-deps geotoken-jax`"
        ) from None
    if name != "pytorch" and not (folder / "standalone.py").exists():
        raise SettingsError(f"{folder} has no standalone.py, which --target={name} is run by: its cells are not S2's")
    out = folder / "targets" / name
    made = out.with_name(f"{name}.part")  # renamed when whole
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    workdir.write_bytes(made / "README.md", target.make(folder, made).encode())
    shutil.rmtree(out, ignore_errors=True)
    made.rename(out)
    return out
