"""The implementations of mla against each other, and what they read."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

quick = settings(max_examples=25, deadline=None, derandomize=True)
NAMES = ("reference", "expanded", "absorbed")
PHASES = ("train", "prefill", "decode")


def one(lab, name, seed=0, mixer=None, **tables):
    """A model of one implementation; what does not decode leaves that to the reference."""
    phases = dict.fromkeys(PHASES, name)
    if name == "expanded":
        phases["decode"] = "reference"
    return lab.model(seed, mixer={"implementation": phases, **(mixer or {})}, **tables)


@st.composite
def mixers(draw):
    width = st.integers(1, 9)
    return {
        "num_heads": draw(st.integers(1, 3)),
        "q_lora_rank": draw(st.none() | width),
        "kv_lora_rank": draw(width),
        "qk_nope_head_dim": draw(width),
        "qk_rope_head_dim": draw(st.sampled_from((2, 4, 6))),
        "v_head_dim": draw(width),
        "attention_bias": draw(st.booleans()),
        "window": draw(st.none() | st.integers(1, 9)),
    }


@quick
@given(
    mixer=mixers(),
    packed=st.booleans(),
    padded=st.booleans(),
    rows=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_all_are_equal_with_every_gradient(lab, close, gradients_close, mixer, packed, padded, rows, seed):
    batch = {}
    if packed:
        documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 2, 2, 2, 2], [0] * 7])
        batch["documents"] = documents[:rows]
    if padded:
        batch["valid"] = (torch.arange(7) >= torch.tensor([[2], [0], [6]]))[:rows]
    x = lab.stream(rows, 7, seed)
    models = [one(lab, name, seed, mixer) for name in NAMES]
    wanted, *others = (lab.gradients(m, lambda x, m=m: lab.mix(m, x, **batch), x) for m in models)
    assert len(wanted) > len(list(models[0].layers[0].mixer.parameters()))
    for found in others:
        close(found["output"], wanted["output"])
        gradients_close(found, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_of_padding_alone_gives_zeros_and_no_gradient(lab, name):
    """It sees no key at all, where a softmax has nothing to divide by."""
    model = one(lab, name)
    valid = torch.tensor([[False] * 4, [False, False, True, True]])
    found = lab.gradients(model, lambda x: lab.mix(model, x, valid=valid), lab.stream(2, 4))
    assert all(torch.isfinite(each).all() for each in found.values())
    assert not found["output"][0].any()
    assert not found["input"][0].any()


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_near_float32(lab, name):
    """Within the rounding of inputs, latents, outputs and probabilities to eight bits."""
    widths = {"kv_lora_rank": 32, "q_lora_rank": 24, "qk_nope_head_dim": 16, "v_head_dim": 16}
    narrow, wide = (
        one(lab, name, mixer=widths, precision={"kind": "full", "dtype": dtype}, model={"init_std": 0.2})
        for dtype in ("bfloat16", "float32")
    )
    narrow.load_state_dict(wide.state_dict())
    wide.load_state_dict(narrow.state_dict())
    x = lab.stream(2, 20, dtype=torch.bfloat16)
    found, wanted = lab.mix(narrow, x), lab.mix(wide, x.float())
    assert found.dtype == torch.bfloat16
    assert (found - wanted).abs().max() <= 2**-5 * wanted.abs().max()
    cache = narrow.layers[0].mixer.new_cache(2, 20)
    assert {each.dtype for each in cache.tensors.values()} == {torch.bfloat16}
    with torch.no_grad():
        parts = [lab.mix(narrow, part, cache=cache) for part in x.split([17, 1, 2], 1)]
    assert (torch.cat(parts, 1) - wanted).abs().max() <= 2**-5 * wanted.abs().max()


class Rescaled(nn.Module):
    """What a precision policy may make of a map: its weight is not what it multiplies by."""

    bias = None

    def __init__(self, inner):
        super().__init__()
        self.weight, self.dtype = inner.weight, inner.dtype

    def matrix(self):
        factors = torch.linspace(0.5, 2, self.weight.shape[0], dtype=self.weight.dtype)
        return self.weight.sin() * factors[:, None]

    def forward(self, x, offsets=None):
        return nn.functional.linear(x, self.matrix())


def test_what_a_policy_multiplies_by_is_followed_with_gradients(lab, close, gradients_close):
    results = []
    for name in NAMES:
        model = one(lab, name)
        mixer = model.layers[0].mixer
        plain = lab.mix(model, lab.stream(2, 6)).detach()
        mixer.kv_b = Rescaled(mixer.kv_b)
        results.append(lab.gradients(model, lambda x, m=model: lab.mix(m, x), lab.stream(2, 6)))
        assert (results[-1]["output"] - plain).abs().max() > 0.1 * plain.abs().max()
    for found in results[1:]:
        close(found["output"], results[0]["output"])
        gradients_close(found, results[0])


def test_a_decoding_step_reads_the_matrix_as_it_is_now(lab, close):
    """A weight that moves under a model between two steps is never stale."""
    model = lab.model()
    x = lab.stream(2, 6)
    with torch.no_grad():
        lab.mix(model, x, phase="decode")
        model.layers[0].mixer.kv_b.weight.mul_(-1.5)
        close(lab.mix(model, x, phase="decode"), lab.mix(model, x))


@pytest.mark.parametrize("name", NAMES)
def test_each_half_of_the_heads_alone_and_their_sum(lab, close, gradients_close, name):
    """Head counts come from shapes: with its share of q_b, kv_b and o a process computes its share of y."""
    model = one(lab, name, mixer={"num_heads": 4})
    x = lab.stream(2, 6)
    whole = lab.gradients(model, lambda x: lab.mix(model, x), x)
    halves = []
    for half in range(2):
        part = copy.deepcopy(model)
        mixer = part.layers[0].mixer
        for linear, dim in ((mixer.q_b, 0), (mixer.kv_b, 0), (mixer.o, 1)):
            linear.weight = nn.Parameter(linear.weight.detach().chunk(2, dim)[half].clone())
        halves.append(lab.gradients(part, lambda x, p=part: lab.mix(p, x), x))
    for key in (
        "output",
        "input",
        *(f"layers.0.mixer.{k}.weight" for k in ("q_a", "kv_a", "kv_a_norm", "q_a_norm")),
    ):
        close(halves[0][key] + halves[1][key], whole[key])


class Doubled(torch.autograd.Function):
    """Stands for the sum over two processes with equal gradients."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


