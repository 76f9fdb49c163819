"""The tables that the core itself owns: `[model]`, `[train]` and `[parallel]`."""

from composeformer.config import Config, config, field

# Orders of a pipeline's micro-batches.
SCHEDULES = ("1f1b", "zero-bubble", "dualpipe")


@config
class ModelConfig(Config):
    """`[model]`: what every part of a model shares."""

    vocab_size: int = field(minimum=1, unit="tokens", help="Rows of the embedding.")
    hidden_size: int = field(minimum=1, unit="features", help="Width of the residual stream.")
    max_position_embeddings: int = field(minimum=1, unit="tokens", help="Longest sequence the model serves.")
    tie_embeddings: bool = field(default=False, help="The head's matrix is the embedding's.")
    init_std: float = field(
        default=0.02,
        above=0.0,
        affects="training",
        help="Standard deviation of initial weights where a part states none.",
    )


@config
class TrainConfig(Config):
    """`[train]`: one run's sizes. It never changes a model's fingerprint."""

    steps: int = field(
        default=100, minimum=1, unit="optimizer steps", affects="training", help="Length of the run."
    )
    batch_size: int = field(
        default=8, minimum=1, unit="sequences", affects="training", help="Sequences in one optimizer step."
    )
    sequence_length: int = field(
        default=256, minimum=1, unit="tokens", affects="training", help="Tokens in one sequence."
    )
    micro_batches: int = field(
        default=1,
        minimum=1,
        affects="execution",
        help="Pieces that a step's batch is computed in; gradients add up.",
    )
    learning_rate: float = field(default=3e-4, minimum=0.0, affects="training", help="Peak learning rate.")
    clip_norm: float | None = field(
        default=1.0, above=0.0, affects="training", help="Largest norm of all gradients together."
    )


@config
class ParallelConfig(Config):
    """`[parallel]`: how a run is spread over processes. It never changes a model's fingerprint.

    All processes have tokens of their own: those that share the experts are processes of the data too.
    """

    expert: int = field(
        default=1,
        minimum=1,
        unit="processes",
        affects="execution",
        help="Processes that share the experts, each with its own; must divide their number and the processes'.",
    )
    shard: bool = field(
        default=True,
        affects="execution",
        help="Shard what is no expert over all processes (FSDP2); false: each process holds all of it.",
    )
    pipeline: int = field(
        default=1,
        minimum=1,
        unit="stages",
        affects="execution",
        help="Stages of consecutive layers; priced, not run by this version.",
    )
    tensor: int = field(
        default=1,
        minimum=1,
        unit="processes",
        affects="execution",
        help="Processes that share each linear map; priced, not run by this version.",
    )
    zero: int | None = field(
        default=None,
        minimum=0,
        maximum=3,
        affects="execution",
        help="What replicas share, for the price: 1 the optimizer, 2 gradients too, 3 weights too; by `shard` 3 or 0.",
    )
    schedule: str = field(
        default="1f1b",
        choices=SCHEDULES,
        affects="execution",
        help="The order of a pipeline's micro-batches, for the price.",
    )
    recompute: str = field(
        default="none",
        choices=("none", "selective", "full"),
        affects="execution",
        help="What the backward pass makes again, for the price: nothing; what parts say is cheap; whole layers.",
    )
