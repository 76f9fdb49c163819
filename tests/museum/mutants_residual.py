"""Bugs of residuals: what is normalised, what is added, what is called."""

from collections.abc import Iterator

from museum_kit import mutant, replaced

from composeformer.tensors import Output, merge

PRE_NORM = "composeformer_dense.residual:PreNorm.forward"


@mutant(
    "residual-adds-the-normalised",
    "residual",
    "pre-norm",
    "a sublayer is added to what was normalised, not to the stream",
    source="post-norm and pre-norm mixed up: `x = norm(x)` overwrites the stream",
)
def residual_adds_the_normalised() -> Iterator[None]:
    def wrong(self, stream, batch, sublayers):
        aux = []
        for name, sublayer in sublayers.items():
            stream = getattr(self, f"{name}_norm")(stream)
            output = sublayer(stream)
            stream = stream + output.hidden.to(stream.dtype)
            aux.append(output.aux)
        return Output(stream, merge(aux))

    with replaced(PRE_NORM, lambda _: wrong):
        yield


@mutant(
    "residual-in-parallel",
    "residual",
    "pre-norm",
    "the ffn reads the stream that the mixer read",
    source="parallel residuals (GPT-J, Falcon) in place of sequential ones on conversion",
)
def residual_in_parallel() -> Iterator[None]:
    def wrong(self, stream, batch, sublayers):
        outputs = [sublayer(getattr(self, f"{name}_norm")(stream)) for name, sublayer in sublayers.items()]
        for output in outputs:
            stream = stream + output.hidden.to(stream.dtype)
        return Output(stream, merge([output.aux for output in outputs]))

    with replaced(PRE_NORM, lambda _: wrong):
        yield


@mutant(
    "residual-swaps-its-norms",
    "residual",
    "pre-norm",
    "the mixer reads through the ffn's norm, and the ffn through the mixer's",
    source="input_layernorm and post_attention_layernorm mixed up on conversion",
)
def residual_swaps_its_norms() -> Iterator[None]:
    def wrong(forward):
        def swapped(self, stream, batch, sublayers):
            if len(sublayers) < 2:
                return forward(self, stream, batch, sublayers)
            self.mixer_norm, self.ffn_norm = self.ffn_norm, self.mixer_norm
            try:
                return forward(self, stream, batch, sublayers)
            finally:
                self.mixer_norm, self.ffn_norm = self.ffn_norm, self.mixer_norm

        return swapped

    with replaced(PRE_NORM, wrong):
        yield


@mutant(
    "residual-forgets-a-sublayer",
    "residual",
    "pre-norm",
    "the first sublayer's output is overwritten by the second's",
    source="`x = residual + ...` with the residual of the layer's start",
)
def residual_forgets_a_sublayer() -> Iterator[None]:
    def wrong(self, stream, batch, sublayers):
        start, aux = stream, []
        for name, sublayer in sublayers.items():
            output = sublayer(getattr(self, f"{name}_norm")(start))
            stream = start + output.hidden.to(start.dtype)
            aux.append(output.aux)
        return Output(stream, merge(aux))

    with replaced(PRE_NORM, lambda _: wrong):
        yield


@mutant(
    "residual-adds-one-twice",
    "residual",
    "pre-norm",
    "a sublayer that adds the stream itself is added to it once more",
    source="residual added in the block and in the layer around it",
)
def residual_adds_one_twice() -> Iterator[None]:
    def wrong(self, stream, batch, sublayers):
        aux = []
        for name, sublayer in sublayers.items():
            output = sublayer(getattr(self, f"{name}_norm")(stream))
            stream = stream + (1 + (name == "ffn")) * output.hidden.to(stream.dtype)
            aux.append(output.aux)
        return Output(stream, merge(aux))

    with replaced(PRE_NORM, lambda _: wrong):
        yield


@mutant(
    "residual-runs-a-sublayer-again",
    "residual",
    "pre-norm",
    "a sublayer is called once more for its side results: its caches and counts see every token twice",
    source="pitfalls 2.8: load counted twice",
)
def residual_runs_a_sublayer_again() -> Iterator[None]:
    def wrong(self, stream, batch, sublayers):
        aux = []
        for name, sublayer in sublayers.items():
            normed = getattr(self, f"{name}_norm")(stream)
            aux.append(sublayer(normed).aux)
            stream = stream + sublayer(normed).hidden.to(stream.dtype)
        return Output(stream, merge(aux))

    with replaced(PRE_NORM, lambda _: wrong):
        yield


@mutant(
    "residual-weighs-by-the-rest",
    "residual",
    "pre-norm",
    "outputs are scaled to the stream by the norms of the whole batch",
    source="a reduction without its dimension",
)
def residual_weighs_by_the_rest() -> Iterator[None]:
    def wrong(self, stream, batch, sublayers):
        aux = []
        for name, sublayer in sublayers.items():
            output = sublayer(getattr(self, f"{name}_norm")(stream))
            stream = stream + (output.hidden / (1 + output.hidden.abs().max())).to(stream.dtype)
            aux.append(output.aux)
        return Output(stream, merge(aux))

    with replaced(PRE_NORM, lambda _: wrong):
        yield


@mutant(
    "residual-widens-the-stream",
    "residual",
    "pre-norm",
    "a sublayer in float32 makes the stream float32 from there on",
    source="mixed precision: promotion where outputs are added",
)
def residual_widens_the_stream() -> Iterator[None]:
    def wrong(self, stream, batch, sublayers):
        aux = []
        for name, sublayer in sublayers.items():
            output = sublayer(getattr(self, f"{name}_norm")(stream))
            stream = stream + output.hidden
            aux.append(output.aux)
        return Output(stream, merge(aux))

    with replaced(PRE_NORM, lambda _: wrong):
        yield


@mutant(
    "residual-keeps-the-last-side-results",
    "residual",
    "pre-norm",
    "of the sublayers' losses and counts only the last one's come out",
    source="pitfalls 2.9: layers that are never balanced",
)
def residual_keeps_the_last_side_results() -> Iterator[None]:
    def wrong(self, stream, batch, sublayers):
        for name, sublayer in sublayers.items():
            output = sublayer(getattr(self, f"{name}_norm")(stream))
            stream = stream + output.hidden.to(stream.dtype)
        return Output(stream, output.aux)

    with replaced(PRE_NORM, lambda _: wrong):
        yield


@mutant(
    "residual-cuts-the-gradient",
    "residual",
    "pre-norm",
    "the stream is detached where a sublayer is added",
    source="in-place additions into a detached buffer of the stream",
)
def residual_cuts_the_gradient() -> Iterator[None]:
    def wrong(self, stream, batch, sublayers):
        aux = []
        for name, sublayer in sublayers.items():
            output = sublayer(getattr(self, f"{name}_norm")(stream))
            stream = stream.detach() + output.hidden.to(stream.dtype)
            aux.append(output.aux)
        return Output(stream, merge(aux))

    with replaced(PRE_NORM, lambda _: wrong):
        yield


@mutant(
    "residual-forgets-the-last-norm",
    "residual",
    "pre-norm",
    "the head reads the stream as it is",
    source="final norms dropped on conversion",
)
def residual_forgets_the_last_norm() -> Iterator[None]:
    with replaced("composeformer_dense.residual:PreNorm.close", lambda _: lambda self, stream: stream):
        yield
