"""The day-one test: what src has never seen is accelerated and proven. The safety test: what it almost knows is refused."""

import copy

import pytest
import torch
from torch import nn
from transformers import GenerationMixin, LlamaConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from exactune.models.accelerate import accelerate, undo
from families import BASE, distance, loss_and_grads, random_batch, with_lora

CLOSE = 2e-6


class Scaler(nn.Module):
    """A root-mean-square norm under another name."""

    def __init__(self, width, tiny_eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.tiny_eps = tiny_eps

    def forward(self, z):
        wide = z.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.tiny_eps)).to(z.dtype)


class Mixer(nn.Module):
    """Attention: values first, names of its own, pairs side by side, a norm on queries and keys after the rotation."""

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.head_dim = config.head_dim
        self.to_v, self.to_q, self.to_k = (
            nn.Linear(width, 32, bias=False),
            nn.Linear(width, 64, bias=False),
            nn.Linear(width, 32, bias=False),
        )
        self.back = nn.Linear(64, width)
        self.steady_q, self.steady_k = Scaler(self.head_dim), Scaler(self.head_dim)

    @staticmethod
    def spin(z, cos, sin):
        half = z.shape[-1] // 2
        cos, sin = (t[:, None, :, :half].repeat_interleave(2, -1) for t in (cos, sin))
        crossed = torch.stack((-z[..., 1::2], z[..., ::2]), -1).flatten(-2)
        return z * cos + crossed * sin

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
        v, q, k = (p(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.to_v, self.to_q, self.to_k))
        q, k = self.steady_q(self.spin(q, *position_embeddings)), self.steady_k(self.spin(k, *position_embeddings))
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, is_causal=attention_mask is None)
        return self.back(out.transpose(1, 2).flatten(2)), None


class Wide(nn.Module):
    """A gated MLP whose gate comes second, with its activation as a function."""

    def __init__(self, config, bend=nn.functional.silu):
        super().__init__()
        self.lift, self.open = nn.Linear(config.hidden_size, 96), nn.Linear(config.hidden_size, 96)
        self.sink = nn.Linear(96, config.hidden_size)
        self.bend = bend

    def forward(self, z):
        return self.sink(self.lift(z) * self.bend(self.open(z)))


class Block(nn.Module):
    """Parallel attention and MLP, an extra norm after their sum, and a damped residual."""

    def __init__(self, config):
        super().__init__()
        self.mixer, self.wide = Mixer(config), Wide(config)
        self.before, self.after = Scaler(config.hidden_size), Scaler(config.hidden_size)

    def forward(self, hidden_states, **kwargs):
        z = self.before(hidden_states)
        return hidden_states + 0.8 * self.after(self.mixer(hidden_states=z, **kwargs)[0] + self.wide(z))


class Novel(PreTrainedModel):
    config_class = LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.last = Scaler(config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.tokens

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        positions = torch.arange(input_ids.shape[1])[None] if position_ids is None else position_ids
        angles = positions[..., None] * 1e-3 ** (torch.arange(8) / 8)
        table = torch.cat([angles, angles], -1)
        z = self.tokens(input_ids)
        turns = table.cos().to(z.dtype), table.sin().to(z.dtype)
        for block in self.blocks:
            z = block(z, position_embeddings=turns, attention_mask=attention_mask)
        return BaseModelOutputWithPast(last_hidden_state=self.last(z))


class NovelForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = LlamaConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.model, self.out = Novel(config), nn.Linear(config.hidden_size, config.vocab_size, bias=True)
        self.post_init()

    def get_decoder(self):
        return self.model

    def get_input_embeddings(self):
        return self.model.tokens

    def get_output_embeddings(self):
        return self.out

    def forward(self, input_ids=None, labels=None, **kwargs):
        logits = self.out(self.model(input_ids, **kwargs).last_hidden_state) * 0.5
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


def novel_model():
    torch.manual_seed(0)
    config = LlamaConfig(**BASE, halved=0.5)  # the logits' factor stands in the config, as it does in every family that has one
    model = NovelForCausalLM(config).double()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, *((0.0, 0.1) if name.endswith("bias") else (0.5, 0.3)))
        else:
            nn.init.normal_(parameter, 0.0, 0.1)
    names = ["to_v", "to_q", "to_k", "back", "lift", "open", "sink"]
    return with_lora(model, target_modules=names)


