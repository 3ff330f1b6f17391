import csv
import dataclasses
import json
import math
import re

import numpy as np
import pytest

from geotoken_jax import cli
from geotoken_jax.analysis import evaluate, reliability
from geotoken_jax.analysis.claims import Claims
from geotoken_jax.analysis.coordinates import (
    FARTHEST_KM,
    CoordinateTable,
    Method,
    in_order,
    methods_of,
    read_coordinates,
)
from geotoken_jax.analysis.evaluate import EvaluateSettings
from geotoken_jax.geo import distance
from geotoken_jax.geo.cells import CellScheme
from geotoken_jax.geo.distance import EARTH_RADIUS_KM
from geotoken_jax.predict.prediction import Candidate, Cell, Neighbor, Prediction
from geotoken_jax.settings import SettingsError
from geotoken_jax.tables import TableError

KM = 180 / (math.pi * EARTH_RADIUS_KM)  # degrees of latitude


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(name, latitude, longitude=0.0, **more):
    return {"id": name, "latitude": latitude, "longitude": longitude, **more}


def truth_of(n, authors=None):
    extra = [{"author": authors[i]} if authors else {} for i in range(n)]
    return CoordinateTable("truth", [str(i) for i in range(n)], np.zeros((n, 2)), np.zeros((n, 0, 2)), False, extra)


def method(km, variant="geotoken", **more):
    km = np.asarray(km, float)
    kind = {"choice": "", "main": True, "baseline": False, "bound": False, **more}
    return Method(variant=variant, name=variant, coordinates=np.zeros((len(km), 2)), km=km, **kind)


def score(methods, truth, seed=0, resamples=2000):
    return evaluate.score(methods, truth, "geotoken", resamples, seed)


def options(reference="geotoken", **changed):
    made = dict(resamples=100, seed=0, compare=(), labels={}, earth="sphere", strict=False) | changed
    return EvaluateSettings(reference=reference, **made)


def values(scored):
    return [a["value"] for a in scored["accuracy"]]


def test_json_lines_and_csv_read_alike(tmp_path):
    lines = write(tmp_path / "a.jsonl", [row("x", 1.5, -2.25, author="a"), row("7", -90, 180, author="b")])
    table = tmp_path / "b.csv"
    table.write_text('\ufeffIMG_ID,LAT, Lon,Author\nx,1.5,-2.25,a\n"7",-90,180,b\n')
    for points in (read_coordinates(lines), read_coordinates(table)):
        assert points.ids == ["x", "7"]
        np.testing.assert_array_equal(points.coordinates, [[1.5, -2.25], [-90, 180]])
        assert [more["author"] for more in points.extra] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "id,latitude\nx,1\n",
            "has no column longitude among 'id, latitude': add it, or rename one to longitude or lon or lng",
        ),
        ('{"id": "x", "latitude": 1, "longitude": 2}\n{"latitude": 1}\n', "line 2 has no column id"),
        ("id,lat,lng\nx,1,2\n\nx,1,2\n", "line 4: id 'x' is on line 2 too"),
        ('{"id": "x", "latitude": NaN, "longitude": 2}', "line 1: latitude of 'x' is nan: give degrees from -90 to 90"),
        ("id,lat,lng\nx,1,190\n", "line 2: longitude of 'x' is '190': give degrees from -180 to 180"),
        ("id,lat,lng\nx,,2\n", "line 2: latitude of 'x' is ''"),
        ("id,lat,lng\nParis, France,1,2\n", "line 2: the row has more columns than the header"),
        ('{"id": "x"\n', "line 1: .*write one JSON object per line"),
        ('{"id": "x", "lat": 1, "lon": 2, "candidates": [[1, 2]]}', "line 1: candidates or choices is malformed"),
        ('{"id": "x", "lat": 1, "lon": 2, "choices": {"a": [91, 2]}}', "line 1: .*a point .latitude, longitude"),
        ('{"id": "x", "lat": 1, "lon": 2, "within": {"25": 1.5}}', "line 1: within 25 km is 1.5: give .* from 0 to 1,"),
        ('{"id": "x", "lat": 1, "lon": 2, "within": 0.5}', "line 1: within is 0.5: write an object"),
        ("id,lat,lng,radius_km\nx,1,2,-3\n", "line 2: radius_km is '-3': give a number that is 0 or more"),
        (
            '{"id": "x", "lat": 1, "lon": 2, "cells": [[20, 9, 0, 0.5]]}',
            "line 1: cells is malformed: write a list of objects with level .-1 to 30.",
        ),
        (
            '{"id":"x","lat":1,"lon":2,"cells":[{"level":31,"latitude":9,"longitude":0,"probability":0.5}]}',
            "line 1: cells is malformed: write a list of objects with level .-1 to 30.",
        ),
        (
            '{"id":"x","lat":1,"lon":2,"cells":[{"level":20,"latitude":91,"longitude":0,"probability":0.5}]}',
            "line 1: cells is malformed: write a list of objects with level .-1 to 30.",
        ),
        ('{"id": "x", "lat": 1, "lon": 2, "cells": [{"level": 3}]}', "line 1: cells is malformed"),
        ("id,lat,lng\n", "has no rows: write one row per photo"),
    ],
)
def test_a_file_that_cannot_be_scored_says_where_and_how_to_mend_it(tmp_path, text, message):
    path = tmp_path / "points.txt"
    path.write_text(text)
    with pytest.raises(TableError, match=f"points.txt.*{message}"):
        read_coordinates(path)


