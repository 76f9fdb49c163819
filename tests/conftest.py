"""Settings of the whole suite: hypothesis profiles.

`--hypothesis-profile=deep` looks longer. Timing never fails an example: machines are shared.
"""

from hypothesis import HealthCheck, settings

settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("deep", settings.get_profile("default"), max_examples=2000)
settings.load_profile("default")
