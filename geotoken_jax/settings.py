"""Sections of a configuration as frozen dataclasses without defaults.

`configs/common.py` is the only home of defaults, so a section and the dataclass that reads it must have exactly the
same keys: a missing or an unknown one is an error that names it. Each field says whether results depend on it: those
of type `Runtime` may differ from one start of a stage to the next.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

S = TypeVar("S")
_RUNTIME = "runtime"
#: The type of a field that changes how a stage runs and not its result, as in `threads: Runtime[int]`. A manifest does
#: not record it, so a folder is kept whatever it is.
Runtime = Annotated[S, _RUNTIME]


class SettingsError(ValueError):
    """A configuration section does not have the keys or the types that its reader needs."""


def read(kind: type[S], section: Any, where: str) -> S:
    """Returns the section as a `kind`.

    kind: a frozen dataclass without defaults; fields may be dataclasses themselves.
    section: a ConfigDict or mapping with exactly the fields' names.
    where: the section's dotted place in the configuration, for messages.

    Raises SettingsError naming the key, its value and the fix.
    """
    if not hasattr(section, "keys"):
        raise SettingsError(f"config.{where} must be a section, not {section!r}")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    hints = typing.get_type_hints(kind)
    missing = [name for name in fields if name not in section]
    unknown = [name for name in section if name not in fields]
    if missing:
        raise SettingsError(
            f"config.{_place(where, missing[0])} is missing: start from configs/common.py, which sets it"
        )
    if unknown:
        known = ", ".join(sorted(fields))
        raise SettingsError(
            f"config.{_place(where, unknown[0])} is not read by anything: remove it, or use one of {known}"
        )
    values = {name: _value(hints[name], section[name], _place(where, name)) for name in fields}
    try:
        return kind(**values)
    except ValueError as error:  # of __post_init__
        raise SettingsError(_said(error, where)) from None


def _said(error: ValueError, where: str) -> str:
    """Returns what a section refuses, with the whole place of the key that its message begins with."""
    said = str(error)
    return said if isinstance(error, SettingsError) or said.startswith("config.") else f"config.{_place(where, said)}"


def _place(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else read(hint, value, where)
    origin = typing.get_origin(hint)
    if origin is types.UnionType:  # what may be absent
        kind = next(kind for kind in typing.get_args(hint) if kind is not type(None))
        return None if value is None else _value(kind, value, where)
    if origin is tuple:
        return tuple(value)
    if origin is dict or origin is Mapping:
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and (not isinstance(value, hint) or (hint is int and isinstance(value, bool))):
        raise SettingsError(f"config.{where} is {value!r}: it must be of type {hint.__name__}")
    return value


def result(section: Any) -> Any:
    """Returns what JSON holds of a section's fields that results depend on: all but those of type `Runtime`."""
    if not dataclasses.is_dataclass(section) or isinstance(section, type):
        return plain(section)
    return {name: result(getattr(section, name)) for name, runs in _fields(type(section)).items() if not runs}


def _fields(kind: type) -> dict[str, bool]:
    """Returns name of a field -> whether it is of type `Runtime`."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {name: _RUNTIME in getattr(hints[name], "__metadata__", ()) for name in names(kind)}


def restored(stored: Mapping[str, Any], asked: S, where: str) -> S:
    """Returns the settings that an artifact was made with.

    stored: the section in the artifact's manifest, as `result` gave it. asked: the section of the command line's
    configuration, from which the runtime fields are taken. where: the section's dotted place.

    Raises SettingsError naming a key that the manifest lacks.
    """
    return read(type(asked), _with_runtime(stored, asked), where)


def _with_runtime(stored: Mapping[str, Any], asked: Any) -> dict[str, Any]:
    found = dict(stored)
    for name, runs in _fields(type(asked)).items():
        value = getattr(asked, name)
        if runs:
            found[name] = plain(value)
        elif dataclasses.is_dataclass(value) and isinstance(found.get(name), Mapping):
            found[name] = _with_runtime(found[name], value)
    return found


def changed(section: S, changes: Mapping[str, Any], where: str) -> S:
    """Returns a section, or a whole configuration, with changes (sections and keys, nested) made.

    where: the dotted place that the changes stand in. Raises SettingsError naming a key that there is not, or a value
    that its reader refuses.
    """
    hints = typing.get_type_hints(type(section))
    values = {}
    for key, value in changes.items():
        if key not in hints:
            raise SettingsError(f"config.{where}.{key} changes what is not there: use one of {', '.join(hints)}")
        old = getattr(section, key)
        if dataclasses.is_dataclass(old) and hasattr(value, "items"):
            values[key] = changed(old, value, f"{where}.{key}")
        else:
            values[key] = _value(hints[key], value, f"{where}.{key}")
    try:
        return dataclasses.replace(section, **values)  # pyright: ignore[reportArgumentType]
    except ValueError as error:  # of __post_init__
        raise SettingsError(_said(error, where)) from None


def plain(section: Any) -> Any:
    """Returns a section, dataclass or nested container as what JSON holds: dicts, lists, strings, numbers."""
    if hasattr(section, "to_dict"):
        section = section.to_dict()
    if dataclasses.is_dataclass(section) and not isinstance(section, type):
        section = dataclasses.asdict(section)
    if isinstance(section, Mapping):
        return {str(key): plain(value) for key, value in section.items()}
    if isinstance(section, (list, tuple)):
        return [plain(value) for value in section]
    return section


def names(kind: type) -> list[str]:
    """Returns the keys that a section read as `kind` has."""
    return [field.name for field in dataclasses.fields(kind)]
