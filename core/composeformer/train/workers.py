"""Data workers have the registry of the process that they serve, or the run ends.

```python
loader = DataLoader(rows, num_workers=4, worker_init_fn=worker_init())
```

A worker that was forked has it already; one that was spawned loads plugins itself, and what was configured in the
parent is not configured there. Tokens would then be made by other parts than the model is made of, in silence.
"""

from collections.abc import Callable

import attrs

from composeformer import plugins
from composeformer.errors import ComposeError, PluginError
from composeformer.manifest import differences
from composeformer.plugins import Selection


class WorkerDiffers(PluginError):
    """A data worker without the plugins of its parent: a line for each component that it lacks or has besides."""

    def __init__(self, *lines: str) -> None:
        # A DataLoader raises it again, with one text: the worker's traceback, whose end are the lines.
        _, wrapped, told = lines[0].rpartition(f"{type(self).__module__}.{type(self).__qualname__}: ")
        super().__init__(*(told.strip().splitlines() if wrapped else lines))


@attrs.frozen(kw_only=True)
class WorkerInit:
    """Called in a worker with its number: configures the plugins as its parent had them, compares, then calls `then`.

    Raises WorkerDiffers, which a DataLoader raises again in its parent.
    """

    selection: Selection
    manifest: tuple[str, ...]
    then: Callable[[int], None] | None = None

    def __call__(self, worker: int) -> None:
        who = f"data worker {worker}"
        try:
            # What a forked worker has loaded stays: parts are compared by identity.
            if plugins.selection() != self.selection:
                plugins.configure(**attrs.asdict(self.selection))
            found = plugins.current()
        except ComposeError as error:
            raise WorkerDiffers(*(f"{who}: {line}" for line in error.lines)) from error
        if lines := differences(found.manifest(), self.manifest, who):
            raise WorkerDiffers(*lines, *(f"{who}: {problem}" for problem in found.problems))
        if self.then is not None:
            self.then(worker)


def worker_init(then: Callable[[int], None] | None = None) -> WorkerInit:
    """What a DataLoader is to call in each worker, `worker_init_fn`; made in the parent, and pickled.

    `then` is called after it, with the worker's number.
    """
    return WorkerInit(selection=plugins.selection(), manifest=plugins.current().manifest(), then=then)
