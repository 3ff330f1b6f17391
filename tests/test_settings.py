"""Configuration sections read as dataclasses: which values are errors, and that the message names the key."""

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
        ({"speed": 3}, r"config\.outer\.speed is not a known key: .* flag, inner, limit, name, rate"),
        ({"inner": {"depth": 2}}, r"config\.outer\.inner\.sizes is missing"),
        ({"inner": {"depth": 2, "sizes": (), "odd": 1}}, r"config\.outer\.inner\.odd is not a known key"),
        ({"inner": 5}, r"config\.outer\.inner is 5: it must be a section with the keys depth, sizes"),
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


def test_changes_are_made_in_a_copy():
    read = settings.read(Outer, section(), "outer")
    changed = settings.changed(read, {"rate": 2, "inner": {"depth": 3}}, "variants.wide")
    assert changed == Outer("a", 2.0, None, True, Inner(3, (1.0, 16.0))) and read.inner.depth == 2
    assert settings.changed(read, {}, "variants.same") == read


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"inner": {"dpeth": 3}},
            r"config\.variants\.a\.inner\.dpeth is not a known key: use one of depth, sizes",
        ),
        ({"iner": {}}, r"config\.variants\.a\.iner is not a known key: use one of name, "),
        ({"inner": {"depth": "3"}}, r"config\.variants\.a\.inner\.depth is '3': it must be of type int"),
        ({"rate": -1.0}, r"config\.outer\.rate is -1\.0: it must not be below 0"),
    ],
)
def test_changes_that_cannot_be_made_are_named(changes, message):
    with pytest.raises(settings.SettingsError, match=message):
        settings.changed(settings.read(Outer, section(), "outer"), changes, "variants.a")


@dataclasses.dataclass(frozen=True)
class Search:
    leaves: int
    threads: settings.Runtime[int]


@dataclasses.dataclass(frozen=True)
class Index:
    kind: str
    note: settings.Runtime[str]
    search: Search


def test_a_result_leaves_out_what_says_how_a_stage_runs():
    index = settings.read(Index, {"kind": "exact", "note": "", "search": {"leaves": 3, "threads": 2}}, "index")
    stored = settings.result(index)
    assert stored == {"kind": "exact", "search": {"leaves": 3}}
    asked = Index("scann", "here", Search(4, 8))
    assert settings.restored(stored, asked, "index") == Index("exact", "here", Search(3, 8))


def test_plain_is_what_json_holds():
    read = settings.read(Outer, section(), "outer")
    expected = {"name": "a", "rate": 1.0, "limit": None, "flag": True, "inner": {"depth": 2, "sizes": [1.0, 16.0]}}
    assert settings.plain(read) == expected
    assert settings.plain(section(rate=1.0)) == expected
    assert settings.plain({"sections": (section(rate=1.0), read)}) == {"sections": [expected, expected]}
    assert settings.names(Inner) == ["depth", "sizes"]
