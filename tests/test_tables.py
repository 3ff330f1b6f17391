"""Tables of truth and predictions, as other programs and spreadsheets write them."""

import gzip
import json

import numpy as np
import pytest

from geotoken_jax import cli, tables
from geotoken_jax.analysis import evaluate
from geotoken_jax.analysis.coordinates import read_coordinates
from geotoken_jax.tables import TableError
from tests.test_evaluate import options

NAMES = ["x", "é", "z"]
ROWS = [{"id": name, "latitude": 1.5 + n, "longitude": -2.25} for n, name in enumerate(NAMES)]


def csv(delimiter=",", header=("id", "latitude", "longitude"), rows=ROWS) -> str:
    lines = [delimiter.join(header), *(delimiter.join(map(str, row.values())) for row in rows)]
    return "\n".join(lines) + "\n"


def parquet(path) -> bytes:
    arrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    writer.write_table(arrow.Table.from_pylist(ROWS), path / "made.parquet")
    return (path / "made.parquet").read_bytes()


FORMS = {
    "UTF-8": csv().encode(),
    "UTF-8 with a mark": csv().encode("utf-8-sig"),
    "UTF-16": csv().encode("utf-16"),
    "UTF-16, big end first": "\ufeff".encode("utf-16-be") + csv().encode("utf-16-be"),
    "semicolons": csv(";").encode(),
    "tabs": csv("\t").encode(),
    "CR alone": csv().replace("\n", "\r").encode(),
    "JSON lines": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    "an array on one line": json.dumps(ROWS).encode(),
    "an array on many lines": json.dumps(ROWS, indent=1).encode(),
    "gzip": gzip.compress(csv().encode()),
    "JSON lines in gzip": gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()),
    "Parquet": b"",
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_one_table_are_read_alike(tmp_path, form):
    path = tmp_path / "ends with nothing known"
    path.write_bytes(FORMS[form] or parquet(tmp_path))
    points = read_coordinates(path)
    assert points.ids == NAMES
    np.testing.assert_array_equal(points.coordinates, [(row["latitude"], row["longitude"]) for row in ROWS])


