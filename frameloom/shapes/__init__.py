"""The small model that ships with Frameloom: a real Wan 2.1 checkpoint that knows a world of moving shapes.

`PATH` is its folder, in Diffusers layout. The card beside the weights says what it knows and how well.
"""

from pathlib import Path

PATH: Path = Path(__file__).parent / "checkpoint"
