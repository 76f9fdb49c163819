"""What a new plugin starts from: for each slot that something reads components of, a part and a word on changing it."""

import attrs

from composeformer.contracts import SLOTS
from composeformer.errors import InputError, Problem, nearest, one_of


@attrs.frozen
class Start:
    """The part that a template computes, in a few words, and what its author is to know before changing it."""

    summary: str
    advice: str


STARTS: dict[str, Start] = {
    "embedding": Start(
        "a row per token, times sqrt(hidden_size)",
        "A tied head is the tensor `embedding.weight` itself: keep that name. Each token is embedded alone.",
    ),
    "head": Start(
        "a logit per token, softly capped",
        "Each token's logits depend on its own hidden state alone.",
    ),
    "mixer": Start(
        "the mean of all tokens so far",
        "A token sees itself and those before it, of its own document; what stands at padding may be NaN and changes\n"
        "nothing; pieces read with a cache give what one forward gives, also after a rollback. `cost` tells what\n"
        "tensors can not: products of activations, and what decoding caches.",
    ),
    "ffn": Start(
        "two maps around a squared relu",
        "Each token is computed alone, in any order, and padding enters no count, loss or gradient.",
    ),
    "router": Start(
        "the softmax of the largest logits",
        "A token names `top_k` distinct experts, with weights in fp32; of equal scores the lowest index is chosen.",
    ),
    "norm": Start(
        "divides by the root mean square",
        "It normalises the last dimension, computes in fp32 at least, and gives its input's dtype.",
    ),
    "position": Start(
        "pairs of features turn with their position",
        "Tables are fp32, made from positions at every forward; `rotate` with `inverse` undoes it. It has no tensors.",
    ),
    "residual": Start(
        "pre-norm, with a learnt scale for what each sublayer adds",
        "It calls each sublayer once and keeps the stream's dtype. At a model's ends and in a predictor `site.layer`\n"
        "is None, and there it has the last norm.",
    ),
    "predictor": Start(
        "the token after the next one, from a hidden state and the next token",
        "The label of its prediction at t is token t + 2 of the same document. `new_cache`, `num_drafts` and `draft`\n"
        "make speculative decoding of it; without them it only trains.",
    ),
    "precision": Start(
        "weights rounded to a few bits, a scale per output",
        "`matrix()` is the weight that `forward` multiplies by, with a gradient. `format` says on paper how each\n"
        "tensor is stored and multiplied; rules can name this precision for some maps alone.",
    ),
    "codec": Start(
        "integers of 8 bits, a scale per output",
        "The precision of the same name stores weights by the codec, which is how a model comes to use it. Encoding\n"
        "what was decoded gives the same codes and scales; each group is coded alone.",
    ),
    "comm": Start(
        "rows sorted by expert in one process",
        "Each token's sum, with its gradients, is that of `local`. A backend for several processes leaves `processes`\n"
        "out and declares its bytes: `composeformer.costs.ledger.CommConfig`.",
    ),
    "objective": Start(
        "cross-entropy of the next token with softened labels",
        "It gives a sum and its weight, so that micro-batches and processes add; without labels both are zero.",
    ),
    "optimizer": Start(
        "a step against each gradient's sign",
        "What `step` keeps in `self.state[parameter]` is saved and resumed; each parameter's format says in which\n"
        "dtype (`one.format.moment`). Elements must not depend on how parameters are laid out.",
    ),
}


def start_of(slot: str) -> Start:
    """What a plugin of this slot starts from. Raises InputError for no slot, or one that nothing reads."""
    found = STARTS.get(slot)
    if found is None:
        reason = "nothing reads components of this slot" if slot in SLOTS else "is no slot"
        raise InputError(
            str(Problem("slot", slot, f"{reason}; allowed: {one_of(STARTS)}", nearest(slot, STARTS)))
        )
    return found
