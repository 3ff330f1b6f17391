"""Prints docs/troubleshooting.md, which has every error message that a user can mend, from the source.

usage: python -m docs.troubleshooting > docs/troubleshooting.md
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: Errors that end a verb with one sentence and exit status 2.
ERRORS = {
    "SettingsError", "StageError", "OtherSettingsError", "ImageError", "ExportError", "IndexQualityError",
    "CheckpointError", "Diverged", "TableError", "LockedError", "DamagedError",
}  # fmt: skip
#: Errors that a settings class raises, which become SettingsErrors.
_IN_SETTINGS = {"ValueError"}
_INTRODUCTION = """# Troubleshooting

Every verb of `geotoken` ends an error that you can mend with one sentence and exit status 2. The sentence says what is
wrong, where, and after a colon how to mend it. This page has all of these sentences, by the module that prints them;
`…` stands for a path, a key or a value. `python -m docs.troubleshooting > docs/troubleshooting.md` makes it from the
source. Errors of the operating system have the sentences at the end. `python -X dev -m geotoken_jax VERB ...`
shows where in the code such an error came from. Exit status 75 means that the same command continues: see
[faults](faults.md).
"""


def messages(path: Path) -> Iterator[str]:
    """Yields the messages of a module, in its order, with `…` for values."""
    tree = ast.parse(path.read_text())
    for owner in ast.walk(tree):
        if not isinstance(owner, ast.FunctionDef):
            continue
        kinds = ERRORS | (_IN_SETTINGS if owner.name == "__post_init__" else set())
        for node in ast.walk(owner):
            if isinstance(node, ast.Call) and _name(node.func) in kinds and node.args:
                text = re.sub(r"\s+", " ", _text(node.args[0])).strip()
                yield from [text] if " " in text.strip("… ") else []


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _text(node: ast.expr) -> str:
    """Returns a message's text with `…` for each value."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return "…"


def split(message: str) -> tuple[str, str]:
    """Returns the problem and its cure, which are separated by a colon; a place at the beginning has a colon too."""
    parts = message.split(": ")
    problem = 2 if len(parts) > 2 and not re.search("[a-z]{3}", parts[0].replace("line", "")) else 1
    return ": ".join(parts[:problem]), ": ".join(parts[problem:])


def document() -> str:
    """Returns the page."""
    lines = [_INTRODUCTION]
    for path in sorted([*(ROOT / "geotoken_jax").rglob("*.py"), *(ROOT / "data_prep").rglob("*.py")]):
        found = list(dict.fromkeys(messages(path)))
        if found:
            name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
            lines += [f"\n## {name}\n", "| message | what to do |", "|---|---|"]
            lines += [f"| {_cell(problem)} | {_cell(cure)} |" for problem, cure in map(split, found)]
    lines += ["\n## The operating system\n", "| reason | what to do |", "|---|---|"]
    lines += [f"| {_cell(reason)} | {_cell(cure)} |" for reason, cure in _system()]
    return "\n".join(lines) + "\n"


def _system() -> Iterator[tuple[str, str]]:
    import os

    from geotoken_jax import errors

    for number, cure in errors.CURES.items():
        yield f"… cannot be used ({os.strerror(number)})", cure


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("`", "")


if __name__ == "__main__":
    print(document(), end="")