def same_step(model):
    """The report, after a stock and a fast training step that agree."""
    batch = random_batch()
    stock_loss, stock = loss_and_grads(model, **batch)
    report = accelerate(model)
    fast_loss, fast = loss_and_grads(model, **batch)
    assert abs(fast_loss - stock_loss) < CLOSE * abs(stock_loss)
    assert distance(fast, stock) < CLOSE
    return report


def test_an_architecture_of_tomorrow_is_fused_and_proven():
    report = same_step(novel_model())
    assert report.count("attention") == report.count("mlp") == (2, 2), report.summary()
    assert report.count("norm") == (9, 9)
    assert report.head == "fused"
    assert not report.stock
    assert report.proofs and all(proof.passed for proof in report.proofs)


class Valved(Mixer):
    """Attention with a valve on its output: a column for each value, made of the input."""

    def __init__(self, config, width=64, turn=torch.sigmoid):
        super().__init__(config)
        self.valve, self.turn = nn.Linear(config.hidden_size, width), turn

    def forward(self, hidden_states, **kwargs):
        back, self.back = self.back, nn.Identity()
        out, _ = super().forward(hidden_states, **kwargs)
        self.back = back
        gate = self.turn(self.valve(hidden_states)).unflatten(-1, (4, -1))
        return self.back((out.unflatten(-1, (4, -1)) * gate).flatten(2)), None


class SpunInHalves(Mixer):
    """The same, whose pairs are a column of one half and one of the other."""

    @staticmethod
    def spin(z, cos, sin):
        first, second = z.chunk(2, -1)
        return z * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


def test_layers_that_turn_in_two_manners_are_read_each_by_itself():
    order = iter([Mixer, SpunInHalves])
    report = same_step(with_parts(lambda config: next(order)(config)))
    assert report.count("attention") == (2, 2), report.summary()
    assert len(report.proofs) >= 2


class Narrowed(nn.Module):
    """Attention whose keys and values come through one narrow projection; each head's first columns are turned by nobody."""

    louder = 1.0  # of the keys that all heads share

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.ask, self.squeeze = nn.Linear(width, 4 * 20), nn.Linear(width, 10 + 16, bias=False)
        self.steady, self.unfold, self.back = Scaler(10), nn.Linear(10, 4 * (4 + 12), bias=False), nn.Linear(4 * 12, width)

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
        q = self.ask(hidden_states).unflatten(-1, (4, 20)).transpose(1, 2)
        narrow, shared = self.squeeze(hidden_states).split([10, 16], -1)
        k, v = self.unfold(self.steady(narrow)).unflatten(-1, (4, 16)).transpose(1, 2).split([4, 12], -1)
        turned = Mixer.spin(shared[:, None] * self.louder, *position_embeddings).expand(-1, 4, -1, -1)
        q, k = torch.cat([q[..., :4], Mixer.spin(q[..., 4:], *position_embeddings)], -1), torch.cat([k, turned], -1)
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, is_causal=attention_mask is None)
        return self.back(out.transpose(1, 2).flatten(2)), None


def test_an_attention_through_narrow_projections_is_fused():
    report = same_step(with_parts(Narrowed))
    assert report.count("attention") == (2, 2), report.summary()
    assert report.count("norm") == (7, 7)


class Louder(Narrowed):
    louder = 1.001


def test_almost_the_same_narrow_attention_is_refused():
    report = same_step(with_parts(Louder))
    assert report.count("attention") == (0, 2)
    assert report.count("projection")[0] == 8, "its projections are fused by themselves"


class Damped(Wide):
    """A gated MLP with a factor on its gate and one on its result."""

    def __init__(self, config):
        super().__init__(config)
        self.soft, self.low = 0.7, 0.4

    def forward(self, z):
        return self.sink(self.lift(z) * self.bend(self.open(z) * self.soft)) * self.low


