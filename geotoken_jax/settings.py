"""Sections of a configuration as frozen dataclasses without defaults.

`configs/common.py` is the only home of defaults, so a section and the dataclass that reads it must have exactly the
same keys: a missing or an unknown one is an error that names it.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

S = TypeVar("S")


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
        raise SettingsError(f"config.{where}.{missing[0]} is missing: start from configs/common.py, which sets it")
    if unknown:
        known = ", ".join(sorted(fields))
        raise SettingsError(f"config.{where}.{unknown[0]} is not read by anything: remove it, or use one of {known}")
    values = {name: _value(hints[name], section[name], f"{where}.{name}") for name in fields}
    try:
        return kind(**values)
    except ValueError as error:  # what __post_init__ has to say of the values
        raise SettingsError(str(error)) from None


def _value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return read(hint, value, where)
    origin = typing.get_origin(hint)
    if origin is tuple:
        return tuple(value)
    if origin is dict or origin is Mapping:
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and (not isinstance(value, hint) or (hint is int and isinstance(value, bool))):
        raise SettingsError(f"config.{where} is {value!r}: it must be of type {hint.__name__}")
    return value


def variant(config: Any, name: str) -> Any:
    """Returns the configuration with the changes of `config.variants[name]` (sections and keys, nested) made.

    Raises SettingsError if there is no such variant, or if it changes a key that there is not.
    """
    if name not in config.variants:
        raise SettingsError(f"config.variants has no {name!r}: choose one of {', '.join(config.variants)}")
    return changed(config, config.variants[name], f"variants.{name}")


def changed(config: Any, changes: Any, where: str) -> Any:
    """Returns the configuration with changes (sections and keys, nested) made; where: they stand in it.

    Raises SettingsError if they change a key that there is not.
    """
    found = config.copy_and_resolve_references()
    _change(found, changes, where)
    return found


def _change(section: Any, changes: Any, where: str) -> None:
    for key, value in changes.items():
        if key not in section:
            raise SettingsError(f"config.{where}.{key} changes what is not there: use one of {', '.join(section)}")
        if hasattr(value, "items"):
            _change(section[key], value, f"{where}.{key}")
        else:
            section[key] = value


#: Keys that say how training runs, not what comes out: they may change from one start to the next.
_MANNER = (
    "accumulate", "profile", "wandb", "remat", "attention", "chunk",
    "base_url", "timeout_s", "attempts", "concurrent", "price_in", "price_out", "key_variable",
)  # fmt: skip


def outcome(section: Any) -> dict[str, Any]:
    """Returns the keys of a section that what is made with it depends on."""
    return {key: value for key, value in section.items() if key not in _MANNER}


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
