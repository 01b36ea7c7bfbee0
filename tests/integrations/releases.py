"""What older releases of Diffusers cannot do where the tests run."""

import diffusers
import pytest
import torch


def skip_groups_without_an_accelerator() -> None:
    """Diffusers 0.40 looks for an accelerator whenever weights are offloaded by groups."""
    if diffusers.__version__.startswith("0.40.") and not torch.accelerator.is_available():
        pytest.skip("Diffusers 0.40 offloads by groups only where there is an accelerator")
