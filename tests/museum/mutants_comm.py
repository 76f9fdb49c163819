"""Bugs of exchanges: whose rows, which weights, in what order, how many bytes, and ranks without a token."""

from collections.abc import Iterator

from museum_kit import mutant, replaced

LOCAL, ROUTES, SORTING = "composeformer_comm.local", "composeformer_comm.routes", "composeformer_comm.sorting"


@mutant(
    "weights-before-experts",
    "comm",
    "local",
    "routing weights multiply what goes into the experts",
    source="pitfalls 2.3 and 4.7: where gates multiply",
)
def weights_before_experts() -> Iterator[None]:
    def wrong(dispatch):
        def early(self, x, routing):
            rows, counts, sent = dispatch(self, x, routing)
            own = sent.weights.reshape(-1)[sent.order][:, None]
            return (rows * own).to(rows.dtype), counts, sent._replace(weights=sent.weights * 0 + 1)

        return early

    with replaced(f"{LOCAL}:LocalExchange.dispatch", wrong):
        yield


@mutant(
    "weights-twice",
    "comm",
    "local",
    "routing weights multiply in the backend, and where its results are used",
    source="pitfalls 2.3: two layers may own a factor",
)
def weights_twice() -> Iterator[None]:
    def wrong(combine):
        return lambda self, rows, sent: combine(
            self, rows, sent._replace(weights=sent.weights * sent.weights)
        )

    with replaced(f"{LOCAL}:LocalExchange.combine", wrong):
        yield


@mutant(
    "weights-after-the-sum",
    "comm",
    "local",
    "a token's rows are summed, and the sum is multiplied by the mean weight",
    source="arXiv 2412.19437, section 3.2.2: partial sums are of weighed rows",
)
def weights_after_the_sum() -> Iterator[None]:
    def wrong(combine):
        def late(self, rows, sent):
            plain = combine(self, rows, sent._replace(weights=(sent.weights != 0).to(sent.weights.dtype)))
            return plain * sent.weights.mean(-1, keepdim=True)

        return late

    with replaced(f"{LOCAL}:LocalExchange.combine", wrong):
        yield


@mutant(
    "nobody-weighs",
    "comm",
    "collective",
    "the weight of no expert is multiplied with zeros, NaN or not",
    source="pitfalls 2.14: 0 times NaN",
)
def nobody_weighs() -> Iterator[None]:
    def wrong(gather):
        return lambda rows, order, places, weights: gather(
            rows, order, places, weights + 0 * weights.detach()
        )

    def start(before):
        def unmasked(self, x, indices, weights):
            return before(self, x, indices, weights)._replace(weights=weights)

        return unmasked

    with replaced(f"{ROUTES}:gather", wrong), replaced(f"{ROUTES}:PerExpert.start", start):
        yield


@mutant(
    "metadata-is-not-counted",
    "comm",
    "collective",
    "counts, indices and weights travel and are in no ledger",
    source="byte counts that name the payload alone",
)
def metadata_is_not_counted() -> Iterator[None]:
    def wrong(start):
        def payload(self, rows, sent, received, hop, step, contents):
            features = [each for each in contents if each[0] != "metadata"]
            return start(self, rows, sent, received, hop, step, features)

        return payload

    with replaced("composeformer_comm.transport:Transport.start", wrong):
        yield


@mutant(
    "backward-is-not-declared",
    "comm",
    "collective",
    "the bytes of the backward pass are declared to be those of the forward pass",
    source="traffic formulas that double the dispatch, whose format the combine has not",
)
def backward_is_not_declared() -> Iterator[None]:
    def wrong(moves):
        def doubled(config, hop, top_k, rows, backward):
            forward = moves(config, hop, top_k, rows, False)
            again = moves(config, hop, top_k, rows, backward)[len(forward) :]
            return [*forward, *(move._replace(row=forward[0].row) for move in again)]

        return doubled

    with replaced("composeformer_comm.declared:moves", wrong):
        yield


@mutant(
    "an-idle-rank-stays-away",
    "comm",
    "collective",
    "a rank where nothing needs a gradient has no backward pass, and the others wait for it",
    source="pitfalls 2.13: hangs where a rank has no tokens",
)
def an_idle_rank_stays_away() -> Iterator[None]:
    def wrong(travelled):
        def detached(x, weights, arrived, carrier, legs):
            if x.requires_grad:
                return travelled(x, weights, arrived, carrier, legs)
            return arrived.rows, arrived.weights, x.new_zeros(())

        return detached

    # It is seen by nobody coming; that need not take long.
    with (
        replaced(f"{ROUTES}:travelled", wrong),
        replaced("composeformer.testing.exchanging:TIMEOUT", lambda seconds: 3.0),
    ):
        yield


@mutant(
    "beside-twice",
    "comm",
    "local",
    "what is computed beside is computed to see whether there is anything, and again",
    source="shared experts computed twice",
)
def beside_twice() -> Iterator[None]:
    def wrong(exchange):
        def twice(self, x, routing, experts, beside=None):
            if beside is not None:
                beside()
            return exchange(self, x, routing, experts, beside)

        return twice

    with replaced(f"{LOCAL}:LocalExchange.exchange", wrong):
        yield