def with_parts(mixer, wide=Wide):
    """The novel model with other attention or MLPs in its blocks."""
    torch.manual_seed(0)
    config = LlamaConfig(**BASE, halved=0.5)
    model = NovelForCausalLM(config)
    for block in model.model.blocks:
        block.mixer, block.wide = mixer(config), wide(config)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, *((0.5, 0.3) if parameter.dim() == 1 and not name.endswith("bias") else (0.0, 0.1)))
    names = [name for name, module in model.model.blocks.named_modules() if isinstance(module, nn.Linear)]
    return with_lora(model.double(), target_modules=sorted({name.rpartition(".")[2] for name in names}))


@pytest.mark.parametrize("width", [64, 4], ids=["a column a value", "a column a head"])
@pytest.mark.parametrize("turn", [torch.sigmoid, nn.functional.softplus])
def test_a_gated_output_is_fused(width, turn):
    report = same_step(with_parts(lambda config: Valved(config, width, turn)))
    assert report.count("attention") == (2, 2), report.summary()


def test_almost_the_same_gate_is_refused():
    report = same_step(with_parts(lambda config: Valved(config, turn=lambda z: torch.sigmoid(z * 1.001))))
    assert report.count("attention") == (0, 2)
    assert report.count("projection")[0] >= 10, "its projections are fused by themselves"


def test_factors_of_an_mlp_are_read():
    report = same_step(with_parts(Mixer, Damped))
    assert report.count("mlp") == (2, 2), report.summary()


class Halved(Damped):
    """The factor is no number that the module keeps."""

    def forward(self, z):
        return self.sink(self.lift(z) * self.bend(self.open(z) * 0.71)) * self.low


def test_a_factor_that_is_nowhere_kept_is_refused():
    report = same_step(with_parts(Mixer, Halved))
    assert report.count("mlp") == (0, 2)


class Across(nn.Module):
    """A linear layer that holds its weight the other way round."""

    def __init__(self, layer):
        super().__init__()
        self.weight, self.bias = nn.Parameter(layer.weight.detach().t().contiguous()), layer.bias

    def forward(self, x):
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


class AlmostAcross(Across):
    def forward(self, x):
        return super().forward(x) * 1.0005


@pytest.mark.parametrize(("form", "fused"), [(Across, 2), (AlmostAcross, 1)])
def test_a_linear_layer_is_known_by_what_it_computes(form, fused):
    torch.manual_seed(0)
    model = NovelForCausalLM(LlamaConfig(**BASE, halved=0.5)).double().train()
    model.model.blocks[0].wide.sink = form(model.model.blocks[0].wide.sink)
    batch = random_batch()
    stock_loss, stock = loss_and_grads(model, **batch)
    held = {name: t.clone() for name, t in model.state_dict().items()}
    report = accelerate(model)
    fast_loss, fast = loss_and_grads(model, **batch)
    assert abs(fast_loss - stock_loss) < CLOSE * abs(stock_loss)
    assert distance(fast, stock) < CLOSE
    assert report.count("mlp") == (fused, 2), report.summary()
    undo(model)
    assert all(torch.equal(t, held[name]) and t.is_contiguous() for name, t in model.state_dict().items())


