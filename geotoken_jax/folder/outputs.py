"""Files of answers for tables, maps and browsers: CSV, JSON lines, GeoJSON, KML and HTML.

Each answer is first added to FILE.partial as a line of JSON. An interrupted run therefore loses no answer. At the end,
FILE is written from these lines. It appears only when it is complete.
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

#: An answer: the photo's `id`, and the fields of Prediction.plain. An unknown answer has the field `unknown` instead of
#: latitude, longitude and place.
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
    """A file of answers. The ending of its name determines the format."""

    def __init__(self, path: Path, identity: str):
        """Begins the file, or continues a file that an interrupted run began with the same model.

        identity: text that identifies the model. Raises SettingsError if the ending is unknown, if the
        file exists, if it was begun with another model, or if it cannot be written.
        """
        if path.suffix.lower() not in FORMATS:
            raise SettingsError(f"--output={path} has no known ending: use one of {', '.join(FORMATS)}")
        self._path, self._partial = path, path.with_name(path.name + ".partial")
        if path.exists() and not self._partial.exists():  # if both exist, `finish` was interrupted before its last step
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
        complete = b""
        if self._partial.exists():
            data = self._partial.read_bytes()
            complete = data[: data.rfind(b"\n") + 1]  # the last line can be incomplete after an interruption
        if not complete:
            self._partial.write_text(json.dumps({"model": identity}) + "\n")
        elif json.loads(complete.split(b"\n", 1)[0]) != {"model": identity}:
            raise SettingsError(f"{self._partial} was begun with another model: remove it, or choose another --output")
        else:
            os.truncate(self._partial, len(complete))
        return self._partial.open("a", encoding="utf-8")

    def answers(self) -> Iterator[Answer]:
        """Yields the answers in FILE.partial, including answers of earlier runs."""
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

        photos: path or bytes of each photo, by id. HTML pages show the photos. Answers of other photos are left out.
        min_within: condition on answers. Answers that do not meet it are written as unknown.
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
    """A condition on answers: the probability of an error of at most `km` kilometers is at least `probability`."""

    km: int
    probability: float

    @classmethod
    def read(cls, text: str) -> "MinWithin":
        """Returns the condition from a text KM:PROBABILITY, e.g. 25:0.5. Raises SettingsError if it is invalid."""
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
    """Returns the answer, or an unknown answer if it does not meet the condition. min_within: condition, or None."""
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
    """Returns an answer as one row of a table, with a column per distance of `within`, and with `unknown` as text."""
    shares = {f"within_{km}": share for km, share in answer.get("within", {}).items()}
    return {**answer, **shares, "unknown": "true" if answer.get("unknown") else "false"}


def _geojson(answers: Iterable[Answer], photos: Mapping[str, Any]) -> Iterator[str]:
    yield '{"type": "FeatureCollection", "features": ['
    for number, answer in enumerate(answers):
        row = {**_row(answer), "unknown": "unknown" in answer}
        properties = {name: row[name] for name in _COLUMNS if name in row and name not in ("latitude", "longitude")}
        point = None  # RFC 7946, section 3.2: a feature without a location
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


#: Ending of a file's name -> function that yields the text of the file. Its arguments are the answers, and the photos
#: of Output.finish.
FORMATS: dict[str, Callable[[Iterable[Answer], Mapping[str, Any]], Iterator[str]]] = {
    ".csv": _csv,
    ".jsonl": _json_lines,
    ".geojson": _geojson,
    ".kml": _kml,
    ".html": _html,
}
