"""Parts that are right and that nobody built the laws around: what a third party may bring, each as small as can be.

They are examples of what contracts allow, and the laws are held to them: a law that refuses one of these is wrong.
"""

import unusual_attention
import unusual_ends
import unusual_ffns
import unusual_routers
import unusual_states
import unusual_streams
import unusual_training

from composeformer.contracts import Component
from composeformer.plugins import current
from composeformer.registry import PluginInfo, Registry

MODULES = (
    unusual_ends,
    unusual_attention,
    unusual_states,
    unusual_ffns,
    unusual_routers,
    unusual_streams,
    unusual_training,
)
COMPONENTS: tuple[Component, ...] = tuple(each for module in MODULES for each in module.COMPONENTS)


def registry() -> Registry:
    """What is installed, and a plugin `unusual` with all of these."""
    own = PluginInfo(
        name="unusual",
        distribution="unusual",
        version="1.0",
        origin=__file__,
        status="loaded",
        components=COMPONENTS,
    )
    return Registry((*current().registry.infos, own))