def test_a_threshold_includes_its_distance():
    assert values(score([method([1, 25, 200, 750, 2500])], truth_of(5))["methods"][0]) == [0.2, 0.4, 0.6, 0.8, 1.0]


def test_a_photo_without_a_prediction_is_wrong_and_counted(tmp_path):
    truth = read_coordinates(write(tmp_path / "t.jsonl", [row("a", 0), row("b", 10), row("c", 20), row("d", 30)]))
    points = read_coordinates(write(tmp_path / "p.jsonl", [row("c", 20 + 100 * KM), row("a", 0)]))
    scored = score(methods_of(points, truth, "geotoken", "GeoToken"), truth)["methods"][0]
    assert values(scored) == [0.25, 0.25, 0.5, 0.5, 0.5]
    assert scored["missing"] == 2
    assert scored["mean_km"]["value"] == pytest.approx((100 + 2 * FARTHEST_KM) / 4)
    assert scored["median_km"] == pytest.approx((100 + FARTHEST_KM) / 2)


def test_a_prediction_of_an_unknown_photo_is_refused(tmp_path):
    points = read_coordinates(write(tmp_path / "p.jsonl", [row("0", 0), row("who", 0)]))
    with pytest.raises(TableError, match=r"p\.jsonl predicts 'who' \(one of 1\), which truth does not have"):
        methods_of(points, truth_of(1), "geotoken", "GeoToken")


def test_choices_are_methods_and_the_best_candidate_is_a_bound(tmp_path):
    def candidates(*kilometers, **more):
        return [{"latitude": km * KM, "longitude": 0.0, **more} for km in kilometers]

    choices = {"greedy": 0, "log_probability": 1}
    rows = [
        row("0", 500 * KM, choice="greedy", choices=choices, candidates=candidates(500, 100, 10, tokens=[1])),
        row("1", 20 * KM, choice="greedy", choices=choices, candidates=candidates(20, 3000, tokens=[1])),
    ]
    truth = truth_of(2)
    model = read_coordinates(write(tmp_path / "model.jsonl", rows))
    neighbors = read_coordinates(
        write(
            tmp_path / "top1.jsonl", [row(str(i), KM, choice="top1", candidates=candidates(1, 0.5)) for i in range(2)]
        )
    )
    found = methods_of(model, truth, "geotoken", "GeoToken")
    found += methods_of(neighbors, truth, "top1_neighbor", "Top-1 neighbor")
    ordered = in_order(found, "geotoken")
    assert [m.name for m in ordered] == [
        "Top-1 neighbor",
        "GeoToken: greedy",
        "GeoToken: log probability",
        "Top-1 neighbor: ideal of 2 candidates",
        "GeoToken: ideal of up to 3 candidates",
    ]
    assert [m.bound for m in ordered] == [False, False, False, True, True]
    km = {m.name: m.km for m in ordered}
    np.testing.assert_allclose(km["GeoToken: greedy"], [500, 20])
    np.testing.assert_allclose(km["GeoToken: log probability"], [100, 3000])
    np.testing.assert_allclose(km["GeoToken: ideal of up to 3 candidates"], [10, 20])
    np.testing.assert_allclose(km["Top-1 neighbor: ideal of 2 candidates"], [0.5, 0.5])
    differences = score(ordered, truth)["differences"]
    assert [d["name"] for d in differences] == ["Top-1 neighbor", "GeoToken: log probability"]

    rows[1]["choices"] = {"greedy": 0, "log_probability": 2}  # its photo has two candidates
    with pytest.raises(TableError, match="'1' has no candidate for the choice 'log_probability'"):
        methods_of(read_coordinates(write(tmp_path / "m.jsonl", rows)), truth, "geotoken", "GeoToken")


