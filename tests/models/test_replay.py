"""Recorded passes: the logic around CUDA graphs, with a recorder that runs functions again where a graph would replay them."""

import copy

import pytest
import torch

from exactune.lora import ops
from exactune.lora.slots import Slots
from exactune.models.accelerate import accelerate
from exactune.models.notes import base_model
from exactune.models.replay import SEEN_BEFORE, Passes
from families import four_bit_model, loss_and_grads, random_batch, tiny_model, with_lora


class Again:
    """`record` gives a function that runs the very same code once more and writes into the first results, as a graph does."""

    def warm_up(self, run):
        run()

    def record(self, run):
        results = run()

        def replay():
            with torch.no_grad():
                fresh = run()
            for place, value in zip(results, fresh, strict=True):
                if place is not None:
                    place.copy_(value)

        return replay, results

    def forget(self):
        pass


def recorded(model):
    """`model` accelerated twice over: a plain twin, and itself with recordings."""
    twin = copy.deepcopy(model)
    accelerate(twin)
    accelerate(model)
    head = base_model(model).forward
    head.passes = Passes(base_model(model), [g for layer in head.layers for g in layer.forward.parts.groups()], Again())
    return model, twin, head.passes


def llama(**lora):
    return with_lora(tiny_model("llama", torch.float32), **lora)


