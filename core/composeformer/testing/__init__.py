"""Laws that parts of a slot must satisfy, and what tests of plugins need. Needs hypothesis: extra `laws`.

```python
from composeformer.testing import laws_of

test_laws = laws_of("my-plugin")
```

runs every law on every component of a plugin, in all its implementations; `compose plugins check` does the same.
"""

from composeformer.testing.certificate import Certificate, Finding, certify, examine, replay
from composeformer.testing.law import Law, LawBroken, all_laws, find_law, law, laws_for
from composeformer.testing.subject import Subject, subject, subjects
from composeformer.testing.suite import laws_of

__all__ = [
    "Certificate",
    "Finding",
    "Law",
    "LawBroken",
    "Subject",
    "all_laws",
    "certify",
    "examine",
    "find_law",
    "law",
    "laws_for",
    "laws_of",
    "replay",
    "subject",
    "subjects",
]
