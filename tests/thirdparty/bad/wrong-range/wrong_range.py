"""Must not be imported: it was written for another version."""

raise RuntimeError("imported in spite of its range")