def batch_of(seed, rows=2, tokens=50):
    ids = torch.randint(5, 150, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[0, : 5 + seed % 7] = -100
    return {"input_ids": ids, "labels": labels}


def assert_same(one, other):
    torch.testing.assert_close(one[0], other[0])
    assert one[1].keys() == other[1].keys()
    for name in one[1]:
        torch.testing.assert_close(one[1][name], other[1][name], rtol=1e-4, atol=1e-7)


def warm(model, passes, **batch):
    for _ in range(SEEN_BEFORE + 1):
        loss_and_grads(model, **batch)
    assert len(passes) == 1


def test_steps_of_an_optimizer_are_those_of_the_eager_model():
    model, twin, passes = recorded(llama())
    optimizers = [torch.optim.AdamW((p for p in m.parameters() if p.requires_grad), lr=1e-2) for m in (model, twin)]
    losses = []
    for step in range(8):
        found = loss_and_grads(model, **batch_of(step, tokens=40 + 3 * step % 20))
        assert_same(found, loss_and_grads(twin, **batch_of(step, tokens=40 + 3 * step % 20)))
        losses.append(found[0].item())
        for optimizer in optimizers:
            optimizer.step()
    assert len(passes) == 1 and not passes.refused  # lengths from 40 to 59 are one shape
    assert len(set(losses)) == 8


def test_the_number_of_trained_tokens_may_be_given_and_change():
    model, twin, passes = recorded(llama())
    for count in (torch.tensor(90), torch.tensor(31), torch.tensor(77), torch.tensor(77.0)):
        batch = random_batch() | {"num_items_in_batch": count}
        assert_same(loss_and_grads(model, **batch), loss_and_grads(twin, **batch))
    assert len(passes) == 1


def test_accumulated_gradients():
    model, twin, passes = recorded(llama())
    for m in (model, twin):
        m.zero_grad()
        for step in range(6):
            (m(**batch_of(step)).loss / 6).backward()
    assert len(passes) == 1
    for ours, eager in zip(model.parameters(), twin.parameters(), strict=True):
        if eager.grad is not None:
            torch.testing.assert_close(ours.grad, eager.grad, rtol=1e-4, atol=1e-7)


def test_two_forwards_before_a_backward():
    model, twin, passes = recorded(llama())
    warm(model, passes, **batch_of(0))
    found = []
    for m in (model, twin):
        m.zero_grad()
        first, second = m(**batch_of(1)).loss, m(**batch_of(2)).loss
        (first - 0.5 * second).backward()
        found.append((first.detach() + second.detach(), {n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None}))
    assert_same(*found)
    model(**batch_of(1))  # nobody keeps this one's loss: the recording is free again
    assert not any(r.waiting for r in passes._recordings.values())


def test_a_pass_of_another_shape_before_the_backward_leaves_the_recordings_memory_alone():
    model, twin, passes = recorded(llama())
    for tokens in (50, 90):
        for _ in range(SEEN_BEFORE + 1):
            loss_and_grads(model, **batch_of(0, tokens=tokens))
    assert len(passes) == 2
    replays = sum(recording.replays for recording in passes._recordings.values())
    for m in (model, twin):
        m.zero_grad()
        (m(**batch_of(1, tokens=50)).loss - 0.5 * m(**batch_of(2, tokens=90)).loss).backward()
    assert sum(recording.replays for recording in passes._recordings.values()) == replays + 1
    for ours, eager in zip(model.parameters(), twin.parameters(), strict=True):
        if eager.grad is not None:
            torch.testing.assert_close(ours.grad, eager.grad, rtol=1e-4, atol=1e-7)


def test_where_there_is_room_for_one_recording_smaller_passes_are_filled_up_to_it():
    model, twin, passes = recorded(llama())
    passes.only = (3, 128)
    for rows, tokens in ((3, 128), (3, 100), (2, 60), (1, 128), (3, 20)):
        assert_same(loss_and_grads(model, **batch_of(rows, rows, tokens)), loss_and_grads(twin, **batch_of(rows, rows, tokens)))
    assert len(passes) == 1 and [recording.replays for recording in passes._recordings.values()] == [3]


def test_packed_rows_are_filled_up_to_the_one_recording():
    model, twin, passes = recorded(llama())
    passes.only = (2, 96)
    for edges in ((0, 40, 96, 180), (0, 96, 192), (0, 3, 70), (0, 64, 96, 100, 150)):
        edges = torch.tensor(edges, dtype=torch.int32)
        positions = torch.cat([torch.arange(int(n)) for n in edges.diff()])[None]
        longest = int(edges.diff().max())
        packed = {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": longest, "max_length_k": longest}
        batch = batch_of(1, rows=1, tokens=int(edges[-1])) | packed | {"position_ids": positions}
        assert_same(loss_and_grads(model, **batch), loss_and_grads(twin, **batch))
    assert len(passes) == 1 and [recording.replays for recording in passes._recordings.values()] == [2]


def test_the_one_recording_gives_way_to_a_pass_that_runs_eagerly():
    model, twin, passes = recorded(llama())
    passes.only = (2, 64)
    for _ in range(3):
        warm(model, passes, **batch_of(0))
        model.eval()
        with torch.no_grad():
            model(**batch_of(1))
        model.train()
        assert not len(passes)
    for _ in range(4):
        assert_same(loss_and_grads(model, **batch_of(2)), loss_and_grads(twin, **batch_of(2)))
    assert not len(passes) and list(passes.refused.values()) == [1], "recordings that are dropped before they pay are not made"


def test_the_adapters_of_a_pass_are_written_once_and_again_only_after_another_pass(monkeypatch):
    model, _, passes = recorded(llama())
    warm(model, passes, **batch_of(0))
    at_once, one_group = [], []
    fill, fill_group = Slots.fill, ops.fill_slots
    monkeypatch.setattr(Slots, "fill", lambda self: (at_once.append(self), fill(self)))
    monkeypatch.setattr(ops, "fill_slots", lambda *args: (one_group.append(args), fill_group(*args)))
    loss_and_grads(model, **batch_of(1))
    assert (len(at_once), len(one_group)) == (1, 0)  # by the forward; in a graph it is part of the replay
    loss = model(**batch_of(2)).loss
    passes._groups[0].bound(torch.float32).filled()  # what another pass does first
    loss.backward()
    assert (len(at_once), len(one_group)) == (3, 1)


def test_a_second_backward_is_refused():
    model, _, passes = recorded(llama())
    warm(model, passes, **batch_of(0))
    loss = model(**batch_of(1)).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="cuda_graphs=False"):
        loss.backward()


def test_adapters_switched_between_passes_and_between_forward_and_backward():
    model = llama()
    model.add_adapter("other", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if "other" in name:
            parameter.data.normal_(0, 0.1)
    model, twin, passes = recorded(model)
    warm(model, passes, **batch_of(0))
    found = []
    for m in (model, twin):
        m.zero_grad()
        loss = m(**batch_of(1)).loss
        with torch.no_grad(), m.disable_adapter():
            reference = m(**batch_of(2)).loss
        m.set_adapter("other")
        other = m(**batch_of(3)).loss
        m.set_adapter("default")
        loss.backward()
        grads = {n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None}
        found.append((torch.stack([loss.detach(), reference, other.detach()]), grads))
    assert_same(*found)


def test_a_scale_that_changes_is_another_pass():
    model, twin, passes = recorded(llama())
    warm(model, passes, **batch_of(0))
    for m in (model, twin):
        for module in m.modules():
            if hasattr(module, "lora_A"):
                module.scaling["default"] = 0.7
    assert_same(loss_and_grads(model, **batch_of(1)), loss_and_grads(twin, **batch_of(1)))


def test_packed_rows():
    model, twin, passes = recorded(llama())
    for bounds in ([0, 20, 25, 48], [0, 3, 48], [0, 1, 2, 20, 40, 48], [0, 30, 45]):
        cu = torch.tensor(bounds, dtype=torch.int32)
        longest = int(cu.diff().max())
        positions = torch.cat([torch.arange(n) for n in cu.diff()])[None]
        batch = batch_of(len(bounds), rows=1, tokens=bounds[-1]) | {"position_ids": positions}
        batch |= {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": longest, "max_length_k": longest}
        assert_same(loss_and_grads(model, **batch), loss_and_grads(twin, **batch))
    assert len(passes) == 1


def test_per_token_results_as_trl_asks_for_them():
    model, twin, passes = recorded(llama())
    for step in range(4):
        found = []
        for m in (model, twin):
            m.zero_grad()
            out = m(**batch_of(step), fused_lm_head=True)
            (out.log_probs * torch.linspace(0, 1, out.log_probs.shape[1])).sum().backward()
            grads = {n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None}
            found.append(
                (
                    torch.cat(
                        [out.log_probs.detach().flatten(), out.entropy.flatten(), out.is_top1.flatten().float(), out.loss.detach()[None]]
                    ),
                    grads,
                )
            )
        assert_same(*found)
    assert len(passes) == 1


def test_logits_read_beside_the_loss_are_real_and_differentiable():
    model, twin, passes = recorded(llama())
    warm(model, passes, **batch_of(0))
    found = []
    for m in (model, twin):
        m.zero_grad()
        out = m(**batch_of(1))
        (out.loss + out.logits.square().mean()).backward()
        found.append((out.logits.detach(), {n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None}))
    assert_same(*found)


def test_what_cannot_be_recorded_runs_eagerly_and_says_why():
    model, twin, passes = recorded(llama())
    for m in (model, twin):
        m.get_input_embeddings().register_forward_hook(lambda module, args, out: out * 1.5)
    for step in range(4):
        assert_same(loss_and_grads(model, **batch_of(step)), loss_and_grads(twin, **batch_of(step)))
    assert len(passes) == 0 and any("hooks on" in why for why in passes.refused)


def test_a_recorder_that_fails_leaves_the_eager_pass():
    class Broken(Again):
        def record(self, run):
            raise RuntimeError("operation not permitted when stream is capturing")

    model, twin, passes = recorded(llama())
    passes._capture = Broken()
    for step in range(4):
        assert_same(loss_and_grads(model, **batch_of(step)), loss_and_grads(twin, **batch_of(step)))
    assert [*passes.refused.values()] == [1]


def test_trained_weights_beside_adapters_run_eagerly():
    model, twin, passes = recorded(llama())
    for m in (model, twin):
        m.get_input_embeddings().weight.requires_grad_()
    for step in range(4):
        assert_same(loss_and_grads(model, **batch_of(step)), loss_and_grads(twin, **batch_of(step)))
    assert len(passes) == 0


def test_the_one_recording_of_four_bit_weights_makes_their_scratch_anew(tmp_path):
    pytest.importorskip("bitsandbytes", reason="4-bit weights are bitsandbytes'")
    model, twin, passes = recorded(four_bit_model(tmp_path))
    passes.only = (2, 64)
    scratch = passes._groups[0].scratch
    loss_and_grads(model, **batch_of(0))
    before = {buffer.data_ptr(): buffer for buffer in scratch.buffers()}
    for step in range(4):
        assert_same(loss_and_grads(model, **batch_of(step)), loss_and_grads(twin, **batch_of(step)))
    (recording,) = passes._recordings.values()
    assert recording.replays == 3 and len(before) == len(scratch.buffers()) == 4
    assert {id(buffer) for buffer in recording._unpacked} == {id(buffer) for buffer in scratch.buffers()}
    assert not {buffer.data_ptr() for buffer in scratch.buffers()} & set(before)
