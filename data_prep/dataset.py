"""Writes the metadata files with which photos/ is a TFDS data set and a Croissant data set.

Croissant is a format for the description of data sets (https://mlcommons.org/croissant).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from data_prep.sources import Provenance
from geotoken_jax import records
from geotoken_jax.manifests import write_json
from geotoken_jax.preparation import DatasetSettings

#: Field of a record in photos/ -> its description in Croissant.
_DESCRIPTIONS = {
    "id": "Id of the photo, unique in the data set.",
    "author": "Author of the photo; the photo's id if the author is unknown.",
    "image": "Encoded file of the photo.",
    "coordinates": "Latitude and longitude in degrees.",
    "tokens": "S2 cells of levels 0 to 20 that contain the place: the face (0 to 5), then a child (0 to 3) per level.",
    "captured": "Time at which the photo was taken, in seconds since 1970; NaN if unknown.",
    **{name: f"Name of the place's {name}; empty if unknown." for name in records.PLACE_FIELDS},
    "source": "Name of the source of the photo; empty for a benchmark.",
}
#: Field -> its type in Croissant, and the length of its array, 0 if it is not an array. Other fields are text.
_TYPES = {
    "image": ("sc:ImageObject", 0),
    "coordinates": ("cr:Float64", 2),
    "tokens": ("cr:UInt8", 1 + records.LEVEL),
    "captured": ("cr:Float64", 0),
}
_CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "arrayShape": "cr:arrayShape",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "containedIn": "cr:containedIn",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isArray": "cr:isArray",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "rai": "http://mlcommons.org/croissant/RAI/",
    "equivalentProperty": "cr:equivalentProperty",
}


def provenance(of_source: Provenance, settings: DatasetSettings) -> Provenance:
    """Returns the provenance of a source, in which texts of config.photos.dataset replace the source's own texts.

    An empty text in config.photos.dataset replaces nothing.
    """
    stated = {name: getattr(settings, name) for name in ("license", "terms", "citation", "homepage")}
    return dataclasses.replace(of_source, **{name: text for name, text in stated.items() if text})


def write(
    folder: epath.Path,
    name: str,
    ledgers: Mapping[str, Sequence[Mapping[str, Any]]],
    stated: Provenance,
    sources: bool = False,
) -> None:
    """Writes dataset_info.json, features.json and croissant.json into the folder of the data set.

    Afterwards `tfds.data_source(name, data_dir=DATA_DIR)` opens the data set.

    folder: DATA_DIR/NAME/VERSION. ledgers: split -> contents of each shard's ledger. stated: origin and terms of the
    photos. sources: whether the photos are of several sources.
    """
    import tensorflow_datasets as tfds

    features = records.photo_features(sources)
    description = f"Photos with their coordinates, place names and level-20 S2 tokens. {stated.origin} {stated.terms}"
    split_infos = []
    for split, split_ledgers in ledgers.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name=name, split=split, filetype_suffix="array_record"
        )
        split_infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[ledger["photos"] for ledger in split_ledgers],
                num_bytes=sum(ledger["bytes"] for ledger in split_ledgers),
                filename_template=template,
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features,
        version=folder.name,
        split_infos=split_infos,
        filename_template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        description=description,
        homepage=stated.homepage or None,
        citation=stated.citation or None,
        license=f"{stated.license}. {stated.terms}",
        check_data=False,  # the check needs TensorFlow, which is not installed
    )
    write_json(
        folder / "croissant.json", _croissant(name, folder.name, description, list(ledgers), stated, list(features))
    )


def _croissant(
    name: str, version: str, description: str, splits: Sequence[str], stated: Provenance, features: Sequence[str]
) -> dict[str, Any]:
    """Returns the contents of croissant.json: terms, files per split, and fields.

    Croissant does not support ArrayRecord. The file therefore describes the data set, but a Croissant reader cannot
    load the records by it. A record is a tf.train.Example, and `column` in a field is the name of its value there.
    """
    optional = {"citeAs": stated.citation, "url": stated.homepage}
    return {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "name": name,
        "version": version,
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "description": description,
        "license": stated.license,
        **{key: text for key, text in optional.items() if text},
        "distribution": [_files(name, split) for split in splits],
        "recordSet": [_record_set(split, features) for split in splits],
    }


def _files(name: str, split: str) -> dict[str, Any]:
    return {
        "@type": "cr:FileSet",
        "@id": f"files-{split}",
        "name": f"files-{split}",
        "description": f"ArrayRecord shards of the split {split}.",
        "encodingFormat": "application/x-array-record",
        "includes": f"{name}-{split}.array_record-*",
    }


def _record_set(split: str, features: Sequence[str]) -> dict[str, Any]:
    fields = []
    for name, meaning in ((name, meaning) for name, meaning in _DESCRIPTIONS.items() if name in features):
        kind, length = _TYPES.get(name, ("sc:Text", 0))
        shape = {"isArray": True, "arrayShape": str(length)} if length else {}
        source = {"fileSet": {"@id": f"files-{split}"}, "extract": {"column": name}}
        field = {"@type": "cr:Field", "@id": f"{split}/{name}", "name": name, "description": meaning}
        fields.append({**field, "dataType": kind, **shape, "source": source})
    return {
        "@type": "cr:RecordSet",
        "@id": split,
        "name": split,
        "description": f"Photos of the split {split}, one record per photo.",
        "field": fields,
    }
