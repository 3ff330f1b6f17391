"""Reads sections of a configuration as frozen dataclasses without defaults.

All defaults are in `configs/common.py`. A section and its dataclass must have exactly the same keys; a missing or
unknown key raises an error that names the key. A field of type `Runtime` may have another value each time a stage is
started, because results do not depend on it. A field with the annotation `Added` may be missing.
"""

import dataclasses
import os
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from geotoken_jax.errors import UserError

S = TypeVar("S")
_RUNTIME = "runtime"
#: Type of a field that changes how a stage runs but not its result, as in `threads: Runtime[int]`. Manifests do not
#: store such fields, so a complete folder stays valid when they change.
Runtime = Annotated[S, _RUNTIME]


@dataclasses.dataclass(frozen=True)
class Added:
    """Annotation of a field that earlier releases did not have, as in `source: Annotated[str, Added("")]`.

    value: value of the field if a configuration or a manifest lacks it. Manifests store the field only if it has
    another value, so the manifests of earlier releases stay valid.
    """

    value: Any


#: Keys of config.model that earlier releases did not have -> their values for the models of these releases.
_ADDED = dict(parametrization="standard", base_width=512, base_heads=8, base_layers=10)


class SettingsError(UserError, ValueError):
    """A setting, or something that it names, such as a file, cannot be used. The message contains the setting and the
    fix."""


def read(kind: type[S], section: Any, place: str) -> S:
    """Returns a section of the configuration as an instance of `kind`.

    kind: frozen dataclass without defaults; its fields may be such dataclasses too. section: ConfigDict or mapping with
    exactly the names of the fields as keys. place: dotted key of the section, for messages.

    Raises SettingsError with the key, its value and the fix.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    if not hasattr(section, "keys"):
        raise SettingsError(f"config.{place} is {section!r}: it must be a section with the keys {', '.join(fields)}")
    hints, added = typing.get_type_hints(kind), _added(kind)
    missing = [name for name in fields if name not in section and name not in added]
    unknown = [name for name in section if name not in fields]
    if missing:
        raise SettingsError(
            f"config.{_join(place, missing[0])} is missing: set it, or start from configs/common.py, which sets it"
        )
    if unknown:
        known = ", ".join(sorted(fields))
        raise SettingsError(f"config.{_join(place, unknown[0])} is not a known key: remove it, or use one of {known}")
    values = {
        name: _converted(hints[name], section[name], _join(place, name)) if name in section else added[name]
        for name in fields
    }
    try:
        return kind(**values)
    except ValueError as error:  # raised by __post_init__
        raise SettingsError(_message(error, place)) from None


def _message(error: ValueError, place: str) -> str:
    """Returns the message for an error that `__post_init__` of a section's dataclass raised.

    The prefix `config.PLACE.` is added to a message that begins with a bare key, such as "chunk is 0: ...". Messages of
    SettingsErrors, and messages that begin with `config.`, are returned unchanged.
    """
    message = str(error)
    complete = isinstance(error, SettingsError) or message.startswith("config.")
    return message if complete else f"config.{_join(place, message)}"


def _join(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key


def _converted(hint: Any, value: Any, place: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else read(hint, value, place)
    origin = typing.get_origin(hint)
    if origin is types.UnionType:  # an optional field: T | None
        kind = next(kind for kind in typing.get_args(hint) if kind is not type(None))
        return None if value is None else _converted(kind, value, place)
    if origin is tuple:
        return tuple(value)
    if origin is dict or origin is Mapping:
        kind = typing.get_args(hint)[-1]
        if dataclasses.is_dataclass(kind):
            return {name: _converted(kind, section, _join(place, name)) for name, section in value.items()}
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, str) and value.startswith("~"):  # a shell does not expand --config.KEY=~/x
        return os.path.expanduser(value)
    if isinstance(hint, type) and (not isinstance(value, hint) or (hint is int and isinstance(value, bool))):
        raise SettingsError(f"config.{place} is {value!r}: it must be of type {hint.__name__}")
    return value


def result(section: Any) -> Any:
    """Returns a section as JSON values, without its fields of type `Runtime`. Results do not depend on these fields."""
    if not dataclasses.is_dataclass(section) or isinstance(section, type):
        return plain(section)
    runtime = _runtime_flags(type(section))
    return {name: result(getattr(section, name)) for name in _stored(section) if not runtime[name]}


def _runtime_flags(kind: type) -> dict[str, bool]:
    """Returns field name -> whether the field is of type `Runtime`."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {name: _RUNTIME in getattr(hints[name], "__metadata__", ()) for name in names(kind)}


