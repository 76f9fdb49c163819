"""Bugs of optimizers: what decays and by how much, what a state keeps, and which learning rate is read."""

from collections.abc import Iterator

import torch
from museum_kit import mutant, replaced

MAKE = "composeformer_training.adamw:make"


def stepping(change):
    """Makes `make`'s optimizers step as `change(step, optimizer)` says."""

    def wrong(make):
        def made(config, trained, learning_rate):
            found = make(config, trained, learning_rate)
            own, step = type(found), type(found).step

            class Changed(own):
                def step(self, closure=None):
                    return change(lambda c=closure: step(self, c), self)

            found.__class__ = Changed
            return found

        return made

    return wrong


def parameters(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


@mutant(
    "steps-forgotten-by-the-state",
    "optimizer",
    "adamw",
    "a loaded state counts its steps from 0 again: the start's bias is taken out twice",
    source="pitfalls 1, 23: mosaicml/streaming#880, torchtune PR198 in kind",
)
def steps_forgotten() -> Iterator[None]:
    def wrong(make):
        def made(config, trained, learning_rate):
            found = make(config, trained, learning_rate)
            load = found.load_state_dict

            def forgetful(state):
                load(state)
                for kept in found.state.values():
                    kept["step"].zero_()

            found.load_state_dict = forgetful
            return found

        return made

    with replaced(MAKE, wrong):
        yield


@mutant(
    "bias-in-no-group",
    "optimizer",
    "adamw",
    "parameters that are neither matrices nor of a known name are in no group, and never train",
    source="groups by name patterns: nanoGPT forks, HF's decay_parameters",
)
def bias_in_no_group() -> Iterator[None]:
    def wrong(make):
        def some(config, trained, learning_rate):
            return make(config, [one for one in trained if one.is_matrix], learning_rate)

        return some

    with replaced(MAKE, wrong):
        yield


@mutant(
    "learning-rate-of-the-start",
    "optimizer",
    "adamw",
    "steps are of the learning rate that the optimizer was made with: schedules change nothing",
    source="lr captured in a closure or a compiled step; torch#120934 in kind",
)
def learning_rate_of_the_start() -> Iterator[None]:
    def change(step, optimizer):
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group.setdefault("start", group["lr"])
            group["lr"] = group["start"]
        found = step()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        return found

    with replaced(MAKE, stepping(change)):
        yield


@mutant(
    "decay-without-a-gradient",
    "optimizer",
    "adamw",
    "parameters that had no gradient decay all the same: experts that nobody chose fade",
    source="zero gradients in place of none (set_to_none=False); fused buffers of DeepSpeed and Megatron",
)
def decay_without_a_gradient() -> Iterator[None]:
    def change(step, optimizer):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        return step()

    with replaced(MAKE, stepping(change)):
        yield


@mutant(
    "steps-uphill",
    "optimizer",
    "adamw",
    "the update is added",
    source="maximize left on",
)
def steps_uphill() -> Iterator[None]:
    def change(step, optimizer):
        for p in parameters(optimizer):
            p.grad = -p.grad
        found = step()
        for p in parameters(optimizer):
            p.grad = -p.grad
        return found

    with replaced(MAKE, stepping(change)):
        yield


@mutant(
    "closure-without-gradients",
    "optimizer",
    "adamw",
    "the closure is called with gradients off",
    source="step under no_grad without enable_grad around the closure",
)
def closure_without_gradients() -> Iterator[None]:
    def wrong(make):
        def made(config, trained, learning_rate):
            found = make(config, trained, learning_rate)
            step = found.step

            def off(closure=None):
                if closure is None:
                    return step()
                with torch.no_grad():
                    loss = closure()
                step()
                return loss

            found.step = off
            return found

        return made

    with replaced(MAKE, wrong):
        yield


@mutant(
    "normalised-by-all-gradients",
    "optimizer",
    "adamw",
    "gradients are divided by the norm of all that this optimizer holds: other layouts, other steps",
    source="pitfalls 2, 16: local norms; clipping inside the optimizer",
)
def normalised_by_all_gradients() -> Iterator[None]:
    def change(step, optimizer):
        kept = [p.grad for p in parameters(optimizer)]
        norm = torch.stack([g.double().norm() for g in kept]).norm()
        for p, g in zip(parameters(optimizer), kept, strict=True):
            p.grad = (g / norm.clamp(min=1)).to(g.dtype)
        found = step()
        for p, g in zip(parameters(optimizer), kept, strict=True):
            p.grad = g
        return found

    with replaced(MAKE, stepping(change)):
        yield


@mutant(
    "clipped-by-the-norm-of-a-tensor",
    "optimizer",
    "adamw",
    "each tensor's gradient is divided by its own norm: a shard's is not the whole's",
    source="pitfalls 2, 16: MLM PR6489, PT#170862; LAMB-like scaling over shards",
)
def clipped_by_the_norm_of_a_tensor() -> Iterator[None]:
    def change(step, optimizer):
        kept = [p.grad for p in parameters(optimizer)]
        for p, g in zip(parameters(optimizer), kept, strict=True):
            p.grad = (g / g.double().norm().clamp(min=1)).to(g.dtype)
        found = step()
        for p, g in zip(parameters(optimizer), kept, strict=True):
            p.grad = g
        return found

    with replaced(MAKE, stepping(change)):
        yield


@mutant(
    "decay-without-the-learning-rate",
    "optimizer",
    "adamw",
    "weights decay by the decay alone, not times the learning rate: warm-up from zero shrinks them",
    source="fully decoupled decay taken for PyTorch's",
)
def decay_without_the_learning_rate() -> Iterator[None]:
    def change(step, optimizer):
        with torch.no_grad():
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.mul_(1 - 1e-3 * group["weight_decay"])
        return step()

    with replaced(MAKE, stepping(change)):
        yield


@mutant(
    "moments-in-the-weights-dtype",
    "optimizer",
    "adamw",
    "a state is loaded in the dtype of the weights, whatever it was kept in",
    source="torch.optim.Optimizer.load_state_dict, which casts state to its parameter",
)
def moments_in_the_weights_dtype() -> Iterator[None]:
    def wrong(load):
        return torch.optim.Optimizer.load_state_dict

    with replaced("composeformer_training.moments:MomentAdamW.load_state_dict", wrong):
        yield


@mutant(
    "eps-that-is-always-there",
    "optimizer",
    "adamw",
    "a small number is added to the squares, beside eps: small gradients take small steps",
    source="eps inside the root: arXiv 2003.05689's difference between frameworks",
)
def eps_always_there() -> Iterator[None]:
    def wrong(make):
        import attrs

        return lambda config, trained, rate: make(attrs.evolve(config, eps=config.eps + 1e-8), trained, rate)

    with replaced(MAKE, wrong):
        yield


@mutant(
    "moments-start-biased",
    "optimizer",
    "adamw",
    "moments keep the bias of their start at zero",
    source="BertAdam: no bias correction, carried into many ports",
)
def moments_start_biased() -> Iterator[None]:
    def change(step, optimizer):
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p in optimizer.state and "step" in optimizer.state[p]:
                    optimizer.state[p]["step"].fill_(1e6)
        return step()

    with replaced(MAKE, stepping(change)):
        yield


@mutant(
    "decay-inside-the-moments",
    "optimizer",
    "adamw",
    "decay is added to the gradient, as in Adam with L2",
    source="arXiv 1711.05101: what it tells apart; optimizers called AdamW that are not",
    by="optimizer.adam",
)
def decay_inside_the_moments() -> Iterator[None]:
    def change(step, optimizer):
        kept = []
        decays = [group["weight_decay"] for group in optimizer.param_groups]
        for group, decay in zip(optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = 0.0
            for p in group["params"]:
                kept.append((p, p.grad))
                if p.grad is not None:
                    p.grad = p.grad + decay * p.detach()
        found = step()
        for p, g in kept:
            p.grad = g
        for group, decay in zip(optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay
        return found

    with replaced(MAKE, stepping(change)):
        yield


@mutant(
    "norms-decay",
    "optimizer",
    "adamw",
    "norms and biases decay like matrices",
    source="one group for all: torch's default",
    by="optimizer.adam",
)
def norms_decay() -> Iterator[None]:
    def change(step, optimizer):
        decays = [group["weight_decay"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["weight_decay"] = max(decays)
        found = step()
        for group, decay in zip(optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay
        return found

    with replaced(MAKE, stepping(change)):
        yield


@mutant(
    "moments-rounded-before-they-are-used",
    "optimizer",
    "adamw",
    "a step reads moments that were already rounded to the dtype they are kept in",
    source="8-bit and bf16 optimizer states that store first",
    by="optimizer.adam",
)
def moments_rounded_before_use() -> Iterator[None]:
    def wrong(update):
        def rounded(self, parameter, group):
            narrow = torch.float64 if group["moment"] == "float64" else getattr(torch, group["moment"])
            kept, parameter.grad = parameter.grad, parameter.grad.to(narrow).to(parameter.dtype)
            update(self, parameter, group)
            parameter.grad = kept

        return rounded

    with replaced("composeformer_training.moments:MomentAdamW._update", wrong):
        yield
