"""Every way to read rows, and every way they can be wrong."""

import gzip
import json

import pytest

from exactune.data import read_rows
from exactune.errors import ConfigError, DataError

ROWS = [{"instruction": "a", "response": "1"}, {"instruction": "b", "response": "2"}]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write(tmp_path, kind):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / f"rows.{kind}"
    if kind in ("jsonl", "ndjson"):
        jsonl(path, ROWS)
    elif kind == "json":
        path.write_text(json.dumps(ROWS, indent=2))
    elif kind == "data.json":
        path.write_text(json.dumps({"version": 1, "data": ROWS}))
    elif kind == "csv":
        path.write_text("instruction,response\na,1\nb,2\n")
    elif kind == "tsv":
        path.write_text("instruction\tresponse\na\t1\nb\t2\n")
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
    elif kind == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(str(path))
    elif kind == "saved_dict":
        datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(path))
    elif kind == "folder":
        path.mkdir()
        jsonl(path / "train.jsonl", ROWS)
        jsonl(path / "test.jsonl", ROWS[:1])
    return path


@pytest.mark.parametrize(
    "kind", ["jsonl", "ndjson", "json", "data.json", "csv", "tsv", "parquet", "jsonl.gz", "saved", "saved_dict", "folder"]
)
def test_every_kind_of_source_gives_the_same_rows(tmp_path, kind):
    assert read_rows(write(tmp_path, kind)).records == ROWS


def test_memory_dataset_and_list_of_files(tmp_path):
    import datasets

    assert read_rows(ROWS).records == ROWS
    assert read_rows(datasets.Dataset.from_list(ROWS)).records == ROWS
    both = read_rows([jsonl(tmp_path / "a.jsonl", ROWS), jsonl(tmp_path / "b.jsonl", ROWS)])
    assert len(both) == 4
    assert both.where(3) == "b.jsonl line 2"


def test_split_picks_from_a_folder_and_from_a_dataset_dict(tmp_path):
    import datasets

    folder = write(tmp_path, "folder")
    assert len(read_rows(folder, split="test")) == 1
    both = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])})
    assert len(read_rows(both, split="test")) == 1
    for source in (folder, both):
        with pytest.raises(DataError, match="validation"):
            read_rows(source, split="validation")
    with pytest.raises(ConfigError, match="one file"):
        read_rows(folder / "train.jsonl", split="test")


def test_numbers_are_real_lines(tmp_path):
    path = tmp_path / "gaps.jsonl"
    path.write_bytes("\ufeff".encode() + b'{"text": "a"}\r\n\r\n\n{"text": "b"}\n')
    assert read_rows(path).numbers == [1, 4]
    table = tmp_path / "wide.csv"
    table.write_text('text\n"two\nlines"\nlast\n')
    assert read_rows(table).numbers == [2, 4]
    assert read_rows(table).records[0] == {"text": "two\nlines"}


def test_missing_file_names_its_neighbours(tmp_path):
    jsonl(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"There is no file .*trian\.jsonl\.\n.*train\.jsonl"):
        read_rows(tmp_path / "trian.jsonl")


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_empty_file(tmp_path, content):
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"empty|no rows"):
        read_rows(path)


def test_a_line_that_is_not_json_is_named_with_its_first_words(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\nHello there, this is prose\n{"text": "b"}\n[1, 2]\n')
    with pytest.raises(DataError, match=r"rows\.jsonl, line 3: not JSON .*'Hello there, this is prose'"):
        read_rows(path)
    rows = read_rows(path, skip_bad_rows=True)
    assert [row["text"] for row in rows] == ["a", "b"]
    assert [number for number, _ in rows.skipped] == [3, 5]
    assert "[1, 2]" in rows.skipped[1][1]


def test_damaged_files(tmp_path):
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"text": "ok"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        read_rows(latin)
    half = tmp_path / "half.json"
    half.write_text('[{"text": "a"},\n')
    with pytest.raises(DataError, match="not JSON"):
        read_rows(half)
    parquet = tmp_path / "half.parquet"
    parquet.write_bytes(write(tmp_path, "parquet").read_bytes()[:100])
    with pytest.raises(DataError, match="not a whole Parquet"):
        read_rows(parquet)
    ragged = tmp_path / "ragged.csv"
    ragged.write_text("a,b\n1,2\n1,2,3\n")
    with pytest.raises(DataError, match="line 3: 3 cells where the header has 2"):
        read_rows(ragged)


def test_json_lines_under_the_name_of_json_are_read_as_lines(tmp_path):
    assert read_rows(jsonl(tmp_path / "rows.json", ROWS)).records == ROWS


def test_unknown_kinds(tmp_path):
    path = tmp_path / "rows.xlsx"
    path.write_bytes(b"PK")
    with pytest.raises(DataError, match=r"cannot tell what \.xlsx"):
        read_rows(path)
    with pytest.raises(DataError, match="holds no data files"):
        (tmp_path / "bare").mkdir()
        read_rows(tmp_path / "bare")
    with pytest.raises(DataError, match="list of dicts"):
        read_rows(42)
    with pytest.raises(DataError, match="row 2: not a dict but str"):
        read_rows([{"text": "a"}, "b"])


def test_a_hub_name_offline_is_an_error_that_says_so():
    with pytest.raises(DataError, match="no file or folder someone/some-rows"):
        read_rows("someone/some-rows")
