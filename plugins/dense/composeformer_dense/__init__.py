"""The plain decoder-only transformer: grouped-query attention, gated feed-forward, norms, positions."""
