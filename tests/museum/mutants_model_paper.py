"""Bugs of whole models on paper and on disk: counts, operations, folders, specs, initial values, copies."""

from collections.abc import Iterator

import torch
from museum_kit import model_mutant, replaced


@model_mutant(
    "a-copy-computes-with-the-original",
    "a deep copy's views of other phases are the original's",
    source="PyTorch #32651: bound forwards in deep copies",
)
def a_copy_computes_with_the_original() -> Iterator[None]:
    def shared(_):
        return lambda self, memo: type(self)(self._owner, self._classes)

    with replaced("composeformer.implementations:Dispatch.__deepcopy__", shared):
        yield


@model_mutant(
    "values-from-the-global-random-state",
    "initial values depend on what was drawn before them",
    source="pitfalls 1, row 24 (Megatron-LM #1517)",
)
def values_from_the_global_random_state() -> Iterator[None]:
    def drawn(initial):
        def wrong(name, weight, seed, std, groups=None):
            found = initial(name, weight, seed, std, groups)
            return torch.randn(found.shape) * std if found.ndim > 1 else found

        return wrong

    with replaced("composeformer.assemble:initial", drawn):
        yield


@model_mutant(
    "the-predictor-is-left-unwritten",
    "the predictor's weights keep what was in memory",
    source="pitfalls 2, row 23 (transformers #46129)",
)
def the_predictor_is_left_unwritten() -> Iterator[None]:
    def unwritten(initial):
        def wrong(name, weight, seed, std, groups=None):
            found = initial(name, weight, seed, std, groups)
            return torch.empty_like(found) if name.startswith("predictor.") else found

        return wrong

    with replaced("composeformer.assemble:initial", unwritten):
        yield


@model_mutant(
    "cache-holds-every-head",
    "keys and values are repeated to all heads before they are cached",
    source="transformers PR 24653's first form: repeated keys in the cache",
)
def cache_holds_every_head() -> Iterator[None]:
    def wide(new_cache):
        def wrong(self, batch_size, max_length, max_rollback=0):
            from composeformer.cache import TokenCache

            shape = (self.q.weight.shape[0] // self.head_dim, self.head_dim)
            return TokenCache(
                {"k": shape, "v": shape},
                batch_size,
                max_length,
                device=self.k.weight.device,
                dtype=self.k.dtype,
                window=self.window,
                max_rollback=max_rollback,
            )

        return wrong

    with replaced("composeformer_dense.attention:Attention.new_cache", wide):
        yield


@model_mutant(
    "a-tied-matrix-counts-twice",
    "a shared matrix is counted where it is used, too",
    source="pitfalls 1, row 21 (NeMo AutoModel #1592)",
)
def a_tied_matrix_counts_twice() -> Iterator[None]:
    def twice(_):
        return lambda node: sum(weight.elements for _, weight in node.tensors() if weight.trains)

    with replaced("composeformer.costs.counts:parameters", twice):
        yield


@model_mutant(
    "every-expert-is-active",
    "experts that a token does not choose count as active",
    source="pitfalls 1, row 20 (torchtitan #452)",
)
def every_expert_is_active() -> Iterator[None]:
    def every(_):
        from composeformer.costs.counts import parameters

        return parameters

    with replaced("composeformer.costs.counts:active_parameters", every):
        yield


@model_mutant(
    "predictions-use-no-head",
    "the head's products for predictions are not in the cost",
    source="pitfalls 1, row 20 (torchtitan PR 4300)",
)
def predictions_use_no_head() -> Iterator[None]:
    with replaced("composeformer_mtp.config:MTP.cost", lambda _: lambda self, site, phase: ()):
        yield


@model_mutant(
    "a-saved-bias-is-zero",
    "the tensor that is saved is not the one that the router moves",
    source="pitfalls 2, row 5 (torchtitan #1222)",
)
def a_saved_bias_is_zero() -> Iterator[None]:
    def stale(lead):
        def wrong(placement, state, work):
            kept = {n: torch.zeros_like(t) if n.endswith("router.bias") else t for n, t in state.items()}
            return lead(placement, kept, work)

        return wrong

    with replaced("composeformer.store.saving:lead", stale):
        yield


@model_mutant(
    "a-folder-lacks-the-predictor",
    "the predictor's tensors are not written",
    source="pitfalls 1, row 13 (transformers #35688)",
    by="model.written",
)
def a_folder_lacks_the_predictor() -> Iterator[None]:
    def dropping(write_shards):
        def wrong(folder, tensors, **more):
            kept = ((name, tensor) for name, tensor in tensors if not name.startswith("predictor."))
            return write_shards(folder, kept, **more)

        return wrong

    with replaced("composeformer.store.saving:write_shards", dropping):
        yield


@model_mutant(
    "a-read-model-lists-its-parameters-otherwise",
    "the optimizer of a model that was read has its parameters in another order, and takes another's averages",
    source="pitfalls 1, row 24 (nanotron #106)",
)
def a_read_model_lists_its_parameters_otherwise() -> Iterator[None]:
    def turned(trained):
        def wrong(model):
            found = trained(model)
            matrices = [n for n, one in enumerate(found) if one.is_matrix]
            if model.folder is not None:
                order = dict(
                    zip(matrices, sorted(matrices, key=lambda n: found[n].weight.shape), strict=True)
                )
                found = [found[order.get(n, n)] for n in range(len(found))]
            return found

        return wrong

    with replaced("composeformer.train.trainer:trained", turned):
        yield


@model_mutant(
    "an-export-states-the-usual-eps",
    "the config of a folder has the family's usual eps, whatever the model's norms have",
    source="pitfalls 2, row 20 (transformers #44261)",
)
def an_export_states_the_usual_eps() -> Iterator[None]:
    def usual(to_config):
        def wrong(self, spec):
            found = to_config(self, spec)
            return {**found, "rms_norm_eps": 1e-6} if "rms_norm_eps" in found else found

        return wrong

    with replaced("composeformer.dialects.dialect:Dialect.to_config", usual):
        yield


@model_mutant(
    "every-role-has-the-first-policy",
    "exceptions by role are listed, and every map is made by the policy that was made first",
    source="pitfalls 1, row 15 (ao #4101: a filter of modules that is not asked)",
)
def every_role_has_the_first_policy() -> Iterator[None]:
    def first(policy):
        def wrong(self, part):
            for made in self._policies.values():
                return made
            return policy(self, part)

        return wrong

    with replaced("composeformer.assemble:Builder._policy", first):
        yield


@model_mutant(
    "numbers-are-rounded-in-writing",
    "a spec's floats are written with six digits",
    source="six digits of many printers of configs: JSON of 1e-06 and 0.1 + 0.2",
)
def numbers_are_rounded_in_writing() -> Iterator[None]:
    def rounding(line):
        return lambda key, value: line(key, float(f"{value:.5g}") if isinstance(value, float) else value)

    with replaced("composeformer.spec.writer:_line", rounding):
        yield


@model_mutant(
    "unknown-keys-are-passed-over",
    "an unknown key of a component is no finding",
    source="pitfalls 1, row 6 (Soup #627)",
)
def unknown_keys_are_passed_over() -> Iterator[None]:
    def lenient(problem):
        def wrong(self, path, found, allowed, near=None, *, fatal=True):
            if fatal or not allowed.startswith("unknown"):
                problem(self, path, found, allowed, near, fatal=fatal)

        return wrong

    with replaced("composeformer.spec.resolve:Resolver.problem", lenient):
        yield
