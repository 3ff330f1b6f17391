"""Files of answers for tables, maps and browsers: CSV, JSON lines, GeoJSON, KML and HTML.

Answers are first added to FILE.partial, a line of JSON each, so that an interrupted run loses none. At the end the file
is written from these lines and takes its name in one step.
"""

import csv
import dataclasses
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from geotoken_jax.geo.distance import THRESHOLDS_KM
from geotoken_jax.pages.answers import page, radii
from geotoken_jax.settings import SettingsError

#: An answer: `id`, and the fields of Prediction.plain. If it is unknown, `unknown` replaces latitude and longitude.
Answer = Mapping[str, Any]
_COLUMNS = (
    "id",
    "latitude",
    "longitude",
    "place",
    "radius_km",
    "radius_90_km",
    *(f"within_{km}" for km in THRESHOLDS_KM),
    "unknown",
)
#: Characters that XML 1.0 cannot contain, even escaped.
_NOT_IN_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Output:
    """A file of answers. Its ending chooses the format."""

    def __init__(self, path: Path, identity: str):
        """Begins the file, or continues one that was begun with the same model.

        identity: text that is different for different models. Raises SettingsError if the ending is unknown, if the
        file exists, if it was begun with another model, or if it cannot be written.
        """
        if path.suffix.lower() not in FORMATS:
            raise SettingsError(f"--output={path} has no known ending: use one of {', '.join(FORMATS)}")
        self._path, self._partial = path, path.with_name(path.name + ".partial")
        if path.exists() and not self._partial.exists():  # both exist if `finish` was interrupted at its end
            raise SettingsError(f"--output={path} exists: remove it, or choose another name")
        try:
            self._file = self._open(identity)
        except OSError as error:
            raise SettingsError(
                f"--output={path} cannot be written ({error.strerror}): choose a file in a folder that you may write to"
            ) from None
        #: Ids of the photos that have answers.
        self.done = {answer["id"] for answer in self.answers()}

    def _open(self, identity: str) -> Any:
        whole = b""
        if self._partial.exists():
            data = self._partial.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]  # an interruption can leave a part of the last line
        if not whole:
            self._partial.write_text(json.dumps({"model": identity}) + "\n")
        elif json.loads(whole.split(b"\n", 1)[0]) != {"model": identity}:
            raise SettingsError(f"{self._partial} was begun with another model: remove it, or choose another --output")
        else:
            os.truncate(self._partial, len(whole))
        return self._partial.open("a", encoding="utf-8")

    def answers(self) -> Iterator[Answer]:
        """Yields the answers that were added."""
        with self._partial.open(encoding="utf-8") as file:
            next(file)
            yield from map(json.loads, file)

    def add(self, answer: Answer) -> None:
        """Adds an answer."""
        self._file.write(json.dumps(answer) + "\n")
        self._file.flush()
        self.done.add(answer["id"])

    def finish(self, photos: Mapping[str, Any], min_within: "MinWithin | None" = None) -> int:
        """Writes the file, removes FILE.partial, and returns the number of answers.

        photos: id -> path or bytes of all photos, for pages that show them. The answers of other photos are left out.
        min_within: condition on answers; those that do not meet it are written as unknown.
        """
        self._file.close()
        answers = (judged(answer, min_within) for answer in self.answers() if answer["id"] in photos)
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        with temporary.open("w", encoding="utf-8", newline="") as file:
            for text in FORMATS[self._path.suffix.lower()](answers, photos):
                file.write(text)
        temporary.replace(self._path)
        self._partial.unlink()
        return len(self.done & photos.keys())


@dataclasses.dataclass(frozen=True)
class MinWithin:
    """A condition on answers: the probability to be within `km` is at least `probability`."""

    km: int
    probability: float

    @classmethod
    def read(cls, text: str) -> "MinWithin":
        """Returns the condition that KM:PROBABILITY, such as 25:0.5, describes. Raises SettingsError."""
        km, _, probability = text.partition(":")
        try:
            read = cls(int(km), float(probability))
        except ValueError:
            read = cls(0, 0.0)
        if read.km not in THRESHOLDS_KM or not 0 < read.probability <= 1:
            raise SettingsError(
                f"--min-within={text} is not KM:PROBABILITY: write one of the distances "
                f"{', '.join(map(str, THRESHOLDS_KM))} and a probability up to 1, as in --min-within=25:0.5"
            )
        return read


def judged(answer: Answer, min_within: MinWithin | None) -> Answer:
    """Returns the answer as it is if it meets the condition or if there is none, else as unknown."""
    if min_within is None or answer["within"].get(str(min_within.km), 0.0) >= min_within.probability:
        return answer
    kept = {name: value for name, value in answer.items() if name not in ("latitude", "longitude", "place")}
    return {"id": kept.pop("id"), "unknown": True, **kept}


def _json_lines(answers: Iterable[Answer], photos: Mapping[str, Any]) -> Iterator[str]:
    for answer in answers:
        yield json.dumps(answer) + "\n"


def _csv(answers: Iterable[Answer], photos: Mapping[str, Any]) -> Iterator[str]:
    yield _csv_line(_COLUMNS)
    for answer in answers:
        row = _row(answer)
        yield _csv_line([row.get(name, "") for name in _COLUMNS])


def _csv_line(values: Iterable[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue()


def _row(answer: Answer) -> dict[str, Any]:
    """Returns an answer as one row: id, coordinates, radii, a column for each distance of `within`, and `unknown`."""
    shares = {f"within_{km}": share for km, share in answer.get("within", {}).items()}
    return {**answer, **shares, "unknown": "true" if answer.get("unknown") else "false"}


def _geojson(answers: Iterable[Answer], photos: Mapping[str, Any]) -> Iterator[str]:
    yield '{"type": "FeatureCollection", "features": ['
    for number, answer in enumerate(answers):
        row = {**_row(answer), "unknown": "unknown" in answer}
        properties = {name: row[name] for name in _COLUMNS if name in row and name not in ("latitude", "longitude")}
        point = None  # RFC 7946, 3.2: a feature without a place
        if not row["unknown"]:
            point = {"type": "Point", "coordinates": [row["longitude"], row["latitude"]]}
        yield ("\n" if number == 0 else ",\n") + json.dumps(
            {"type": "Feature", "geometry": point, "properties": properties}
        )
    yield "\n]}\n"


def _kml(answers: Iterable[Answer], photos: Mapping[str, Any]) -> Iterator[str]:
    yield '<?xml version="1.0" encoding="UTF-8"?>\n<kml xmlns="http://www.opengis.net/kml/2.2"><Document>\n'
    for answer in answers:
        name = escape(_NOT_IN_XML.sub("\ufffd", answer["id"]))
        text, point = "; ".join([*([answer["place"]] if "place" in answer else []), radii(answer)]), ""
        if not answer.get("unknown"):
            point = f"<Point><coordinates>{answer['longitude']},{answer['latitude']}</coordinates></Point>"
        yield f"<Placemark><name>{name}</name><description>{escape(text)}</description>{point}</Placemark>\n"
    yield "</Document></kml>\n"


def _html(answers: Iterable[Answer], photos: Mapping[str, Any]) -> Iterator[str]:
    yield page([(answer, photos[answer["id"]]) for answer in answers])


#: Ending -> function that yields the text of a file with answers. photos: see Output.finish.
FORMATS: dict[str, Callable[[Iterable[Answer], Mapping[str, Any]], Iterator[str]]] = {
    ".csv": _csv,
    ".jsonl": _json_lines,
    ".geojson": _geojson,
    ".kml": _kml,
    ".html": _html,
}
