"""Puts a trained base model among the assets, with its card: `PYTHONPATH=scripts python -m base_model.install --from DIR`.

`DIR` is what `base_model.train` wrote. Refuses weights that are too large to bundle, that do not load, or whose record is missing.
"""

import argparse
import json
import shutil
from pathlib import Path
from string import Template

from base_model.stdlib_text import HELD_OUT_UNITS

ASSETS = Path(__file__).parents[2] / "src" / "exactune" / "assets" / "base_model"
CARD = Path(__file__).with_name("card.md")
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
MAX_WEIGHT_BYTES = 8_000_000


def card(record: dict, weight_bytes: int) -> str:
    """The model card, with every number from the record of the run."""
    perplexity = record["held_out_perplexity"]
    return Template(CARD.read_text(encoding="utf-8")).substitute(
        parameters=f"{record['parameters']:,}",
        megabytes=f"{weight_bytes / 1e6:.1f}",
        tokens=f"{record['tokens'] / 1e6:,.0f} million",
        steps=f"{record['steps']:,}",
        minutes=f"{record['minutes']:.1f}",
        device=record["device"],
        shape=record["shape"],
        plain_perplexity=f"{perplexity['plain']:.2f}",
        chat_perplexity=f"{perplexity['chat']:.2f}",
        held_out_units=", ".join(f"`{unit}`" for unit in sorted(HELD_OUT_UNITS)),
    )


def check_loads(folder: Path) -> None:
    """Loads strictly, tokenizer included, so that nothing broken is bundled."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    if info["missing_keys"] or info["unexpected_keys"]:
        raise SystemExit(f"{folder}: the weights do not fit the config: {info}")
    if len(AutoTokenizer.from_pretrained(folder)) != model.config.vocab_size:
        raise SystemExit(f"{folder}: the tokenizer does not fit the model.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--from", dest="source", type=Path, required=True)
    source = parser.parse_args().source
    record = json.loads((source / "record.json").read_text(encoding="utf-8"))
    weight_bytes = (source / "model.safetensors").stat().st_size
    if weight_bytes > MAX_WEIGHT_BYTES:
        raise SystemExit(f"{weight_bytes:,} bytes of weights; at most {MAX_WEIGHT_BYTES:,} are bundled.")
    check_loads(source)
    for name in FILES:
        shutil.copyfile(source / name, ASSETS / name)
    (ASSETS / "README.md").write_text(card(record, weight_bytes), encoding="utf-8")
    print(f"{ASSETS}: {weight_bytes / 1e6:.1f} MB of weights, perplexity {record['held_out_perplexity']}")


if __name__ == "__main__":
    main()