def _added(kind: type) -> dict[str, Any]:
    """Returns field name -> value if the field is missing, for fields with the annotation `Added`."""
    return {
        field.name: annotation.value
        for field in dataclasses.fields(kind)
        for annotation in getattr(field.type, "__metadata__", ())
        if isinstance(annotation, Added)
    }


def _stored(section: Any) -> list[str]:
    """Returns the names of a dataclass's fields without those that may be missing and have the value for this case."""
    added = _added(type(section))
    return [name for name in names(type(section)) if name not in added or getattr(section, name) != added[name]]


def restored(stored: Mapping[str, Any], requested: S, place: str) -> S:
    """Returns the settings that a folder was made with. Fields of type `Runtime` have their current values instead.

    stored: section in the folder's manifest, as `result` returned it. requested: the same section of the current
    configuration. place: dotted key of the section.

    Raises SettingsError if a key in `stored` is missing, unknown, of a wrong type or out of range.
    """
    return read(type(requested), _with_runtime(stored, requested), place)


def _with_runtime(stored: Mapping[str, Any], requested: Any) -> dict[str, Any]:
    values = dict(stored)
    for name, runtime in _runtime_flags(type(requested)).items():
        value = getattr(requested, name)
        if runtime:
            values[name] = plain(value)
        elif dataclasses.is_dataclass(value) and isinstance(values.get(name), Mapping):
            values[name] = _with_runtime(values[name], value)
    return values


def completed(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Returns stored settings with the keys that earlier releases did not have. sections: name -> stored section."""
    model = sections.get("model")
    if not isinstance(model, Mapping) or "width" not in model:  # some folders depend on single keys of config.model
        return dict(sections)
    return {**sections, "model": {**_ADDED, **model}}


def changed(section: S, changes: Mapping[str, Any], place: str) -> S:
    """Returns a section, or a whole configuration, with changes applied.

    changes: nested sections and keys with their new values. place: dotted key of the changes in the configuration, such
    as variants.NAME, for messages.

    Raises SettingsError if a key is unknown or a value is not allowed.
    """
    hints = typing.get_type_hints(type(section))
    values = {}
    for key, value in changes.items():
        if key not in hints:
            raise SettingsError(f"config.{place}.{key} is not a known key: use one of {', '.join(hints)}")
        old = getattr(section, key)
        if dataclasses.is_dataclass(old) and hasattr(value, "items"):
            values[key] = changed(old, value, f"{place}.{key}")
        else:
            values[key] = _converted(hints[key], value, f"{place}.{key}")
    try:
        return dataclasses.replace(section, **values)  # pyright: ignore[reportArgumentType]
    except ValueError as error:  # raised by __post_init__
        raise SettingsError(_message(error, place)) from None


def plain(section: Any) -> Any:
    """Returns a section, dataclass or nested container as JSON values: dicts, lists, strings and numbers."""
    if hasattr(section, "to_dict"):
        section = section.to_dict()
    if dataclasses.is_dataclass(section) and not isinstance(section, type):
        section = {name: getattr(section, name) for name in _stored(section)}
    if isinstance(section, Mapping):
        return {str(key): plain(value) for key, value in section.items()}
    if isinstance(section, (list, tuple)):
        return [plain(value) for value in section]
    return section


def names(kind: type) -> list[str]:
    """Returns the names of a dataclass's fields, which are the keys of its section."""
    return [field.name for field in dataclasses.fields(kind)]
