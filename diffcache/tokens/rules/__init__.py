"""Rules for token caches, one file each. The name of a file is the name that users type.

A file holds ``SOURCE`` and ``fresh(view, *, option=…) -> Fresh``. It needs numpy only, and is a pure function of the
view. Step 0 of a canvas computes every position and does not ask the rule.
"""