REFUSED = {
    "cp1252": (csv().encode("cp1252"), r"line 3: the row is not UTF-8 text, but perhaps Windows-1252"),
    "UTF-16 cut short": (csv().encode("utf-16")[:-1], "is not whole UTF-16 text"),
    "gzip cut short": (gzip.compress(csv().encode())[:-9], "is damaged or cut short"),
    "Parquet cut short": (b"PAR1" + bytes(40), "is damaged or cut short"),
    "a workbook": (b"PK\x03\x04" + bytes(60), "is a zip archive or an Excel workbook: save the table as a CSV"),
    "empty": (b"", "has no column id among '': add it"),
    "no rows": (b"[]", "has no rows"),
    "broken JSON": (b"[1, 2", "is not a JSON array"),
    "deep JSON": (b"[" * 100_000, "is not a JSON array"),
    "numbers in JSON": (b"[1, 2]", "item 1: 1 is not a JSON object"),
    "a latitude that is true": (b'{"id": 1, "latitude": true, "longitude": 2}', "latitude of 1 is True: give degrees"),
    "a latitude with 400 digits": (b'[{"id":1,"latitude":1%s,"longitude":2}]' % (b"0" * 400), "give degrees from -90"),
    "an id that is null": (b'{"id": null, "latitude": 1, "longitude": 2}', "line 1: the id is None: give each row"),
    "decimal commas": (csv(";").replace(".", ",").encode(), "latitude of 'x' is '1,5': give degrees"),
    "two latitudes": (b"id,lat,latitude,lon\nx,1,1,2\n", r"more than one column latitude \(lat, latitude\)"),
    "two notes": (b"id,lat,lon,note,note\nx,1,1,2,3\n", "more than one column note"),
    "a row cut short": (b"id,lat,lon\nx,1\n", "line 2: the row has fewer columns than the header"),
    "a word after a quote": (b'id,lat,lon\n"x"y,1,2\n', "line 2: the row cannot be read"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_tables_that_cannot_be_read_are_refused_in_a_sentence(tmp_path, form):
    data, message = REFUSED[form]
    (tmp_path / "t.csv").write_bytes(data)
    with pytest.raises(TableError, match=message) as error:
        read_coordinates(tmp_path / "t.csv")
    assert "t.csv" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("column", ["id", "latitude", "longitude", "note"])
@pytest.mark.parametrize("last", [4, 5, 12])
def test_a_quote_that_a_later_row_closes_swallows_no_row_in_silence(tmp_path, column, last):
    """A quote that opens in line 4 and closes in a later one; 4: closes in the same."""
    header = ["id", "latitude", "longitude", "note"]
    rows = [[f"p{n}", f"{n}.5", f"{-n}.5", f"a note {n}"] for n in range(40)]
    position = header.index(column)
    rows[2][position] = '"' + rows[2][position]
    rows[last - 2][position] += '"'
    (tmp_path / "t.csv").write_text("\n".join(",".join(row) for row in [header, *rows]) + "\n")
    if last == 4:
        assert len(read_coordinates(tmp_path / "t.csv").ids) == 40
        return
    with pytest.raises(TableError, match=r"line 4"):
        read_coordinates(tmp_path / "t.csv")


def test_values_over_several_lines_are_read(tmp_path):
    (tmp_path / "t.csv").write_text('note,id,lat,lon,more\n"two\nlines",a,1,2,"1,2\n3,4"\n"x, y\n\nz",b,3,4,5\n')
    points = read_coordinates(tmp_path / "t.csv")
    assert points.ids == ["a", "b"] and points.extra[0]["note"] == "two\nlines"


G3 = "IMG_ID,LAT,LON,LAT_pred,LON_pred\n" + "".join(f"{n},{n},10,{n},{10 + n}\n" for n in range(1, 5))


def test_predicted_columns_are_scored_and_not_the_truth_beside_them(tmp_path):
    (tmp_path / "g3.csv").write_text(G3)
    metrics = evaluate.compare_files([tmp_path / "g3.csv"], tmp_path / "g3.csv", options("g3"))
    assert metrics["splits"]["g3"]["methods"][0]["accuracy"][0]["value"] == 0
    (tmp_path / "half.csv").write_text(G3.replace("LON_pred", "other"))
    with pytest.raises(TableError, match="has no column predicted_longitude"):
        read_coordinates(tmp_path / "half.csv", predicted=True)


def test_a_truth_given_as_predictions_is_said(tmp_path):
    for name in ("truth.csv", "copy.jsonl"):
        (tmp_path / name).write_text(csv())
    with pytest.raises(TableError, match=r"copy\.jsonl has exactly the coordinates of .*truth\.csv for all 3 photos"):
        evaluate.compare_files([tmp_path / "copy.jsonl"], tmp_path / "truth.csv", options())


def test_files_of_one_name_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, shift in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        rows = [{**row, "latitude": row["latitude"] + shift} for row in ROWS]
        (tmp_path / folder / "test.csv").write_text(csv(rows=rows))
    (tmp_path / "truth.csv").write_text(csv())
    metrics = evaluate.compare_files(["a/test.csv", "b/test.csv"], "truth.csv", options("a/test.csv"))
    assert [method["name"] for method in metrics["splits"]["truth"]["methods"]] == ["a/test.csv", "b/test.csv"]
    with pytest.raises(TableError, match=r"--predictions=a/test\.csv is given more than once"):
        evaluate.compare_files(["a/test.csv", "a/test.csv"], "truth.csv", options("a/test.csv"))


def test_a_folder_or_a_missing_file_is_one_sentence(tmp_path, capsys):
    (tmp_path / "truth.csv").write_text(csv())
    for path, message in ((tmp_path, "cannot be used (Is a directory): name a file"), ("no.csv", "No such file")):
        with pytest.raises(SystemExit) as ended:
            cli.main(["evaluate", f"--predictions={path}", f"--truth={tmp_path / 'truth.csv'}"])
        printed = capsys.readouterr().err
        assert ended.value.code == 2 and printed.count("\n") == 1 and message in printed and str(path) in printed


@pytest.mark.slow
def test_random_bytes_are_read_or_refused(tmp_path):
    hypothesis = pytest.importorskip("hypothesis")
    strategies = hypothesis.strategies
    pieces = strategies.sampled_from(
        ["id,latitude,longitude\n", "id;lat;lng\n", "x,1,2\n", "y;1;2\n", '"', "\n", "\r", ",", "\ufeff", "[", "{",
         '{"id": "x", "lat": 1, "lon": 2}', "}", "]", "\0", "é", "\ud800", "9e999", "-0", "NaN"]
    )  # fmt: skip
    texts = strategies.lists(pieces | strategies.text(max_size=4), max_size=12).map("".join)
    codecs = strategies.sampled_from(["utf-8", "utf-16", "utf-16-le", "latin-1"])
    made = strategies.builds(lambda text, codec: text.encode(codec, "replace"), texts, codecs)
    path = tmp_path / "t"

    @hypothesis.settings(max_examples=300, deadline=None, database=None, derandomize=True)
    @hypothesis.given(made | strategies.binary(max_size=60) | made.map(gzip.compress))
    def check(data):
        path.write_bytes(data)
        try:
            rows = list(tables.read(path, optional=None))
        except TableError as error:
            assert str(path) in str(error)
            return
        assert all(row.fault or {"id", "latitude", "longitude"} <= row.values.keys() for row in rows)

    check()