class WideUnderAutocast(nn.LayerNorm):
    """What torch's LayerNorm does under autocast on a GPU: float32 for 16 bits."""

    def forward(self, z):
        if not torch.is_autocast_enabled("cpu"):
            return super().forward(z)
        return nn.functional.layer_norm(z.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


def test_norms_that_widen_under_autocast_are_fused_and_so_is_what_reads_them():
    model = novel_model()
    for block in model.get_base_model().model.blocks:
        block.before = WideUnderAutocast(64)
    model.get_base_model().model.last = WideUnderAutocast(64)  # what the head reads is then float32, too
    model = model.to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.float() if "lora_" in name else parameter.data

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            return loss_and_grads(model, **random_batch())

    truth_model = copy.deepcopy(model).float()
    _, truth = loss_and_grads(truth_model, **random_batch())
    _, stock = step()
    report = accelerate(model)
    assert report.count("norm") == (9, 9), report.summary()
    _, fast = step()
    assert not report.stock_calls
    size = sum(t.square().sum() for t in truth.values()) ** 0.5
    ours, theirs = (sum((g[n] - truth[n]).square().sum() for n in truth) ** 0.5 / size for g in (fast, stock))
    assert ours <= 1.1 * theirs


def almost_silu(z):
    return nn.functional.silu(z * 1.002)


class AlmostScaler(Scaler):
    def forward(self, z):
        return super().forward(z) * 1.0005


class Learned(nn.Module):
    """An activation with a parameter; `across` mixes the tokens, which no activation does."""

    def __init__(self, across=False):
        super().__init__()
        self.slope, self.across = nn.Parameter(torch.tensor([0.3])), across

    def forward(self, z):
        y = torch.where(z > 0, z * z, self.slope * z)
        return y + 1e-3 * z.mean(-2, keepdim=True) if self.across else y


class Ungated(nn.Module):
    def __init__(self, config, across=False):
        super().__init__()
        self.rise, self.fall, self.curve = nn.Linear(config.hidden_size, 96), nn.Linear(96, config.hidden_size), Learned(across)

    def forward(self, z):
        return self.fall(self.curve(self.rise(z)))


def test_an_activation_with_parameters_is_the_models_own():
    model = with_parts(Mixer, Ungated)
    report = same_step(model)
    assert report.count("mlp") == (2, 2), report.summary()
    model.get_base_model().model.blocks[0].wide.curve.slope.requires_grad_()
    loss_and_grads(model, **random_batch())
    assert report.stock_calls["an activation that is trained"] == 1


def test_an_activation_that_mixes_tokens_is_refused():
    report = same_step(with_parts(Mixer, lambda config: Ungated(config, across=True)))
    assert report.count("mlp") == (0, 2), report.summary()


def test_almost_the_same_activation_is_refused():
    model = novel_model()
    model.get_base_model().model.blocks[1].wide.bend = almost_silu
    report = same_step(model)
    assert report.count("mlp") == (1, 2)
    assert report.count("projection") == (3, 3), "its projections are fused by themselves"
    assert "an activation that we have no kernel for" in report.stock


def test_almost_the_same_norm_is_refused():
    model = novel_model()
    model.get_base_model().model.blocks[0].after.__class__ = AlmostScaler
    report = same_step(model)
    assert report.count("norm") == (8, 9)
    assert "a norm with a formula of its own" in report.stock


def test_almost_the_same_attention_is_refused():
    model = novel_model()
    mixer = model.get_base_model().model.blocks[0].mixer

    class Tilted(Mixer):
        @staticmethod
        def spin(z, cos, sin):
            return Mixer.spin(z, cos, sin * 1.001)

    mixer.__class__ = Tilted
    report = same_step(model)
    assert report.count("attention") == (1, 2)
    assert report.count("projection") == (4, 4)


def test_an_activation_that_only_its_gradient_gives_away_is_refused():
    """The forward agrees to the last bit: only a proof of gradients can tell."""
    model = novel_model()

    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return nn.functional.silu(z)

        @staticmethod
        def backward(ctx, dy):
            return dy

    model.get_base_model().model.blocks[0].wide.bend = Straight.apply
    batch = random_batch()
    _, stock = loss_and_grads(model, **batch)
    report = accelerate(model)
    assert distance(loss_and_grads(model, **batch)[1], stock) < CLOSE
    assert report.count("mlp") == (1, 2)
    assert "a result that differs from the stock part's" in report.stock


@pytest.mark.parametrize("verify", [True, False])
def test_half_precision_keeps_what_fits(verify):
    model = novel_model().to(torch.bfloat16)
    report = accelerate(model, verify=verify)
    assert report.count("attention") == report.count("mlp") == (2, 2), report.summary()
