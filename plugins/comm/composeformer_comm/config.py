"""The communication parts on paper."""

from composeformer.config import Config, config


@config
class Local(Config):
    """All experts are in this process: tokens are sorted, not sent."""
