"""Prints docs/rewrites.md: `python -m frameloom.verify > docs/rewrites.md`."""

from frameloom.engine.rewrites import REWRITES
from frameloom.ops.registry import document

print(document(REWRITES), end="")
