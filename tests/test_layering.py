"""Which modules may import which: ranks of modules, checked in the source of each module."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
RANKS = {
    **dict.fromkeys(
        [
            "__version__",
            "version",
            "errors",
            "settings",
            "disk",
            "manifests",
            "partition",
            "records",
            "shards",
            "tables",
            "progress",
            "geo",
            "hub",
        ],
        0,
    ),
    **dict.fromkeys(
        [
            "compiled",
            "sharding",
            "stack",
            "checkpoint",
            "chips",
            "jax_modes",
            "processes",
            "batch",
            "bootstrap",
            "vectors",
            "randomness",
        ],
        0,
    ),
    **dict.fromkeys(["attention", "attention_tpu"], 0),
    **dict.fromkeys(["backbone", "gallery"], 1),
    "preparation": 2,
    **dict.fromkeys(["data", "align", "model"], 3),
    **dict.fromkeys(["train", "predict"], 4),
    "configuration": 5,
    "workdir": 6,
    **dict.fromkeys(["analysis", "interop", "verification"], 7),
    **dict.fromkeys(["export", "plan", "pages"], 8),
    **dict.fromkeys(["folder", "stages"], 9),
    "serve": 10,
    "workdir_commands": 11,
    "commands": 12,
    "cli": 13,
    "__main__": 14,
    "__init__": 14,  # the public API
}


def modules(folder: str) -> dict[str, ast.AST]:
    """Returns path from the repository's root -> syntax tree, of every module under a folder."""
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in sorted((ROOT / folder).rglob("*.py"))}


LIBRARY, PREPARATION, CONFIGS = modules("geotoken_jax"), modules("data_prep"), modules("configs")


def imports(tree: ast.AST, in_functions: bool = True) -> list[str]:
    """Returns the dotted names that a module imports; `from a import b` counts as a.b."""
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    hidden = set() if in_functions else {node for function in functions for node in ast.walk(function)}
    names = []
    for node in set(ast.walk(tree)) - hidden:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += ["." * node.level + f"{node.module or ''}.{alias.name}" for alias in node.names]
    return names


def allowed(unit: str, other: str) -> bool:
    """Returns whether a part of geotoken_jax may import another."""
    if unit == "train" and other in ("data", "align", "model"):  # the training loop gets its task as an argument
        return False
    return unit == other or RANKS.get(other, 99) < RANKS[unit] or RANKS.get(other) == RANKS[unit] == 0


def test_no_two_modules_import_each_other_even_through_others():
    everything = {**LIBRARY, **PREPARATION}
    names = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in everything}
    reaches = {}
    for name, path in names.items():
        whole = {found if found in names else found.rpartition(".")[0] for found in imports(everything[path])}
        reaches[name] = {other for other in whole if other in names and other != name}

    def looped(name: str, way: tuple[str, ...]) -> tuple[str, ...]:
        if name in way:
            return (*way[way.index(name) :], name)
        if name in done:
            return ()
        done.add(name)
        return next((loop for other in sorted(reaches[name]) if (loop := looped(other, (*way, name)))), ())

    done: set[str] = set()
    for name in sorted(reaches):
        assert not (loop := looped(name, ())), " imports ".join(loop)


@pytest.mark.parametrize("module", LIBRARY)
def test_a_module_of_the_library_imports_from_lower_ranks_only(module):
    unit = pathlib.Path(module).parts[1].removesuffix(".py")
    assert unit in RANKS, f"geotoken_jax.{unit} has no rank: give it one here and in the design"
    for name in imports(LIBRARY[module]):
        package, _, rest = name.partition(".")
        assert package, f"{name}: write the whole name"
        assert package not in ("data_prep", "configs", "benchmarks", "tests"), f"the library imports {name}"
        assert package != "geotoken_jax" or allowed(unit, rest.split(".")[0]), f"{unit} imports {name}"
    strings = [node.value for node in ast.walk(LIBRARY[module]) if isinstance(node, ast.Constant)]
    named = [text for text in strings if isinstance(text, str) and text.split(".")[0] in ("data_prep", "configs")]
    may_name = unit == "stages"
    assert may_name or not named, f"only stages import {named[0]} by name"


@pytest.mark.parametrize("module", CONFIGS)
def test_a_configuration_is_inert(module):
    assert {name.split(".")[0] for name in imports(CONFIGS[module])} <= {"ml_collections", "configs", "typing"}


@pytest.mark.parametrize("module", [*LIBRARY, *PREPARATION])
def test_tensorflow_and_torch_wait_until_they_are_called_for(module):
    tree = (LIBRARY | PREPARATION)[module]
    heavy = {name.split(".")[0] for name in imports(tree, in_functions=False)} & {"tensorflow", "torch"}
    assert not heavy or module.startswith(("geotoken_jax/interop/", "geotoken_jax/export/savedmodel.py"))


def test_importing_the_library_imports_neither_jax_nor_numpy():
    code = "import sys, geotoken_jax; print({'jax', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
