"""A small model with mla from its spec: built, trained, copied, generating the same cached as uncached."""

import copy

import pytest
import torch

import composeformer as cf


@pytest.fixture(scope="module")
def model(lab):
    """Full and windowed layers under a stretched context, with and without query compression."""
    mixers = {
        "full": {**lab.mixer, "num_heads": 3},
        "near": {**lab.mixer, "window": 5, "q_lora_rank": None},
    }
    del mixers["near"]["q_lora_rank"]
    position = {"kind": "yarn", "layout": "interleaved", "factor": 8.0, "original_max_position_embeddings": 8}
    return lab.model(
        mixer={**mixers, **dict.fromkeys(lab.mixer)},
        position={**position, "mscale": 1.0, "mscale_all_dim": 1.0},
        layers=[{"mixer": "full"}, {"mixer": "near"}, {"mixer": {"use": "full", "window": 9}}],
    )


def continued(model, prompt, count):
    """Greedy, each token by a forward over all before it."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_generates_cached_what_it_generates_without_a_cache(model):
    """Rows of different lengths, so with left padding; far past the windows and the original length."""
    prompts = [[5, 3, 8, 13, 21, 2, 7], [1], [9, 9, 4]]
    wanted = [continued(model, prompt, 20) for prompt in prompts]
    for chunk in (None, 2):
        found = cf.generate(model, prompts, max_new_tokens=20, prefill_chunk=chunk)
        assert [list(each.ids) for each in found] == wanted
    assert len({tuple(each) for each in wanted}) == 3


def test_cached_logits_equal_uncached_at_every_position(model, close):
    ids = torch.randint(0, 24, (2, 23), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        cache = model.new_cache(2, 23)
        parts = [model(part, cache=cache).logits for part in ids.split([9, 4, *[1] * 10], 1)]
        close(torch.cat(parts, 1), model(ids).logits)
    assert cache.num_bytes == 2 * 8 * (7 + 4) * (23 + 5 + 9)


def test_a_copy_is_the_same_model_in_every_phase(model):
    twin = copy.deepcopy(model)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        for phase in ("train", "prefill", "decode"):
            assert torch.equal(twin(ids, phase=phase).logits, model(ids, phase=phase).logits)
        for parameter in twin.parameters():
            parameter.zero_()
        assert not twin(ids, phase="decode").logits.any()
        assert model(ids, phase="decode").logits.any()


def test_training_lowers_the_loss(lab):
    model = lab.model(precision={"kind": "full", "dtype": "float32"}, model={"init_std": 0.1})
    ids = torch.arange(48).view(2, 24) * 5 % 24
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    losses = []
    for _ in range(12):
        logits = model(ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
