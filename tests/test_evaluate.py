import json
import math

import numpy as np
import pytest

from geotoken_jax.analysis import evaluate
from geotoken_jax.analysis.evaluate import FARTHEST_KM, Method, Points, PointsError
from geotoken_jax.geo.distance import EARTH_RADIUS_KM

KM = 180 / (math.pi * EARTH_RADIUS_KM)  # degrees of latitude


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(name, latitude, longitude=0.0, **more):
    return {"id": name, "latitude": latitude, "longitude": longitude, **more}


def truth_of(n, authors=None):
    extra = [{"author": authors[i]} if authors else {} for i in range(n)]
    return Points("truth", [str(i) for i in range(n)], np.zeros((n, 2)), np.zeros((n, 0, 2)), False, extra)


def method(km, variant="geotoken", **more):
    km = np.asarray(km, float)
    kind = {"choice": "", "main": True, "baseline": False, "bound": False, **more}
    return Method(variant=variant, name=variant, coordinates=np.zeros((len(km), 2)), km=km, **kind)


def score(methods, truth, seed=0, resamples=2000):
    return evaluate.score(methods, truth, "geotoken", resamples, seed)


def values(scored):
    return [a["value"] for a in scored["accuracy"]]


def test_json_lines_and_csv_read_alike(tmp_path):
    lines = write(tmp_path / "a.jsonl", [row("x", 1.5, -2.25, author="a"), row("7", -90, 180, author="b")])
    csv = tmp_path / "b.csv"
    csv.write_text('\ufeffIMG_ID,LAT, Lon,Author\nx,1.5,-2.25,a\n"7",-90,180,b\n')
    for points in (evaluate.read_points(lines), evaluate.read_points(csv)):
        assert points.ids == ["x", "7"]
        np.testing.assert_array_equal(points.coordinates, [[1.5, -2.25], [-90, 180]])
        assert [more["author"] for more in points.extra] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,latitude\nx,1\n", "line 2: no column longitude among id, latitude: name one longitude or lon or lng"),
        ('{"id": "x", "latitude": 1, "longitude": 2}\n{"latitude": 1}\n', "line 2: no column id"),
        ("id,lat,lng\nx,1,2\n\nx,1,2\n", "line 4: id 'x' is on line 2 too"),
        ('{"id": "x", "latitude": NaN, "longitude": 2}', "line 1: latitude of 'x' is nan: give degrees from -90 to 90"),
        ("id,lat,lng\nx,1,190\n", "line 2: longitude of 'x' is '190': give degrees from -180 to 180"),
        ("id,lat,lng\nx,,2\n", "line 2: latitude of 'x' is ''"),
        ("id,lat,lng\nParis, France,1,2\n", "line 2: more columns than the header"),
        ('{"id": "x"\n', "line 1: .*write one JSON object a line"),
        ('{"id": "x", "lat": 1, "lon": 2, "candidates": [[1, 2]]}', "line 1: candidates must be a list of objects"),
        ("id,lat,lng\n", "holds no points"),
    ],
)
def test_a_file_that_cannot_be_scored_says_where_and_how_to_mend_it(tmp_path, text, message):
    path = tmp_path / "points.txt"
    path.write_text(text)
    with pytest.raises(PointsError, match=f"points.txt.*{message}"):
        evaluate.read_points(path)


def test_a_threshold_includes_its_distance():
    assert values(score([method([1, 25, 200, 750, 2500])], truth_of(5))["methods"][0]) == [0.2, 0.4, 0.6, 0.8, 1.0]


def test_a_photo_without_a_prediction_is_wrong_and_counted(tmp_path):
    truth = evaluate.read_points(write(tmp_path / "t.jsonl", [row("a", 0), row("b", 10), row("c", 20), row("d", 30)]))
    points = evaluate.read_points(write(tmp_path / "p.jsonl", [row("c", 20 + 100 * KM), row("a", 0)]))
    scored = score(evaluate.methods_of(points, truth, "geotoken", "GeoToken"), truth)["methods"][0]
    assert values(scored) == [0.25, 0.25, 0.5, 0.5, 0.5]
    assert scored["missing"] == 2
    assert scored["mean_km"]["value"] == pytest.approx((100 + 2 * FARTHEST_KM) / 4)
    assert scored["median_km"] == pytest.approx((100 + FARTHEST_KM) / 2)


def test_a_prediction_of_an_unknown_photo_is_refused(tmp_path):
    points = evaluate.read_points(write(tmp_path / "p.jsonl", [row("0", 0), row("who", 0)]))
    with pytest.raises(PointsError, match=r"p\.jsonl predicts 'who' \(one of 1\), which truth does not hold"):
        evaluate.methods_of(points, truth_of(1), "geotoken", "GeoToken")


