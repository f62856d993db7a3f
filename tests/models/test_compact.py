"""Rows that begin alike: their distinct tokens alone go through the model, and every number is that of the stock model on the rows."""

import pytest
import torch

from exactune.lora.live import Unreadable
from exactune.memory.policy import Policy, Tiling
from exactune.models import causal_loss
from exactune.models.accelerate import accelerate, report_of
from exactune.models.compact import compact
from exactune.models.fused_layer import FusedLayer
from exactune.models.fused_parts import FusedAttention
from exactune.models.trl_request import PerToken
from families import distance, loss_and_grads, tiny_model, with_lora

VOCABULARY = 150
PROMPT = 20


@pytest.fixture
def tokens_seen(monkeypatch):
    """(tokens that went through the model, places in the rows) of each pass whose rows were made compact."""
    seen, real = [], causal_loss.CausalForward._compact_head

    def spied(self, distinct, shifted, *rest):
        seen.append((distinct.ids.shape[1], shifted.numel()))
        return real(self, distinct, shifted, *rest)

    monkeypatch.setattr(causal_loss.CausalForward, "_compact_head", spied)
    return seen


def pairs(*, side: str = "right", tokens: int = 40) -> dict[str, torch.Tensor]:
    """Two pairs of answers, of unequal length, to two prompts: chosen, chosen, rejected, rejected, as preference trainers have them."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(1, VOCABULARY, (4, tokens), generator=generator)
    ids[2:, :PROMPT] = ids[:2, :PROMPT]
    mask = torch.ones_like(ids)
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    for row, short in enumerate((0, 3, 9, 1)):
        mask[row, tokens - short :] = 0
        labels[row, tokens - short :] = -100
    if side == "left":
        for row, by in enumerate((5, 2, 5, 2)):  # the rows of a prompt are padded alike
            ids[row], mask[row], labels[row] = (t[row].roll(by) for t in (ids, mask, labels))
            mask[row, :by], labels[row, :by] = 0, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def log_probs_and_grads(model, batch, **request):
    """Log-probabilities of the labels, their entropies, and the gradients of a sum that weighs every one of them otherwise."""
    model.zero_grad()
    out = model(**batch, token_log_probs=True, **request)
    weights = torch.linspace(0.5, 1.5, out.log_probs.numel()).to(out.log_probs).view_as(out.log_probs)
    (weights * out.log_probs + 0.3 * weights.flip(1) * out.entropy.detach() * out.log_probs).sum().backward()
    return out.log_probs.detach(), out.entropy.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def stock_log_probs(model, batch):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
    targets = batch["labels"][:, 1:]
    scored = targets != -100
    log_probs = logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * scored
    return log_probs, -(logits.exp() * logits).sum(-1).detach() * scored


def of_stock(model, batch):
    model.zero_grad()
    log_probs, entropy = stock_log_probs(model, batch)
    weights = torch.linspace(0.5, 1.5, log_probs.numel()).to(log_probs).view_as(log_probs)
    (weights * log_probs + 0.3 * weights.flip(1) * entropy * log_probs).sum().backward()
    return log_probs.detach(), entropy, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(found, truth, at_most=1e-6):
    torch.testing.assert_close(found[0], truth[0], rtol=at_most, atol=at_most)
    torch.testing.assert_close(found[1], truth[1], rtol=at_most, atol=at_most)
    assert found[2].keys() == truth[2].keys() and distance(found[2], truth[2]) < at_most


FAMILIES = ("llama", "gemma2", "qwen3", "phi3", "gpt_oss", "qwen3_moe", "olmo2", "cohere2", "gpt_neox", "deepseek_v2", "minicpm3")
# Stock Gemma-2 gives not a number behind padding: its softcapped attention has no row without a key to look at.
SIDES = [(family, side) for family in FAMILIES for side in ("right", "left") if (family, side) != ("gemma2", "left")]


@pytest.mark.parametrize(("family", "side"), SIDES)
def test_pairs_equal_the_stock_model(family, side, tokens_seen):
    model, batch = with_lora(tiny_model(family)), pairs(side=side)
    truth = of_stock(model, batch)
    accelerate(model)
    found = log_probs_and_grads(model, batch)
    assert tokens_seen == [(int(batch["attention_mask"].sum()) - 2 * PROMPT, 160)]
    assert_same(found, truth)
    assert not report_of(model).stock_calls


@pytest.mark.parametrize("policy", [Policy("mlp"), Policy("layer"), Policy("attention")], ids=lambda policy: policy.name)
def test_what_is_made_again_has_the_same_bits(policy, tokens_seen):
    model, batch = with_lora(tiny_model("qwen3")), pairs()
    accelerate(model)
    kept = log_probs_and_grads(model, batch)
    for layer in model.get_base_model().model.layers:
        layer.forward.policy = policy
    again = log_probs_and_grads(model, batch)
    assert len(tokens_seen) == 2
    assert all(torch.equal(again[2][name], kept[2][name]) for name in kept[2])


def test_tiles_of_tokens_and_groups_of_heads(tokens_seen):
    model, batch = with_lora(tiny_model("llama")), pairs()
    accelerate(model)
    whole = log_probs_and_grads(model, batch)
    model.get_base_model().forward.shared.tiling = Tiling(tokens=16, kv_heads=1)
    assert_same(log_probs_and_grads(model, batch), whole)
    assert len(tokens_seen) == 2


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe", "deepseek_v3"])
def test_layers_that_have_to_run_stock_are_given_whole_rows(family, tokens_seen, monkeypatch):
    model, batch = with_lora(tiny_model(family)), pairs()
    truth = of_stock(model, batch)
    accelerate(model)

    def refuse(*_args, **_kwargs):
        raise Unreadable("a test")

    for module in model.modules():
        if isinstance(vars(module).get("forward"), (FusedLayer, FusedAttention)):
            monkeypatch.setattr(vars(module)["forward"], "strict", refuse)
    assert_same(log_probs_and_grads(model, batch), truth)
    assert len(tokens_seen) == 1 and report_of(model).stock_calls["a test"] == 2


def test_many_answers_to_one_prompt_in_float32(tokens_seen):
    model = with_lora(tiny_model("llama", torch.float32))
    batch = pairs()
    batch["input_ids"][:, :PROMPT] = batch["input_ids"][0, :PROMPT]
    truth = of_stock(model, batch)
    accelerate(model)
    first, second = log_probs_and_grads(model, batch), log_probs_and_grads(model, batch)
    assert tokens_seen == [(int(batch["attention_mask"].sum()) - 3 * PROMPT, 160)] * 2
    assert_same(first, truth, at_most=2e-5)
    assert all(torch.equal(first[2][name], second[2][name]) for name in first[2])


def test_reference_pass_and_temperature(tokens_seen):
    model, batch = with_lora(tiny_model("llama")), pairs()
    with torch.no_grad(), model.disable_adapter():
        truth, _ = stock_log_probs(model, batch)
    accelerate(model)
    with torch.no_grad(), model.disable_adapter():
        found = model(**batch, token_log_probs=True).log_probs
    torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-6)
    request = PerToken(temperature=0.7, mean_logits=True)
    out = model(**{**batch, "token_log_probs": request})
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1] / 0.7
    scored = batch["labels"][:, 1:] != -100
    expected = logits.log_softmax(-1).gather(-1, batch["labels"][:, 1:].clamp(min=0)[..., None])[..., 0] * scored
    torch.testing.assert_close(out.log_probs, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.mean_logits.double(), logits.mean(-1) * scored, rtol=1e-6, atol=1e-6)
    assert len(tokens_seen) == 2


def test_a_loss_goes_without_the_padding(tokens_seen):
    model, batch = with_lora(tiny_model("llama")), pairs()
    batch["input_ids"] = torch.randint(1, VOCABULARY, batch["input_ids"].shape, generator=torch.Generator().manual_seed(3))
    batch = {name: t[:3] for name, t in batch.items()}
    loss, grads = loss_and_grads(model, **batch)
    logits = model(**batch).logits.detach()
    accelerate(model)
    found, found_grads = loss_and_grads(model, **batch)
    real = int(batch["attention_mask"].sum())
    assert tokens_seen == [(real, batch["input_ids"].numel())]
    torch.testing.assert_close(found, loss.to(found), rtol=1e-6, atol=1e-6)
    assert distance(found_grads, grads) < 1e-6
    kept = batch["attention_mask"].bool()
    torch.testing.assert_close(model(**batch).logits.detach()[kept], logits[kept], rtol=1e-6, atol=1e-6)
    model(**batch)  # whose logits are read reads them again: whole rows from now on
    assert len(tokens_seen) == 2


def without_labels(batch):
    return {**batch, "labels": torch.full_like(batch["labels"], -100)}


def with_a_hole(batch):
    mask = batch["attention_mask"].clone()
    mask[0, 5] = 0
    return {**batch, "attention_mask": mask}


def strangers(batch):
    return {name: t[:2, :30] for name, t in batch.items()}


@pytest.mark.parametrize("change", [without_labels, with_a_hole, strangers])
def test_rows_that_are_left_as_they_are(change):
    batch = change(pairs())
    assert compact(batch["input_ids"], batch["attention_mask"], batch["labels"].roll(-1, 1)) is None


def test_a_pass_that_draws_at_random_is_left_as_it_is(tokens_seen):
    model, batch = with_lora(tiny_model("llama"), lora_dropout=0.1), pairs()
    accelerate(model)
    model(**batch, token_log_probs=True)
    assert not tokens_seen
    model.eval()
    model(**batch, token_log_probs=True)
    assert len(tokens_seen) == 1


def test_a_table_of_positions_counts_the_padding_before_a_row(tokens_seen):
    model = with_lora(tiny_model("gpt2"))
    accelerate(model)
    for side, passes in (("left", 0), ("right", 1)):
        del tokens_seen[:]
        batch = pairs(side=side)
        torch.testing.assert_close(model(**batch, token_log_probs=True).log_probs, stock_log_probs(model, batch)[0], rtol=1e-6, atol=1e-6)
        assert len(tokens_seen) == passes


def test_a_reference_pass_over_the_same_tensors_asks_for_nothing_again(monkeypatch):
    asked = []
    monkeypatch.setattr(causal_loss, "compact", lambda *given: asked.append("rows") or compact(*given))
    real = causal_loss.only_right_padding
    monkeypatch.setattr(causal_loss, "only_right_padding", lambda *given: asked.append("padding") or real(*given))
    model = with_lora(tiny_model("llama", torch.float32)).train()
    accelerate(model)
    batch = pairs()
    policy = model(**batch, token_log_probs=True).log_probs
    with torch.no_grad(), model.disable_adapter():
        reference = model(**batch, token_log_probs=True).log_probs
    assert asked == ["padding", "rows"] and not torch.equal(policy, reference)
    again = {name: tensor.clone() for name, tensor in batch.items()}
    torch.testing.assert_close(model(**again, token_log_probs=True).log_probs, policy)
    again["labels"][:, PROMPT : PROMPT + 3] = -100
    changed = model(**again, token_log_probs=True).log_probs
    assert asked == ["padding", "rows"] * 3
    assert (changed[:, PROMPT - 1 : PROMPT + 2] == 0).all()
    torch.testing.assert_close(changed[:, PROMPT + 2 :], policy[:, PROMPT + 2 :])
