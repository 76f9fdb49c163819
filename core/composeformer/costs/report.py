"""All that is told of a spec's cost, section by section: each number with its unit, its definition and its source.

Every way of printing (a terminal, JSON, Markdown, a page) reads these sections; none computes.
"""

from collections.abc import Mapping
from functools import cached_property

from composeformer.costs import breakdown, compute, memory
from composeformer.costs.counts import Counts, cost
from composeformer.costs.economics import Assumption, Quantiles, Swing
from composeformer.costs.folders import Checkpoint, by_precision, checkpoint
from composeformer.costs.layout import Layout, layout
from composeformer.costs.ledger import Link
from composeformer.costs.pricing import Pricing, Sensitivity
from composeformer.costs.quantities import Quantity, Section, scaled
from composeformer.costs.steps import Steps, bubble
from composeformer.errors import InputError, one_of
from composeformer.model_config import SCHEDULES
from composeformer.spec import Spec

# Lengths that operations are told at, as far as the model goes.
CONTEXTS = (4096, 32768, 131072)
BATCHES = (1, 64)
# What replicas share, by the stage of ZeRO.
SHARED = (
    "nothing",
    "the optimizer's state",
    "the optimizer's state and gradients",
    "the optimizer's state, gradients and weights",
)


class Report:
    """The cost of one spec, operations at `context` tokens, draws from `seed`; with `precisions` its folder in each.

    Raises ComposeError where `[cost]` can not be, or for a context that is longer than the model's.
    """

    def __init__(
        self, spec: Spec, *, context: int | None = None, seed: int = 0, precisions: bool = False
    ) -> None:
        self.spec, self.seed, self.precisions = spec, seed, precisions
        longest = spec.model.max_position_embeddings
        for name, length in (("context", context), ("cost.context", spec.cost.context)):
            if length is not None and length > longest:
                raise InputError(f"{name} = {length}: must be <= max_position_embeddings ({longest})")
        self.counts: Counts = cost(spec, context=context if context is not None else spec.cost.context)
        self.context = self.counts.flops_per_token.context

    @property
    def is_priced(self) -> bool:
        """Whether the spec says what is trained."""
        cost = self.spec.cost
        return any(each is not None for each in (cost.tokens, cost.gpu_hours, cost.budget))

    @cached_property
    def pricing(self) -> Pricing:
        return Pricing(self.spec, self.counts if self.spec.cost.context in (None, self.context) else None)

    @cached_property
    def roles(self) -> Mapping[str, int]:
        """Parameters of every role, over all layers, the predictor's beside them."""
        return breakdown.by_role(self.spec)

    @cached_property
    def layers(self) -> list[int]:
        """Parameters of each layer."""
        return breakdown.by_layer(self.spec)

    @cached_property
    def layout(self) -> Layout:
        """Which device holds what. Raises InputError where devices can not be divided so."""
        return layout(self.spec)

    @cached_property
    def folder(self) -> Checkpoint:
        return checkpoint(self.spec)

    @cached_property
    def sections(self) -> dict[str, Section]:
        """Every section by its title, in order."""
        found: dict[str, Section] = {
            "parameters": self._parameters(),
            "folder": self._folder(),
            **({"folder by precision": self._folders()} if self.precisions else {}),
            "operations of a token": self._operations(),
            "decoding": self._decoding(),
            "memory of a device": self._memory(),
        }
        if self.is_priced:
            found |= {
                **self._step(),
                "run": self._run(),
                "utilisation": self._utilisation(),
                "development": self._development(),
                "organisation-year": self._year(),
            }
        return found

    @cached_property
    def ranges(self) -> Mapping[str, Quantiles]:
        """5, 50 and 95% of every scope; empty where there is no price."""
        return self.pricing.ranges(seed=self.seed) if self.is_priced else {}

    @cached_property
    def swings(self) -> list[Swing]:
        """What each assumption that has a range makes of the development, the widest first."""
        return self.pricing.tornado() if self.is_priced else []

    @cached_property
    def sensitivities(self) -> Mapping[str, Sensitivity]:
        """What each assumption that has a range makes of the result that depends on it."""
        return self.pricing.sensitivities() if self.is_priced else {}

    def _least(self, told: str) -> str:
        """The definition of a sum that lacks what components do not say."""
        silent = self.counts.unknown
        return f"at least, without what {one_of(silent)} computes; {told}" if silent else told

    def _cached(self, value: float, told: str) -> Quantity:
        """Bytes of cache, which are unknown where a mixer does not say what it keeps."""
        if self.counts.caches_unknown:
            told = f"{one_of(self.counts.unknown)}: the plugin does not say what is cached"
            return Quantity(value=None, unit="bytes", definition=told)
        return _count(value, "bytes", told)

    @property
    def assumptions(self) -> Mapping[str, Assumption]:
        """What the price depends on; empty where there is none."""
        return self.pricing.assumptions if self.is_priced else {}

    def _parameters(self) -> Section:
        counts = self.counts
        tied = "a tied matrix once; buffers and the predictor apart"
        found = {"total": _count(counts.total, "parameters", tied)}
        for slot, number in counts.by_slot.items():
            found[f"of {slot}"] = _count(number, "parameters", "part of the total")
        active = counts.active
        through = "that a token passes through"
        found["active, with both embeddings"] = _count(active.with_embeddings, "parameters", through)
        found["active, without the input embedding"] = _count(
            active.without_input_embedding, "parameters", through
        )
        found["active, without embeddings"] = _count(active.without_embeddings, "parameters", through)
        if counts.predictor:
            found["predictor"] = _count(counts.predictor, "parameters", "its own, beside the total")
            stored = counts.predictor + self.folder.copies
            found["predictor, as stored"] = _count(
                stored, "parameters", "with the copies of ends that a folder has"
            )
        for name, number in counts.buffers.items():
            found[f"buffer {name}"] = _count(number, "elements", "saved and not trained")
        told = f"{counts.cached_as}, before any window is full"
        found["cache of a token"] = self._cached(counts.cache_bytes_per_token, told)
        at = f"one sequence of {self.context:,} tokens; windows hold their width"
        found["cache of a sequence"] = self._cached(counts.cache_bytes_at_context, at)
        return found

    def _folder(self) -> Section:
        folder = self.folder
        found = {
            "tensors": _count(
                folder.tensors, "tensors", f"under {_names(folder)}, copies and scales included"
            ),
            "elements": _count(folder.elements, "elements", "of all tensors"),
            "bytes": _count(folder.bytes, "bytes", "without file headers"),
        }
        return found | {
            f"in {dtype}": _count(n, "elements", "stored so") for dtype, n in folder.by_dtype.items()
        }

    def _folders(self) -> Section:
        found = {}
        for name, each in by_precision(self.spec).items():
            if isinstance(each, Checkpoint):
                split = ", ".join(f"{count:,} {dtype}" for dtype, count in each.by_dtype.items())
                told = f"{each.elements:,} elements under {_names(each)}: {split}"
                found[name] = _count(each.bytes, "bytes", told)
            else:
                found[name] = Quantity(value=None, unit="bytes", definition=str(each))
        return found

    def _operations(self) -> Section:
        told = "forward, causal, matrix products; routers left out"
        found: dict[str, Quantity] = {}
        for name, work in compute.forward(self.spec, context=self.context).items():
            if work.total:
                found[name] = _flops(work.total, f"{told}, at {self.context:,} tokens")
        flops = self.counts.flops_per_token
        found["forward"] = _flops(
            flops.forward, f"all components, {flops.convention}, at {self.context:,} tokens"
        )
        full = compute.total(compute.forward(self.spec, context=self.context, causal=False))
        found["forward, full mask"] = _flops(full, self._least("no product is left out under the mask"))
        found["training"] = _flops(flops.training, self._least("three forwards, causal"))
        if self.counts.predictor:
            found["training, with the predictor"] = _flops(
                flops.training_with_predictor, self._least("its parts, and what it runs again")
            )
        longest = self.spec.model.max_position_embeddings
        for length in CONTEXTS:
            if self.context < length <= longest:
                longer = 3 * compute.total(compute.forward(self.spec, context=length))
                found[f"training at {length:,} tokens"] = _flops(
                    longer, self._least("three forwards, causal")
                )
        for name in self.counts.unknown:
            found[f"products of {name}"] = Quantity(
                value=None, unit="FLOP", definition="its plugin does not say"
            )
        return found

    def _decoding(self) -> Section:
        found: dict[str, Quantity] = {}
        for batch in BATCHES:
            each = compute.decode(self.spec, context=self.context, batch=batch)
            with_ = f"{batch} sequence{'s' if batch > 1 else ''} of {self.context:,} cached tokens"
            found[f"operations, batch {batch}"] = _flops(
                each.operations, self._least(f"a token of {'each of ' if batch > 1 else ''}{with_}")
            )
            found[f"weights read, batch {batch}"] = _count(
                each.weight_bytes, "bytes", "of experts those chosen"
            )
            found[f"cache read, batch {batch}"] = self._cached(each.cache_bytes, with_)
            found[f"intensity, batch {batch}"] = Quantity(
                value=None if self.counts.caches_unknown else each.intensity,
                unit="FLOP/byte",
                definition="operations over bytes read",
            )
        told = f"a token with {self.context:,} cached ones"
        for name, work in compute.decoding(self.spec, context=self.context).items():
            if work.total:
                found[f"operations of {name}"] = _flops(work.total, told)
        if self.counts.predictor:
            drafted = compute.total(compute.decoding(self.spec, context=self.context, predictor=True))
            found["operations, with a draft"] = _flops(
                drafted, self._least(f"{told}, and what is drafted after it")
            )
        for name, intensity in compute.attention_intensity(self.spec).items():
            told = "operations over bytes, for each cached token"
            found[f"intensity of {name}"] = Quantity(value=intensity, unit="FLOP/byte", definition=told)
        return found

    def _memory(self) -> Section:
        placed = self.layout
        found = memory.largest(memory.training(self.spec, placed, context=self.context))
        where = (
            "of all"
            if placed.pipeline == 1
            else f"of stage {found.stage + 1} of {placed.pipeline}, the largest"
        )
        shared = SHARED[placed.zero]
        told = (
            f"{where}; {placed.devices:,} devices, replicas share {shared}"
            if placed.devices > 1
            else "one device"
        )
        section = {
            "parameters": _count(found.parameters, "parameters", told),
            "weights": _count(found.weights, "bytes", "as they are gathered to compute"),
            "gradients": _count(found.gradients, "bytes", "as they are reduced"),
            "master weights": _count(
                found.master, "bytes", "that the optimizer updates, where they are wider"
            ),
            "moments": Quantity(
                value=found.moments, unit="bytes", definition="averages that the optimizer keeps"
            ),
            "buffers": _count(found.buffers, "bytes", "saved and not trained"),
        }
        if found.gathered:
            section["gathered"] = _count(
                found.gathered, "bytes", "the largest part that is whole while it computes"
            )
        made = self.spec.parallel.recompute
        passes = f"{found.in_flight} backward pass{'es' * (found.in_flight > 1)}"
        told = f"kept for {passes} of {found.tokens:,} tokens, recompute = {made}"
        if found.silent:
            told = f"{one_of(found.silent)}: the plugin does not say what is kept"
        section["activations"] = Quantity(value=found.activations, unit="bytes", definition=told)
        everything = "of these" if found.activations is not None else "activations aside"
        held = memory.cached(self.spec, placed, found.stage, self.context)
        told = f"of one sequence of {self.context:,} tokens in decoding; training keeps none, and the sum has none"
        return section | {
            "all": _count(found.total, "bytes", everything),
            **self._fits(found.total, everything),
            "cache of a sequence": self._cached(held, told),
        }

    def _fits(self, total: float, everything: str) -> Section:
        """What part of the memory that a device has this is."""
        if not self.is_priced:
            return {}
        has = self.pricing.hardware.memory
        told = f"{everything}, over the {scaled(has.value, 'B')} of the device"
        if total > has.value:
            told += ": it does not fit"
        return {"share of the device": _count(total / has.value, "", told, has.source, has.read)}

    def _step(self) -> dict[str, Section]:
        """A step of the run, where the spec says its sizes."""
        train = self.spec.document.data.get("train")
        if not (isinstance(train, dict) and "batch_size" in train):
            return {}
        hardware, placed = self.pricing.hardware, self.layout
        step = Steps(self.spec, placed, hardware).slowest
        traffic = step.traffic
        where = (
            "" if placed.pipeline == 1 else f"of stage {step.stage + 1} of {placed.pipeline}, the slowest; "
        )
        section = {"tokens": _count(traffic.tokens, "tokens", f"{where}of one device")}
        for name, roof in step.roofs.items():
            told = f"at least, bound by {roof.bound}: {scaled(roof.operations, 'FLOP')}, {scaled(roof.bytes, 'B')}"
            section[name] = _count(roof.seconds, "s", told)
        sums: dict[tuple[str, Link], tuple[float, float]] = {}
        for sent in traffic.sent:
            size, seconds = sums.get((sent.purpose, sent.link), (0.0, 0.0))
            sums[sent.purpose, sent.link] = size + sent.bytes, seconds + sent.seconds
        moved = {}
        for (purpose, link), (size, seconds) in sums.items():
            key, bandwidth = f"{purpose}, {link} links", traffic.cluster.links[link].bandwidth
            told = f"alone, at {scaled(bandwidth.value, 'B')} a second"
            section[f"communication: {key}"] = _count(seconds, "s", told, bandwidth.source, bandwidth.read)
            moved[key] = _count(size, "bytes", f"{where}sent by one device")
            moved[f"{key}, a token"] = _count(size / traffic.tokens, "bytes", "over the tokens of the device")
        if placed.pipeline > 1:
            section["bubble"] = _count(step.bubble, "s", f"idle under {self.spec.parallel.schedule}")
            for name in SCHEDULES:
                if name != self.spec.parallel.schedule and not (name == "dualpipe" and placed.pipeline % 2):
                    idle = bubble(name, placed.pipeline, self.spec.train.micro_batches, step.compute)
                    section[f"bubble, {name} instead"] = _count(idle, "s", "of the same computation")
        section["least"] = _count(step.hidden, "s", "all communication behind computation, at peak")
        section["least, nothing hidden"] = _count(
            step.exposed, "s", "computation, communication and bubble in turn, at peak"
        )
        tokens = self.spec.train.batch_size * self.spec.train.sequence_length
        used = tokens * self.pricing.per_token / (placed.devices * self.pricing.utilisation.achieved)
        section["at the utilisation of the run"] = _count(used, "s", "what the run's hours imply")
        return {"optimizer step": section, **({"communication of a step": moved} if moved else {})}

    def _run(self) -> Section:
        price, config = self.pricing, self.spec.cost
        run, of = price.run, price.assumptions
        hardware = price.hardware
        peak = price.peak
        hours = f"{config.goodput:.0%} of the hours count" if config.goodput < 1 else "no hour is lost"
        given = "stated" if config.gpu_hours is not None else f"operations over peak and utilisation; {hours}"
        given = "what the budget buys, other stages paid" if config.budget is not None else given
        power = hardware.power
        return {
            "tokens": _count(price.tokens, "tokens", "of pre-training"),
            "operations": _flops(
                run.operations,
                self._least("tokens by training operations, causal, without a predictor"),
            ),
            "peak of a device": _flops(
                peak.value, f"dense, {config.peak}, a second: {hardware.description}", peak.source, peak.read
            ),
            "hours of pre-training": _count(run.pretraining_hours, "device hours", given),
            "hours": _count(run.hours, "device hours", "with what follows: longer context, alignment"),
            "days": _count(run.days, "days", f"of all these hours, on {config.gpus:,} devices"),
            "rent": _money(run.rent, "hours by the rate", of["rate"]),
            "owned instead": _money(
                run.owned, f"at ${run.owned_rate:.2f} an hour, value falls as compute becomes cheaper"
            ),
            "owned, straight line": _money(
                run.straight, f"at ${run.straight_rate:.2f} an hour over its life"
            ),
            "energy": _count(run.energy, "kWh", "at the facility", power.source, power.read),
            "price of the energy": _money(
                run.energy_cost, "of the grid; owning holds it already", of["electricity"]
            ),
            "carbon": _count(run.carbon, "kg CO2e", "of the energy", of["carbon"].source, of["carbon"].read),
        }

    def _utilisation(self) -> Section:
        found, peak = self.pricing.utilisation, self.spec.cost.peak
        told = f"of the {peak} peak"
        section = {
            "operations of a device": _flops(found.achieved, "a second, causal, without a predictor"),
            "causal": _share(found.causal, f"{told}, without a predictor"),
            "full mask": _share(
                found.full_mask, f"{told}, without a predictor, nothing left out under the mask"
            ),
        }
        if found.with_predictor is not None:
            section["with the predictor"] = _share(found.with_predictor, f"{told}, causal")
        for dtype, share in found.of_other_peaks.items():
            section[f"of the {dtype} peak"] = _share(share, "causal, without a predictor")
        return section

    def _development(self) -> Section:
        made, of = self.pricing.development, self.pricing.assumptions
        return {
            "final run": _money(made.final, "the rent, with what had to be done again", of["restarts"]),
            "experiments": _money(made.experiments, "a multiple of the final run", of["experiments"]),
            "people": _money(made.people, "headcount, salary, years, share", of["headcount"]),
            "all": _money(made.total, "never added to the run or to a year of the organisation"),
        }

    def _year(self) -> Section:
        year = self.pricing.fleet
        of = f"{year.devices:,} devices"
        return {
            "rented": _money(year.rented, f"{of}, every hour of the year"),
            "owned instead": _money(year.owned, f"{of}, energy included"),
            "people": _money(year.people, "headcount by salary"),
            "power": _money(year.power_bill, f"of {of}; owning holds it already"),
            "price of the devices": _money(year.devices_price, "devices alone"),
            "price of the cluster": _money(year.cluster_price, "servers and network included"),
        }


def _names(folder: Checkpoint) -> str:
    return "its own names" if folder.dialect == "native" else f"the names of {folder.dialect}"


def _count(value: float, unit: str, definition: str, source: str = "", read: bool = True) -> Quantity:
    return Quantity(value=value, unit=unit, definition=definition, source=source, confirmed=read)


def _flops(value: float, definition: str, source: str = "", read: bool = True) -> Quantity:
    return _count(value, "FLOP", definition, source, read)


def _money(value: float, definition: str, assumed: Assumption | None = None) -> Quantity:
    source, read = ("", True) if assumed is None else (assumed.source, assumed.read)
    return _count(value, "USD", definition, source, read)


def _share(value: float, definition: str) -> Quantity:
    return _count(value, "", definition)
