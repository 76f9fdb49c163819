"""How tokens reach their experts: within one process, and later across many."""
