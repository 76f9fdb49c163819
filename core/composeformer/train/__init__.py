"""Training: one optimizer step, and what it asks of objectives and optimizers."""

from composeformer.train.after import Run
from composeformer.train.batch import TokenBatch
from composeformer.train.ledger import StepResult
from composeformer.train.roles import MakeOptimizer, Objective, Trained
from composeformer.train.step import train_step
from composeformer.train.trainer import trained, trainer
from composeformer.train.workers import WorkerDiffers, worker_init

__all__ = [
    "MakeOptimizer",
    "Objective",
    "Run",
    "StepResult",
    "TokenBatch",
    "Trained",
    "WorkerDiffers",
    "train_step",
    "trained",
    "trainer",
    "worker_init",
]