def test_choices_are_methods_and_the_best_candidate_is_a_bound(tmp_path):
    def candidates(*kilometers, **more):
        return [{"latitude": km * KM, "longitude": 0.0, **more} for km in kilometers]

    choices = {"greedy": 0, "log_probability": 1}
    rows = [
        row("0", 500 * KM, choice="greedy", choices=choices, candidates=candidates(500, 100, 10, tokens=[1])),
        row("1", 20 * KM, choice="greedy", choices=choices, candidates=candidates(20, 3000, tokens=[1])),
    ]
    truth = truth_of(2)
    model = evaluate.read_points(write(tmp_path / "model.jsonl", rows))
    neighbors = evaluate.read_points(
        write(
            tmp_path / "top1.jsonl", [row(str(i), KM, choice="top1", candidates=candidates(1, 0.5)) for i in range(2)]
        )
    )
    found = evaluate.methods_of(model, truth, "geotoken", "GeoToken")
    found += evaluate.methods_of(neighbors, truth, "top1_neighbor", "Top-1 neighbor")
    ordered = evaluate.in_order(found, "geotoken")
    assert [m.name for m in ordered] == [
        "Top-1 neighbor",
        "GeoToken: greedy",
        "GeoToken: log probability",
        "Best of 2 neighbors",
        "GeoToken: ideal of up to 3 candidates",
    ]
    assert [m.bound for m in ordered] == [False, False, False, True, True]
    km = {m.name: m.km for m in ordered}
    np.testing.assert_allclose(km["GeoToken: greedy"], [500, 20])
    np.testing.assert_allclose(km["GeoToken: log probability"], [100, 3000])
    np.testing.assert_allclose(km["GeoToken: ideal of up to 3 candidates"], [10, 20])
    np.testing.assert_allclose(km["Best of 2 neighbors"], [0.5, 0.5])
    differences = score(ordered, truth)["differences"]
    assert [d["name"] for d in differences] == ["Top-1 neighbor", "GeoToken: log probability"]

    rows[1]["choices"] = {"greedy": 0, "log_probability": 2}  # its photo has two candidates
    with pytest.raises(PointsError, match="'1' has no candidate for the choice 'log_probability'"):
        evaluate.methods_of(evaluate.read_points(write(tmp_path / "m.jsonl", rows)), truth, "geotoken", "GeoToken")


def half_width(scored):
    return (scored["accuracy"][1]["high"] - scored["accuracy"][1]["low"]) / 2


def test_intervals_are_those_of_the_theory_and_authors_widen_them():
    n, group = 1000, 10
    km = np.where(np.arange(n) % 10 < 3, 5.0, 9000.0)  # 30 % within 25 km
    alone = score([method(km)], truth_of(n))["methods"][0]
    expected = 1.96 * math.sqrt(0.3 * 0.7 / n)
    assert half_width(alone) == pytest.approx(expected, rel=0.1)
    authors = [f"author {i // group}" for i in range(n)]
    same = np.where(np.arange(n) // group % 10 < 3, 5.0, 9000.0)  # all photos of an author alike
    scored = score([method(same)], truth_of(n, authors))
    assert scored["authors"] == n // group
    assert half_width(scored["methods"][0]) == pytest.approx(expected * math.sqrt(group), rel=0.1)


def test_differences_are_paired():
    km = np.where(np.arange(1000) < 300, 5.0, 9000.0)
    better = km.copy()
    better[300:320] = 5.0  # 2 points, on 20 photos
    scored = score([method(km), method(better, "better"), method(km, "same")], truth_of(1000))
    reference, other, _ = scored["methods"]
    assert reference["accuracy"][1]["high"] > other["accuracy"][1]["low"]  # apart, they could be equal
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
    metrics = evaluate.compare_files([ours, theirs], truth, resamples=100, seed=0)
    assert json.loads(json.dumps(metrics)) == metrics
    text = evaluate.table(metrics)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert "truth: 100 photos, 1 authors" in text
    (line,) = [line for line in lines if line.startswith("ours ")]
    assert line.split() == ["ours", "0.0", "100.0", "100.0", "100.0", "100.0", "5.0", "4,983"]
    assert "truth: points above (+) or below (-) ours" in text
    assert text.replace("\n", " ").strip().endswith("10 photos have no prediction and count as wrong")
    heads = next(line for line in lines if "2,500 km" in line)
    assert heads.index("2,500 km") + len("2,500 km") == line.rindex("100.0") + len("100.0")  # columns line up
