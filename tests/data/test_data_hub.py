"""Rows of the hub, read while training: from a hub on this machine, in a process that knows no other."""

import json
import os
import subprocess
import sys
from pathlib import Path

from hub_server import hub_of

SCRIPT = """
import json, sys
from exactune.data import prepare
from exactune.data.stream import prepare_stream
from exactune.errors import DataError
from tiny import tiny_tokenizer

tokenizer = tiny_tokenizer()
stream = prepare_stream("owner/rows", tokenizer, max_length=48, split="train")
whole = prepare(sys.argv[1], tokenizer, max_length=48)
found = {"same": sorted(row["labels"] for row in stream.dataset) == sorted(whole.dataset["labels"]), "rows": len(stream.lengths)}
found["note"] = stream.notes[0]
for name, split in (("owner/none", None), ("owner/rows", "test")):
    try:
        prepare_stream(name, tokenizer, max_length=48, split=split)
    except DataError as error:
        found[f"{name} {split}"] = error.problem
print(json.dumps(found))
"""


def test_a_stream_of_the_hub_holds_its_rows_and_keeps_none(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"instruction": f"Say {i}", "response": str(i)}) + "\n" for i in range(1200)))
    with hub_of(path.read_bytes()) as address:
        online = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
        home = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": address, "PYTHONPATH": str(Path(__file__).parents[1])}
        done = subprocess.run([sys.executable, "-c", SCRIPT, path], env=online | home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["same"] and found["rows"] == 1000 and "first 1,000 rows" in found["note"]
    assert "no such data set on the hub" in found["owner/none None"]
    assert "test" in found["owner/rows test"]
    kept = [entry for entry in (tmp_path / "home").rglob("*") if entry.is_file() and entry.stat().st_size >= path.stat().st_size]
    assert not kept