def half_width(scored):
    return (scored["accuracy"][1]["high"] - scored["accuracy"][1]["low"]) / 2


def test_intervals_are_those_of_the_theory_and_authors_widen_them():
    n, group = 1000, 10
    km = np.where(np.arange(n) % 10 < 3, 5.0, 9000.0)  # 30 % within 25 km
    alone = score([method(km)], truth_of(n))["methods"][0]
    expected = 1.96 * math.sqrt(0.3 * 0.7 / n)
    assert half_width(alone) == pytest.approx(expected, rel=0.1)
    authors = [f"author {i // group}" for i in range(n)]
    same = np.where(np.arange(n) // group % 10 < 3, 5.0, 9000.0)  # all photos of an author have the same distance
    scored = score([method(same)], truth_of(n, authors))
    assert scored["authors"] == n // group
    assert half_width(scored["methods"][0]) == pytest.approx(expected * math.sqrt(group), rel=0.1)


def test_differences_are_paired():
    km = np.where(np.arange(1000) < 300, 5.0, 9000.0)
    better = km.copy()
    better[300:320] = 5.0  # 2 points, on 20 photos
    scored = score([method(km), method(better, "better"), method(km, "same")], truth_of(1000))
    reference, other, _ = scored["methods"]
    assert reference["accuracy"][1]["high"] > other["accuracy"][1]["low"]  # the two separate intervals overlap
    difference, none = (d["accuracy"][1] for d in scored["differences"])
    assert difference["value"] == 0.02
    assert 0.01 < difference["low"] < 0.02 < difference["high"] < 0.03
    assert difference["p"] == pytest.approx(2 / 2001, abs=1e-6)
    assert none == {"km": 25, "value": 0, "low": 0, "high": 0, "p": 1}


def test_the_seed_decides_the_intervals():
    km = np.where(np.arange(200) < 60, 5.0, 9000.0)
    first, again, other = (score([method(km)], truth_of(200), seed, resamples=150) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_anybodys_files_are_compared_and_tabulated(tmp_path):
    names = [f"{i:03d}" for i in range(100)]
    truth = tmp_path / "truth.csv"
    truth.write_text("IMG_ID,LAT,LON,AUTHOR\n" + "".join(f"{name}.jpg,0,0,someone\n" for name in names))
    ours = write(tmp_path / "ours.jsonl", [row(f"{name}.jpg", 5 * KM) for name in names])
    theirs = tmp_path / "a very long name of a method, as people give them.csv"
    theirs.write_text("id,lat,lng\n" + "".join(f"{name}.jpg,{100 * KM},0\n" for name in names[:90]))
    metrics = evaluate.compare_files([ours, theirs], truth, options(str(ours)))
    assert json.loads(json.dumps(metrics)) == metrics
    text = evaluate.table(metrics)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert "truth: 100 photos, 1 authors" in text
    (line,) = [line for line in lines if line.startswith("ours ")]
    assert line.split() == ["ours", "0.0", "100.0", "100.0", "100.0", "100.0", "5.0", "4,983"]
    assert "truth: percentage points above (+) or below (-) ours" in text
    assert text.replace("\n", " ").strip().endswith("10 photos have no prediction and count as wrong")
    heads = next(line for line in lines if "2,500 km" in line)
    assert heads.index("2,500 km") + len("2,500 km") == line.rindex("100.0") + len("100.0")  # columns are aligned


def test_a_strict_threshold_is_outside_of_itself(tmp_path):
    scored = evaluate.score([method([1, 25, 200, 750, 2500])], truth_of(5), "geotoken", 100, 0, strict=True)
    assert values(scored["methods"][0]) == [0.0, 0.2, 0.4, 0.6, 0.8]


def test_the_ellipsoid_moves_a_photo_over_a_threshold(tmp_path):
    truth = write(tmp_path / "t.jsonl", [row("a", 0)])
    found = write(tmp_path / "p.jsonl", [row("a", 0, 24.98 / 111.19493)])  # 25.008 km along the real equator
    near = {}
    for earth in ("sphere", "ellipsoid"):
        metrics = evaluate.compare_files([found], truth, options(str(found), earth=earth))
        near[earth] = values(metrics["splits"]["t"]["methods"][0])[1]
        assert f"on the {earth};" in evaluate.table(metrics)
    assert near == {"sphere": 1, "ellipsoid": 0}
    with pytest.raises(ValueError, match=r"config\.evaluate\.earth is 'flat': use sphere or ellipsoid"):
        options(earth="flat")


def test_any_two_methods_are_compared_on_request():
    km = np.where(np.arange(200) < 60, 5.0, 9000.0)
    better, best = km.copy(), km.copy()
    better[60:70], best[60:80] = 5.0, 5.0
    methods = [method(km), method(better, "b", choice="x"), method(best, "b", choice="y", main=False)]
    pairs = [("b:y", "b"), ("b", "b:y"), ("b:y", "absent")]
    first, second = evaluate.score(methods, truth_of(200), "geotoken", 200, 0, compare=pairs)["comparisons"]
    assert [a["value"] for a in first["accuracy"]] == [0, 0.05, 0.05, 0.05, 0.05]
    assert first["accuracy"][1]["low"] == -second["accuracy"][1]["high"] > 0
    assert first["accuracy"][1]["p"] < 0.05


def test_a_pair_that_nobody_has_is_named(tmp_path):
    truth, ours = (write(tmp_path / name, [row("a", 0)]) for name in ("t.jsonl", "ours.jsonl"))
    with pytest.raises(SettingsError, match=r"there is no method 'knn' to compare: use one of .*ours\.jsonl"):
        evaluate.compare_files([ours], truth, options(str(ours), compare=((str(ours), "knn"),)))
    with pytest.raises(ValueError, match="compare has 'knn': use pairs"):
        options(compare=("knn",))


def test_a_choice_may_be_a_point_of_its_own(tmp_path):
    candidates = [{"latitude": km * KM, "longitude": 0.0, "tokens": [1]} for km in (500, 100)]
    rows = [
        row("0", 0.5, choice="own", choices={"own": [0.5, 0], "other": 1}, candidates=candidates),
        row("1", 1.5, choice="own", choices={"own": [1.5, 0], "other": [20 * KM, 0]}, candidates=candidates),
    ]
    truth = truth_of(2)
    own, other, ideal = methods_of(read_coordinates(write(tmp_path / "m.jsonl", rows)), truth, "geotoken", "GeoToken")
    assert (own.choice, own.main, other.choice, other.main, ideal.bound) == ("own", True, "other", False, True)
    np.testing.assert_allclose(own.km, np.array([0.5, 1.5]) / KM)
    np.testing.assert_allclose(other.km, [100, 20])
    del rows[1]["choices"]["other"]
    with pytest.raises(TableError, match="'1' has no candidate for the choice 'other'"):
        methods_of(read_coordinates(write(tmp_path / "m.jsonl", rows)), truth, "geotoken", "GeoToken")


def test_continents_are_scored_apart(tmp_path):
    truth = tmp_path / "truth.csv"
    places = ["Japan", "FR", "India", "", "nowhere"]
    truth.write_text("id,lat,lon,country\n" + "".join(f"{n},0,0,{name}\n" for n, name in enumerate(places)))
    ours = write(tmp_path / "ours.jsonl", [row(str(n), n * 5 * KM) for n in range(5)])
    parts = evaluate.compare_files([ours], truth, options(str(ours)))["splits"]["truth"]["continents"]
    assert [(part["name"], part["photos"]) for part in parts] == [("Asia", 2), ("unknown", 2), ("Europe", 1)]
    assert [values(part["methods"][0])[0] for part in parts] == [0.5, 0, 0]
    truth.write_text("id,lat,lon\n" + "".join(f"{n},0,0\n" for n in range(5)))
    assert evaluate.compare_files([ours], truth, options(str(ours)))["splits"]["truth"]["continents"] == []


def sure(n, seed=0, exaggerated=1.0):
    """A method with calibrated probabilities within 25 km, or whose true odds are the stated odds to a power."""
    rng = np.random.default_rng(seed)
    p = rng.uniform(0, 1, n)
    true = p**exaggerated / (p**exaggerated + (1 - p) ** exaggerated)
    km = np.where(rng.random(n) < true, 10.0, 5000.0)
    within = np.full((n, 5), np.nan)
    within[:, 1] = p
    claims = Claims(within, np.stack([np.full(n, 20.0), np.full(n, 5000.0)], -1), np.empty((n, 0, 4)))
    return method(km, claims=claims)


def test_reliability_of_one_that_says_what_is_true_and_of_one_that_exaggerates():
    honest, boastful = (
        reliability.figures(sure(20_000, 0, power), np.zeros((20_000, 2)), False) for power in (1.0, 0.3)
    )
    assert honest["reliability"][0] is None  # no probability is stated within 1 km
    of = honest["reliability"][1]
    assert (of["km"], of["photos"], len(of["bins"])) == (25, 20_000, 10)
    assert of["error"] < 0.02 < 0.1 < boastful["reliability"][1]["error"]
    assert sum(b["photos"] for b in of["bins"]) == 20_000
    inside = [b["observed"]["low"] <= b["predicted"] <= b["observed"]["high"] for b in of["bins"]]
    assert sum(inside) >= 8
    assert (
        boastful["reliability"][1]["bins"][9]["observed"]["high"] < boastful["reliability"][1]["bins"][9]["predicted"]
    )


def test_the_share_that_radii_hold_has_wilsons_interval():
    found = reliability.figures(sure(400), np.zeros((400, 2)), False)
    half, most = found["radii"]
    assert (half["percent"], most["percent"], half["median_km"], most["holds"]["value"]) == (50, 90, 20, 1)
    km = sure(400).km
    share = (km <= 20).mean()
    assert half["holds"]["value"] == pytest.approx(share)
    assert half["holds"]["high"] - half["holds"]["low"] == pytest.approx(
        2 * 1.96 * np.sqrt(share * (1 - share) / 400), rel=0.02
    )
    assert most["holds"]["low"] == pytest.approx(400 / (400 + 1.96**2), abs=1e-4)  # below 1, although it was 400 of 400


def test_abstention_keeps_the_surest_and_ends_at_everything():
    made = sure(1000)
    by_probability, by_radius = reliability.figures(made, np.zeros((1000, 2)), False)["abstention"].values()
    accuracy = [of["accuracy"][1] for of in by_probability]
    assert accuracy[0] > 0.9 > 0.55 > accuracy[-1]
    assert by_probability[-1]["answered"] == 1 and accuracy[-1] == pytest.approx((made.km <= 25).mean())
    assert by_probability[-1]["geoscore"] == pytest.approx(distance.geoscore(made.km).mean(), abs=1e-6)
    order = np.argsort(-made.claims.within[:, 1])
    assert by_probability[9]["accuracy"][1] == pytest.approx((made.km[order[:500]] <= 25).mean())
    assert by_radius[0]["accuracy"][1] == pytest.approx((made.km[:50] <= 25).mean())  # all radii are equal


def test_a_photo_without_a_prediction_is_the_least_sure(tmp_path):
    truth = read_coordinates(write(tmp_path / "t.jsonl", [row(str(n), 0) for n in range(4)]))
    rows = [row("3", 0, within={"25": 0.1}), row("1", 0, within={"25": 0.2}), row("0", 50, within={"25": 0.3})]
    (made,) = methods_of(read_coordinates(write(tmp_path / "p.jsonl", rows)), truth, "geotoken", "G")
    found = reliability.figures(made, truth.coordinates, False)
    assert found["reliability"][1]["photos"] == 3 and found["radii"] == [None, None]
    assert found["reliability"][1]["observed"]["value"] == pytest.approx(2 / 3, abs=1e-6)
    (curve,) = found["abstention"].values()
    assert [of["accuracy"][1] for of in curve if of["answered"] in (0.25, 0.5, 0.75, 1)] == [0, 0.5, 0.666667, 0.5]


def test_recall_against_area_of_circles_and_of_cells(tmp_path):
    truth = read_coordinates(write(tmp_path / "t.jsonl", [row(str(n), 10, 20) for n in range(5)]))

    def center(level, latitude=10.0, longitude=20.0):
        scheme = CellScheme(level, 1)
        return [level, *(float(x) for x in scheme.decode(scheme.encode(latitude, longitude)))]

    far = center(10, -40, 100)
    scheme = CellScheme(10, 1)
    beside = np.asarray(scheme.encode(10.0, 20.0)) ^ ([0] * 10 + [1])  # of the same parent
    sibling = [10, *(float(x) for x in scheme.decode(beside))]
    cells = [
        [[*center(10), 0.5], [*far, 0.3]],  # 81 km2, with the first cell
        [[*sibling, 0.6], [*center(10), 0.3]],  # with the second cell
        [[0, 0, 0, 0.7], [*center(10), 0.3]],  # the small cell has a higher probability per km2 than its face
        [[*far, 0.6], [-1, 0, 0, 0.4]],  # the cell is the whole Earth, larger than any requested area
        [[*far, 0.6]],  # never
    ]
    listed = [[dataclasses.asdict(Cell(*cell)) for cell in some] for some in cells]
    rows = [row(str(n), 10 + 10 * KM, 20, cells=some) for n, some in enumerate(listed)]
    (made,) = methods_of(read_coordinates(write(tmp_path / "p.jsonl", rows)), truth, "geotoken", "G")
    circle, searched = reliability._searched_km2(made, truth.coordinates)
    np.testing.assert_allclose(circle, np.pi * 100, rtol=1e-5)
    earth = 4 * np.pi * EARTH_RADIUS_KM**2
    one = earth / 6 / 4**10
    np.testing.assert_allclose(searched, [one, 2 * one, one, earth + one, np.inf])
    area = {of["km2"]: of for of in reliability.figures(made, truth.coordinates, False)["area"]}
    assert (area[100]["circle"], area[1000]["circle"]) == (0, 1)
    assert (area[10]["cells"], area[100]["cells"], area[1000]["cells"], area[1e8]["cells"]) == (0, 0.4, 0.6, 0.6)


def test_anybodys_columns_of_radius_and_probability_are_used(tmp_path):
    truth = tmp_path / "truth.csv"
    truth.write_text("id,lat,lon\n" + "".join(f"{n},0,0\n" for n in range(10)))
    table = tmp_path / "ours.csv"
    lines = [f"{n},{n * 5 * KM},0,{0.9 - n / 20},22,{'' if n == 9 else 30}" for n in range(10)]
    table.write_text("id,lat,lon,Within_25,radius_km,radius_90_km\n" + "\n".join(lines) + "\n")
    as_json = [
        row(str(n), n * 5 * KM, within={"25": 0.9 - n / 20}, radius_km=22, **({} if n == 9 else {"radius_90_km": 30}))
        for n in range(10)
    ]
    lined = write(tmp_path / "ours.jsonl", as_json)
    found = []
    for path in (table, lined):
        metrics = evaluate.compare_files([path], truth, options(str(path)))
        found.append(metrics["splits"]["truth"]["uncertainty"])
        text = evaluate.table(metrics)
        assert "truth: stated uncertainty of ours" in text
        assert "The 50 % radius contains the truth of 50.0 % (23.7-76.3) of 10 photos; median 22.0 km" in text
        assert "The 90 % radius contains the truth of 77.8 %" in text
        assert max(map(len, text.splitlines())) <= 100
    assert found[0] == found[1]
    assert json.loads(json.dumps(found[0])) == found[0]


def test_what_is_predicted_is_what_evaluation_reads(tmp_path):
    answer = Prediction(
        *(1.0, 2.0, 30.0, 400.0, {25: 0.4, 200: 0.9}),
        candidates=(Candidate(1.0, 2.0, 0.3),),
        cells=(Cell(20, 1.0, 2.0, 0.3), Cell(3, 10.0, 2.0, 0.2)),
        neighbors=(Neighbor("a", 1.0, 2.0, 2.5, 0),),
    )
    claims = read_coordinates(write(tmp_path / "p.jsonl", [{"id": "x", **answer.plain()}])).claims
    assert claims.radius_km.tolist() == [[30, 400]]
    np.testing.assert_equal(claims.within, [[np.nan, 0.4, 0.9, np.nan, np.nan]])
    assert claims.cells.tolist() == [[[20, 1, 2, 0.3], [3, 10, 2, 0.2]]]


def test_files_with_equal_names_have_different_names_in_tables(tmp_path):
    truth = write(tmp_path / "truth.jsonl", [row("a", 0)])
    files = [tmp_path / name for name in ("a/test.csv", "b/test.csv", "b/other.csv")]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text("id,lat,lng\na,0,0\n")

    def names(*paths):
        metrics = evaluate.compare_files(paths, truth, options(str(paths[0])))
        return [m["name"] for m in metrics["splits"]["truth"]["methods"]]

    assert names(files[0], files[2]) == ["test", "other"]
    assert names(*files) == [str(files[0]), str(files[1]), "other"]
    both = write(tmp_path / "test.jsonl", [row("a", 0, candidates=[{"latitude": 0, "longitude": n} for n in range(2)])])
    assert names(both, files[0])[:2] == [str(both), str(files[0])]
    assert names(both)[1] == "test: ideal of 2 candidates"
    with pytest.raises(TableError, match=r"test\.csv is given more than once: give it once"):
        names(files[0], files[0])


def test_all_tables_of_differences_have_one_sign_and_spaces_between_intervals(tmp_path):
    truth = write(tmp_path / "truth.jsonl", [row(str(n), 0) for n in range(20)])
    a, b, c = (
        write(tmp_path / f"{name}.jsonl", [row(str(n), km * KM) for n in range(20)])
        for name, km in (("a", 5000), ("b", 0.5), ("c", 5000))
    )
    metrics = evaluate.compare_files([a, b, c], truth, options(str(a), compare=((str(b), str(c)), (str(a), str(b)))))
    text = evaluate.table(metrics)
    tables = text.split("above (+) or below (-) ")[1:]
    assert [table.split("\n")[0] for table in tables] == ["a", "c", "b"]
    rows = [next(line.split() for line in table.splitlines()[2:]) for table in tables]
    assert rows == [["b", *["+100.0"] * 5], ["b", *["+100.0"] * 5], ["a", *["-100.0"] * 5]]
    assert text.count("+100..+100 ") > 4 and text.count("-100..-100 ") == 4 and "100-100" in text


def test_every_file_with_radii_has_its_uncertainty_in_the_table(tmp_path):
    truth = write(tmp_path / "truth.jsonl", [row("a", 0), row("b", 0)])
    files = [write(tmp_path / f"{n}.jsonl", [row("a", 0, radius_km=5), row("b", n, radius_km=5)]) for n in (1, 2)]
    bare = write(tmp_path / "bare.jsonl", [row("a", 0)])
    text = evaluate.table(evaluate.compare_files([bare, *files], truth, options(str(bare))))
    assert "stated uncertainty of 1\n" in text and "stated uncertainty of 2\n" in text
    assert "stated uncertainty of bare" not in text and text.count("50 % radius contains") == 2


def test_metrics_are_written_to_a_file_whose_ending_chooses_the_form(tmp_path, capsys):
    truth, ours = (
        write(tmp_path / f"{name}.jsonl", [row("a", km * KM), row("b", 0, 1)])
        for name, km in (("truth", 0), ("ours", 0.5))
    )
    arguments = ["evaluate", f"--predictions={ours}", f"--truth={truth}"]
    for name in ("metrics.json", "metrics.CSV"):
        with pytest.raises(SystemExit) as done:
            cli.main([*arguments, f"--output={tmp_path / name}"])
        assert done.value.code == 0 and f"wrote {tmp_path / name}" in capsys.readouterr().out
    assert json.loads((tmp_path / "metrics.json").read_text())["splits"]["truth"]["photos"] == 2
    (line,) = csv.DictReader((tmp_path / "metrics.CSV").open())
    assert (line["name"], line["within_1_km"], line["within_2500_km_high"], line["median_km"]) == (
        "ours", "1.0", "1.0", "0.25",
    )  # fmt: skip
    wrong = {
        "metrics.txt": r"no known ending: use \.json or \.csv",
        "none/m.csv": r"cannot be written \(No such file or directory\): choose a file in a folder that exists",
    }
    for name, message in wrong.items():
        with pytest.raises(SystemExit) as done:
            cli.main([*arguments, f"--output={tmp_path / name}"])
        assert done.value.code == 2 and re.search(message, capsys.readouterr().err)
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--output=x.csv"])
    assert "--output needs --predictions=FILE" in capsys.readouterr().err