@mutant(
    "rows-by-rank",
    "comm",
    "collective",
    "what arrived from several ranks is not sorted by expert again",
    source="grouped products over rows in the order of arrival",
)
def rows_by_rank() -> Iterator[None]:
    def wrong(spread):
        import torch

        def as_it_came(x, order, places):
            if places.shape[1] == 1:
                order = torch.arange(len(order))
                places = order[:, None]
            return spread(x, order, places)

        return as_it_came

    with replaced(f"{ROUTES}:spread", wrong):
        yield


@mutant(
    "counts-are-transposed",
    "comm",
    "collective",
    "what the ranks tell of their experts is read with ranks and experts interchanged",
    source="all-to-all of counts, reshaped",
)
def counts_are_transposed() -> Iterator[None]:
    def wrong(arrive):
        def transposed(self, sending):
            told = sending.counts
            return arrive(self, sending._replace(counts=told.mT.reshape(told.shape)))

        return transposed

    with replaced(f"{ROUTES}:PerExpert.arrive", wrong):
        yield


@mutant(
    "weights-are-narrowed",
    "comm",
    "local",
    "rows of bfloat16 are weighed and summed in bfloat16",
    source="pitfalls 2.4: sums in bf16",
)
def weights_are_narrowed() -> Iterator[None]:
    def wrong(gather):
        from composeformer_comm.sorting import summed

        return lambda rows, places, weights: summed(rows, places, weights.to(rows.dtype))

    with replaced(f"{SORTING}:_gather", wrong):
        yield


@mutant(
    "sums-as-they-arrive",
    "comm",
    "local",
    "a token's rows are summed in the order in which they arrive",
    source="atomic additions in combine kernels",
)
def sums_as_they_arrive() -> Iterator[None]:
    def wrong(gather):
        import torch

        def shuffled(rows, places, weights):
            order = torch.randperm(places.shape[1])
            return gather(rows, places[:, order], weights[:, order])

        return shuffled

    with replaced(f"{SORTING}:_gather", wrong):
        yield


@mutant(
    "experts-gradients-by-ranks",
    "comm",
    "collective",
    "gradients of experts are multiplied by the number of ranks that share them",
    source="pitfalls 2.15: MLM PR5956",
)
def experts_gradients_by_ranks() -> Iterator[None]:
    def wrong(combine):
        def scaled(self, rows, sent):
            ranks = self.carrier.transport.size
            if rows.requires_grad:
                rows.register_hook(lambda gradient: gradient * ranks)
            return combine(self, rows, sent)

        return scaled

    with replaced(f"{ROUTES}:PerExpert.combine", wrong):
        yield


@mutant(
    "nobody-is-counted",
    "comm",
    "local",
    "rows of no expert are counted as the last one's",
    source="pitfalls 2.10: padding skews counts",
)
def nobody_is_counted() -> Iterator[None]:
    def wrong(by_expert):
        return lambda expert, experts: by_expert(expert.clamp(max=experts - 1), experts)

    with replaced(f"{LOCAL}:by_expert", wrong):
        yield


@mutant(
    "several-processes-are-taken",
    "comm",
    "local",
    "a backend of one process is made for several, each of which computes its own experts alone",
    source="fallbacks that nobody is told of",
)
def several_processes_are_taken() -> Iterator[None]:
    def wrong(init):
        return lambda self, config, groups, group=None: init(self, config, groups)

    with replaced(f"{LOCAL}:LocalExchange.__init__", wrong):
        yield


@mutant(
    "expected-counts-copies-twice",
    "comm",
    "collective",
    "a token's experts on one rank are expected to be as many rows, and are one",
    source="all-to-all formulas of tokens times top_k",
)
def expected_counts_copies_twice() -> Iterator[None]:
    def wrong(links):
        import attrs

        def each(config, hop, sizes, k, nodes):
            return links(attrs.evolve(config, copies="expert"), hop, sizes, k, nodes)

        return each

    with replaced("composeformer_comm.means:_links", wrong):
        yield


@mutant(
    "sent-is-kept-on-the-backend",
    "comm",
    "local",
    "how rows were sorted is kept on the backend, where the next dispatch overwrites it",
    source="dispatchers with state: buffers and handles on `self`",
)
def sent_is_kept_on_the_backend() -> Iterator[None]:
    def dispatches(dispatch):
        def kept(self, x, routing):
            *found, self.kept = dispatch(self, x, routing)
            return *found, self.kept

        return kept

    def combines(combine):
        return lambda self, rows, sent: combine(self, rows, self.kept)

    place = f"{LOCAL}:LocalExchange"
    with replaced(f"{place}.dispatch", dispatches), replaced(f"{place}.combine", combines):
        yield


@mutant(
    "weights-travel-in-bfloat16",
    "comm",
    "hierarchical",
    "routing weights are rounded to the dtype of rows where they travel with them",
    source="parcels of one dtype",
)
def weights_travel_in_bfloat16() -> Iterator[None]:
    def wrong(start):
        return lambda self, x, indices, weights: start(self, x, indices, weights.bfloat16().to(weights.dtype))

    with replaced(f"{ROUTES}:PerRank.start", wrong):
        yield
