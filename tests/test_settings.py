"""Configuration sections read as dataclasses: what is refused, and that the message names the key."""

import dataclasses

import pytest
from ml_collections import ConfigDict

from geotoken_jax import settings


@dataclasses.dataclass(frozen=True)
class Inner:
    depth: int
    sizes: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str
    rate: float
    limit: int | None
    flag: bool
    inner: Inner

    def __post_init__(self):
        if self.rate < 0:
            raise ValueError(f"config.outer.rate is {self.rate}: it must not be below 0")


def section(**changes):
    values = {"name": "a", "rate": 1, "limit": None, "flag": True, "inner": {"depth": 2, "sizes": [1.0, 16.0]}}
    return ConfigDict({**values, **changes})


def test_reads_nested_sections_with_their_types():
    found = settings.read(Outer, section(), "outer")
    assert found == Outer("a", 1.0, None, True, Inner(2, (1.0, 16.0)))
    assert isinstance(found.rate, float) and isinstance(found.inner.sizes, tuple)
    assert settings.read(Outer, section(limit=3).to_dict(), "outer").limit == 3


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"speed": 3}, r"config\.outer\.speed is not read by anything: .* flag, inner, limit, name, rate"),
        ({"inner": {"depth": 2}}, r"config\.outer\.inner\.sizes is missing"),
        ({"inner": {"depth": 2, "sizes": (), "odd": 1}}, r"config\.outer\.inner\.odd is not read"),
        ({"inner": 5}, r"config\.outer\.inner must be a section, not 5"),
        ({"inner": {"depth": 2.0, "sizes": ()}}, r"config\.outer\.inner\.depth is 2\.0: it must be of type int"),
        ({"inner": {"depth": True, "sizes": ()}}, r"config\.outer\.inner\.depth is True: it must be of type int"),
        ({"name": 7}, r"config\.outer\.name is 7: it must be of type str"),
        ({"rate": True}, r"config\.outer\.rate is True: it must be of type float"),
        ({"flag": 1}, r"config\.outer\.flag is 1: it must be of type bool"),
        ({"rate": -1}, r"config\.outer\.rate is -1\.0: it must not be below 0"),
    ],
)
def test_refuses_naming_the_key_and_the_value(changes, message):
    with pytest.raises(settings.SettingsError, match=message):
        settings.read(Outer, section(**changes), "outer")


def test_a_missing_key_is_named():
    values = section().to_dict()
    del values["rate"]
    with pytest.raises(settings.SettingsError, match=r"config\.outer\.rate is missing"):
        settings.read(Outer, values, "outer")


def test_a_variant_changes_a_copy():
    config = ConfigDict({"model": {"width": 32, "inner": {"a": 1, "b": 2}}, "seed": 0})
    config.variants = {"same": {}, "wide": {"model": {"width": 64, "inner": {"b": 3}}, "seed": 1}}
    changed = settings.variant(config, "wide")
    assert changed.model.to_dict() == {"width": 64, "inner": {"a": 1, "b": 3}} and changed.seed == 1
    assert settings.variant(config, "same") == config
    assert config.model.to_dict() == {"width": 32, "inner": {"a": 1, "b": 2}} and config.seed == 0


def test_an_unknown_variant_or_key_is_named():
    config = ConfigDict({"model": {"width": 32}, "variants": {"a": {"model": {"widht": 64}}, "b": {"modle": {}}}})
    with pytest.raises(settings.SettingsError, match=r"config.variants has no 'c': choose one of a, b"):
        settings.variant(config, "c")
    with pytest.raises(settings.SettingsError, match=r"config\.variants\.a\.model\.widht .* use one of width"):
        settings.variant(config, "a")
    with pytest.raises(settings.SettingsError, match=r"config\.variants\.b\.modle changes what is not there"):
        settings.variant(config, "b")


def test_plain_is_what_json_holds():
    read = settings.read(Outer, section(), "outer")
    expected = {"name": "a", "rate": 1.0, "limit": None, "flag": True, "inner": {"depth": 2, "sizes": [1.0, 16.0]}}
    assert settings.plain(read) == expected
    assert settings.plain(section(rate=1.0)) == expected
    assert settings.plain({"sections": (section(rate=1.0), read)}) == {"sections": [expected, expected]}
    assert settings.names(Inner) == ["depth", "sizes"]
