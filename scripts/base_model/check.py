"""Asks whether a base model learns the bundled task fast: `PYTHONPATH=scripts python -m base_model.check --model DIR`.

Fine-tunes a LoRA adapter on bundled training rows with plain torch and PEFT, and prints valid JSON and exact matches before and after,
on the last 300 training rows, which it leaves out of training: whatever is chosen by this script is not chosen on the held-out rows that
the quickstart scores. The product's own path is `exactune quickstart`.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, get_cosine_schedule_with_warmup

from exactune.train.grouping import LengthGroupedSampler

DEVELOPMENT = 300  # training rows left out, to choose by
DATASET = Path(__file__).parents[2] / "src" / "exactune" / "assets" / "dataset"


def rows_of(split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATASET / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


@torch.no_grad()
def scores(model, tokenizer, rows: list[dict[str, str]], batch: int) -> dict[str, float]:
    """Shares of valid JSON and of exact matches, greedily decoded."""
    tokenizer.padding_side = "left"
    model.eval()
    answers, start = [], time.perf_counter()
    rows = sorted(rows, key=lambda row: len(row["response"]))
    for at in range(0, len(rows), batch):
        chats = [[{"role": "user", "content": row["instruction"]}] for row in rows[at : at + batch]]
        inputs = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True, padding=True, return_tensors="pt")
        made = model.generate(**inputs.to(model.device), max_new_tokens=200, do_sample=False)
        answers += tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    exact = sum(answer == row["response"] for answer, row in zip(answers, rows, strict=True))
    misses = [(a, r["response"]) for a, r in zip(answers, rows, strict=True) if a != r["response"]]
    for answer, wanted in misses[:: max(1, len(misses) // 4)][:4]:
        print(f"  wanted {wanted}\n  got    {answer[:300]}")
    seconds = round(time.perf_counter() - start, 1)
    return {"valid_json": sum(map(is_json, answers)) / len(rows), "exact_match": exact / len(rows), "seconds": seconds}


def tokenised(tokenizer, row: dict[str, str]) -> tuple[list[int], list[int]]:
    """Ids and labels of one row; only the answer is trained on."""
    chat = [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["response"]}]
    encoding = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    ids = encoding["input_ids"]
    return ids, [token if trained else -100 for token, trained in zip(ids, encoding["assistant_masks"], strict=True)]


def padded(rows: list[list[int]], value: int, device) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value).to(device)


def order_of(examples: list, args: argparse.Namespace) -> list[int]:
    """Row numbers in the order of the quickstart: length-grouped, another order each epoch."""
    sampler, order = LengthGroupedSampler([len(ids) for ids, _ in examples], args.batch, args.seed), []
    while len(order) < args.steps * args.batch:
        order += sampler
        sampler.set_epoch(len(order) // len(examples))
    return order


def fine_tune(model, tokenizer, args: argparse.Namespace) -> None:
    examples = [tokenised(tokenizer, row) for row in rows_of("train")[:-DEVELOPMENT]]
    order = order_of(examples, args)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=args.learning_rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, 10, args.steps)
    model.train()
    start = time.perf_counter()
    for step in range(args.steps):
        chosen = [examples[i] for i in order[step * args.batch : (step + 1) * args.batch]]
        ids = padded([ids for ids, _ in chosen], tokenizer.pad_token_id, model.device)
        labels = padded([labels for _, labels in chosen], -100, model.device)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % 50 == 0:
            print(f"  step {step + 1} loss {loss.item():.4f} {time.perf_counter() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--load-in-4bit", action="store_true", help="keep the base in NF4")
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradients")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    quantised = {"quantization_config": nf4} if args.load_in_4bit else {}
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, device_map={"": device}, **quantised)
    rows = rows_of("train")[-DEVELOPMENT:]
    print("before", scores(model, tokenizer, rows, batch=50), flush=True)
    model = get_peft_model(model, LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    fine_tune(model, tokenizer, args)
    print("after", scores(model, tokenizer, rows, batch=50), flush=True)


if __name__ == "__main__":
    main()
