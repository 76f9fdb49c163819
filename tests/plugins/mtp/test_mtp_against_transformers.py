"""The released form of multi-token prediction, judged by transformers: draft logits, and greedy text with drafts.

transformers reads a checkpoint's further layers only where a class attribute names them, and at batch 1.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

import composeformer as cf
from composeformer.decoder import Model
from composeformer.generation import generate
from composeformer.spec import Spec
from composeformer.train import TokenBatch, train_step, trainer

JUDGE = transformers.DeepseekV3ForCausalLM
BOUND = 1e-5


@pytest.fixture(scope="module", params=[1, 2], ids=["depth-1", "depth-2"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[tuple[Model, Any]]:
    """Ours, which has learnt a little so that some drafts are right, and theirs from the exported folder."""
    depth, folder = request.param, tmp_path_factory.mktemp("mtp")
    spec = Spec.load("tiny-deepseek-v3").with_({"predictor.depth": depth, "train.learning_rate": 0.005})
    model = cf.build(spec, seed=3)
    objective, optimizer = trainer(model)
    ids = torch.randint(0, 256, (1, 20), generator=torch.Generator().manual_seed(0)).repeat(4, 3)
    for step in range(25):
        train_step(model, [TokenBatch(ids)], objective, optimizer, step=step)
    cf.save(model.eval(), folder / "ours")
    cf.export_model(folder / "ours", folder / "theirs")
    with pytest.MonkeyPatch.context() as patch:
        layers = [rf"model\.layers\.{len(spec.layers) + k}\..*" for k in range(depth)]
        patch.setattr(JUDGE, "_keys_to_ignore_on_load_unexpected", layers)
        judge = JUDGE.from_pretrained(Path(folder / "theirs")).eval()
        judge.generation_config.eos_token_id = None
        yield model, judge


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def test_draft_logits_are_theirs(pair: tuple[Model, Any]) -> None:
    model, judge = pair
    ids = torch.randint(0, 256, (1, 33), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden = model(ids).hidden
        newest = torch.tensor([[7]])
        following = torch.cat([ids[:, 1:], newest], 1)
        said: list[torch.Tensor] = []

        def choose(_: int, logits: torch.Tensor) -> torch.Tensor:
            said.append(logits)
            return logits.argmax(-1)

        drafting = model.predictor.new_cache(1, 64)
        drafts = model.predictor.draft(hidden, following, None, drafting, model.rotary, choose)
        theirs = MtpModel.from_pretrained(judge).eval()
        found, logits, _ = theirs(
            input_ids=following,
            last_hidden_states=hidden,
            attention_mask=None,
            position_ids=torch.arange(1, 34)[None],
            mtp_cache=MtpCache(config=judge.config.get_mtp_config()),
        )
    assert relative(torch.stack(said, 1), logits) < BOUND
    assert torch.equal(drafts, found)


def test_predictions_at_every_position_are_theirs(pair: tuple[Model, Any]) -> None:
    model, judge = pair
    ids = torch.randint(0, 256, (1, 150), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours = model(ids, predict=True)
        theirs = MtpModel.from_pretrained(judge).eval()
        hidden = ours.hidden
        for k, prediction in enumerate(ours.predictions):
            cache = MtpCache(config=judge.config.get_mtp_config())
            positions = torch.arange(k + 1, 150)[None]
            given = {"input_ids": ids[:, k + 1 :]}
            hidden = theirs.forward_layer(k, hidden[:, : 149 - k], positions, cache, **given)
            assert relative(prediction.hidden, hidden) < BOUND
            assert relative(prediction.logits, judge.lm_head(hidden)) < BOUND


def test_greedy_text_with_drafts_is_theirs(pair: tuple[Model, Any]) -> None:
    model, judge = pair
    generator = torch.Generator().manual_seed(4)
    accepted = 0
    for length in (1, 5, 40):
        ids = torch.randint(0, 256, (1, length), generator=generator)
        options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
        mask = torch.ones_like(ids)
        theirs = judge.generate(ids, attention_mask=mask, use_mtp=True, **options)[0, length:]
        (ours,) = generate(model, ids, max_new_tokens=24, speculate=True)
        assert list(ours.ids) == theirs.tolist()
        accepted += ours.accepted
    assert accepted