@pytest.mark.parametrize("name", NAMES)
def test_what_every_process_holds_is_summed_over_processes_exactly_once(lab, close, name):
    """By `replicated`, or by the linear map it enters whose outputs are cut; each path to heads by one of them."""
    model = one(lab, name)
    mixer, x = model.layers[0].mixer, lab.stream(2, 6)
    wanted = lab.gradients(model, lambda x: lab.mix(model, x), x)
    mixer.replicated = Doubled.apply
    for linear in (mixer.q_b, mixer.kv_b):
        linear.register_forward_pre_hook(lambda _, inputs: (Doubled.apply(inputs[0]), *inputs[1:]))
    found = lab.gradients(model, lambda x: lab.mix(model, x), x)
    for path in ("q_a", "q_a_norm", "kv_a", "kv_a_norm"):
        close(found[f"layers.0.mixer.{path}.weight"], 2 * wanted[f"layers.0.mixer.{path}.weight"])
    for path in ("q_b", "kv_b", "o"):
        close(found[f"layers.0.mixer.{path}.weight"], wanted[f"layers.0.mixer.{path}.weight"])


@pytest.mark.parametrize("name", NAMES)
def test_a_window_of_the_whole_context_is_none_and_of_one_sees_itself(lab, close, name):
    x = lab.stream(1, 8)
    wide, none, narrow = (one(lab, name, mixer={"window": w}) for w in (8, None, 1))
    assert torch.equal(lab.mix(wide, x), lab.mix(none, x))
    mixer = narrow.layers[0].mixer
    latent = mixer.kv_a_norm(mixer.kv_a(x)[..., : mixer.rank])
    values = mixer.kv_b(latent).unflatten(-1, (2, -1))[..., mixer.nope :]
    close(lab.mix(narrow, x), mixer.o(values.flatten(2)))


def test_fused_attention_takes_the_flash_kernel_where_widths_differ(lab, monkeypatch):
    """Or the scores would be stored: queries, keys and values reach it in one width, short or long values."""
    import composeformer_attention_mla.expanded as module

    seen = []

    def spy(q, k, v, **options):
        seen.append(
            (q.shape[-1], k.shape[-1], v.shape[-1], options["attn_mask"] is None, options["is_causal"])
        )
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)

    monkeypatch.setattr(module, "scaled_dot_product_attention", spy)
    for value in (3, 9, 11):
        lab.mix(one(lab, "expanded", mixer={"v_head_dim": value}), lab.stream(1, 5))
    assert seen == [(9, 9, 9, True, True), (9, 9, 9, True, True), (11, 11, 11, True, True)]
