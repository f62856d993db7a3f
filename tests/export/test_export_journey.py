"""The whole way in one command, on the bundled model: a run, merged, in four levels, each verified, measured and ready for Ollama."""

import json

import pytest
import yaml
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from exactune import assets
from exactune.cli.main import app

pytest.importorskip("llama_cpp", reason="files are judged by llama.cpp itself: pip install 'exactune[gguf]'")

LEVELS = ["f16", "q8_0", "q5_k_m", "q4_k_m"]


def exactune(*args):
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == 0, result.output
    return result.output


def train(folder, method):
    """A short run on a few of the bundled rows."""
    files = {}
    for split, count in (("train", 32), ("held_out", 6)):
        lines = assets.dataset(split).read_text(encoding="utf-8").splitlines()[:count]
        files[split] = folder / f"{split}.jsonl"
        files[split].write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {"max-steps": 6, "per-device-train-batch-size": 4, "gradient-accumulation-steps": 1, "learning-rate": 2e-3, "r": 8}
    answers = {"generate-rows": 3, "max-new-tokens": 24, "max-seq-length": 256}
    flags = [part for name, value in {**settings, **answers}.items() for part in (f"--{name}", value)]
    where = ["--model-name", assets.base_model(), "--dataset", files["train"], "--eval-dataset", files["held_out"], "--method", method]
    exactune("train", *where, "--output-dir", folder / "run", *flags)
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_from_a_run_to_files_for_ollama_in_one_command(tmp_path, method):
    run = train(tmp_path, method)
    said = exactune("export", run, "--merge", "--imatrix", "train", "--gguf", *LEVELS)

    folder = run / "gguf"
    names = [f"model-{level}.gguf" for level in LEVELS]
    assert {path.name for path in folder.iterdir()} == {*names, "Modelfile", "README.md", "compression.json", "compression.png"}
    assert "checks a file in llama.cpp" in said and f"ollama create NAME -f {folder / 'Modelfile'}" in said

    forms = json.loads((folder / "compression.json").read_text())["forms"]
    assert [form["form"] for form in forms[1:5]] == [f"GGUF {level}" for level in LEVELS]
    kl = {form["form"]: form["kl"] for form in forms}
    assert kl["GGUF f16"] < 1e-4 and kl["GGUF f16"] < kl["GGUF q8_0"] < kl["GGUF q5_k_m"] < kl["GGUF q4_k_m"] < 0.5
    assert {"merged, 16 bits", "int8, in memory", "NF4, in memory"} <= kl.keys()
    assert all(form["exact_match"] is not None and form["form"] in said for form in forms)

    _, header, body = (folder / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(header)["license"] == "psf-2.0"
    assert "| GGUF q4_k_m |" in body and json.loads((run / "data.json").read_text())["train"]["fingerprint"] in body
    assert f"method: {method}" in body
    assert "FROM ./model-f16.gguf" in (folder / "Modelfile").read_text()

    merged = AutoModelForCausalLM.from_pretrained(run / "merged")
    assert not getattr(merged.config, "quantization_config", None)
    for artefact in (run / "merged", folder / "model-q4_k_m.gguf"):
        assert "checks equal" in exactune("check", artefact, "--against", run)


def test_rows_of_ones_own_and_the_adapter_alone(tmp_path):
    run = train(tmp_path, "lora")
    rows = tmp_path / "mine.jsonl"
    rows.write_text("".join(json.dumps({"instruction": f"Say {word}.", "response": word}) + "\n" for word in ("one", "two", "three")))
    said = exactune("export", run, "--lora", "--gguf", "q8_0", "--evaluate", rows, "--evaluate-rows", "2", "--no-in-memory")
    cost = json.loads((run / "gguf" / "compression.json").read_text())
    assert (cost["source"], cost["rows"], len(cost["forms"])) == ("mine.jsonl", 2, 2)
    assert "model-lora.gguf" in said and "adapter's own effect" in said


def test_without_rows_the_files_are_written_all_the_same(tmp_path):
    said = exactune("export", assets.base_model(), "--to", tmp_path / "out")
    assert "--evaluate FILE names some" in said
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model-q8_0.gguf", "Modelfile", "README.md"}
