"""Settings of the whole suite: hypothesis profiles, and one thread for each of several processes.

`--hypothesis-profile=deep` looks longer. Timing never fails an example: machines are shared.
"""

import os

from hypothesis import HealthCheck, settings

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before PyTorch is imported: workers that each computed with a thread for every core would wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("deep", settings.get_profile("default"), max_examples=2000)
settings.load_profile("default")
