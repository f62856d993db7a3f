"""Data sets of the `datasets` library: one split of a saved folder, of the hub's, or of what a script holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exactune.errors import ConfigError, DataError


def one_split(source: Any, split: str | None, origin: str) -> Any:
    """`source`, or one split of it where it is a `DatasetDict`."""
    if not (hasattr(source, "column_names") and isinstance(source, dict)):
        if split is not None:
            raise ConfigError(f"`split` ({split!r}) does not apply to {origin}: there are no splits in it.", "Leave `split` out.")
        return source
    if split is None and len(source) == 1:
        return next(iter(source.values()))
    wanted = split or "train"
    if wanted not in source:
        raise DataError(f"{origin} has no split {wanted!r}.", f"Its splits: {', '.join(map(str, source))}.")
    return source[wanted]


def is_saved(folder: Path) -> bool:
    """Whether `folder` was written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    return (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file()


def open_saved(folder: Path, split: str | None) -> Any:
    """The `datasets.Dataset` that was saved in `folder`, one split of several."""
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:  # what load_from_disk raises for damaged folders
        raise DataError(f"{folder}: not a whole saved data set ({error}).", "Save it again with `Dataset.save_to_disk`.") from error
    return one_split(found, split, str(folder))


def open_hub(name: str, split: str | None, *, streaming: bool = False) -> Any:
    """One split of the data set `owner/name` or `owner/name:config` on the hub; with `streaming` an `IterableDataset`."""
    import datasets

    owner_name, _, config = name.partition(":")
    try:
        found = datasets.load_dataset(owner_name, config or None, split=split, streaming=streaming)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataError(
            f"There is no file or folder {name}, and no such data set on the hub that you may read.", "Check the name."
        ) from error
    except (OSError, ValueError, RuntimeError) as error:  # offline and its kin; a config or split that is not there
        mend = "Without a network, give a local file or folder, or a data set that is in the cache already."
        raise DataError(f"There is no file or folder {name}, and the hub gave: {' '.join(str(error).split())[:300]}", mend) from error
    return one_split(found, None, name)
