"""The records of a TFDS dataset."""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokmat_jax.config import DataConfig
from tokmat_jax.data.content import folder_digests
from tokmat_jax.data.sources.records import Unit, record_text
from tokmat_jax.errors import UserError, one_line

_UNIT_RECORDS = 16_384


def units(dataset: str, config: DataConfig) -> list[Unit]:
    """Units of some thousand records each; raises UserError if the split cannot be read."""
    total = len(_records(dataset, config))
    return [Unit(None, begin, min(begin + _UNIT_RECORDS, total)) for begin in range(0, total, _UNIT_RECORDS)]


def documents(dataset: str, config: DataConfig, part: Unit) -> Iterator[str | None]:
    """The texts of the records of `part`; if a record cannot be read, raises UserError with its index."""
    records, (name, _) = _records(dataset, config), _name_and_split(dataset)
    for index in range(len(records))[part.begin : part.end]:
        where = f"tfds:{name} record {index}"
        try:
            record = records[index]
        except Exception as error:  # whatever the library of the files' format raises
            raise UserError(f"{where} cannot be read: {one_line(error)}") from None
        yield record_text(record, config.text_field, where)


def identity(dataset: str, config: DataConfig) -> list[Any]:
    """The split, and digests of the files of a folder or the name of the dataset."""
    name, split = _name_and_split(dataset)
    if Path(name).is_dir():
        return [split, folder_digests(Path(name), Path(config.prepared_dir))]
    return [split, name, config.tfds_data_dir]


def _name_and_split(dataset: str) -> tuple[str, str]:
    """Name or folder of a dataset, and its split."""
    if Path(dataset).is_dir():
        return dataset, "train"
    name, _, split = dataset.partition("#")
    return name, split or "train"


def _records(dataset: str, config: DataConfig) -> Any:
    """Random access to the records of a split."""
    import tensorflow_datasets as tfds

    name, split = _name_and_split(dataset)
    try:
        if Path(name).is_dir():
            builder: Any = tfds.builder_from_directory(Path(name).absolute())  # a leading ~ is a folder, too
            return builder.as_data_source(split=split)
        return tfds.data_source(name, split=split, data_dir=config.tfds_data_dir)
    except tfds.core.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)
        near = difflib.get_close_matches(name.split("/")[0], known, 3, cutoff=0.5)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise UserError(f"data.source: TFDS knows no dataset {name!r} and it is no folder{hint} "
                        f"(some built-in sets are known only if TensorFlow is installed)") from None
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"data.source: TFDS cannot read {name!r}, split {split!r}: {reason}") from None
