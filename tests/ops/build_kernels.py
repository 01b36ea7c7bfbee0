"""Builds the Triton kernels for an AMD GPU, whose whole tool chain is in Triton, and prints their names.

A process of its own: the tests run with Triton's interpreter, which cannot be switched off again.
"""

import sys
from collections.abc import Mapping

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from frameloom.ops import triton_modulate, triton_norm_silu, triton_rope

TARGET = GPUTarget("hip", "gfx942", 64)
POINTERS = {
    **dict.fromkeys(("x", "branch", "a", "c", "out", "summed", "weight", "gamma"), "*bf16"),
    **dict.fromkeys(("b", "gate", "scale", "shift", "bias", "cos", "sin"), "*fp32"),
    **dict.fromkeys(("k", "number", "eps", "root"), "fp32"),
}


def build(kernel: triton.JITFunction, **constants: object) -> None:
    """`constants`: compile-time arguments, with None for operands that are left out."""
    signature: Mapping[str, str] = {
        name: "constexpr" if name in constants else POINTERS.get(name, "i64" if name.endswith("batch") else "i32")
        for name in kernel.arg_names
    }
    built = triton.compile(ASTSource(kernel, signature, constants), target=TARGET)
    assert built.asm["hsaco"]
    sys.stdout.write(f"{kernel.__name__}\n")


wide = {"BLOCK_R": 1, "BLOCK_D": 8192}
narrow = {"BLOCK_R": 2, "BLOCK_D": 2048}
absent = dict.fromkeys(("branch", "gate", "weight", "bias", "summed"))
build(triton_modulate._mul_add_kernel, **wide)
build(triton_modulate._mul_add_kernel, **narrow, c=None, b_every=1)
build(triton_modulate._add_norm_kernel, **wide, RMS=False)
build(triton_modulate._add_norm_kernel, **narrow, **absent, RMS=True)
build(triton_modulate._norm_tanh_kernel, **wide, RMS=False)
build(triton_modulate._norm_tanh_kernel, **narrow, weight=None, RMS=True)
build(triton_rope._norm_rotate_kernel, **narrow, HEAD=128, HALVES=False)
build(triton_rope._norm_rotate_kernel, **wide, HEAD=128, HALVES=True, length=1)
build(triton_norm_silu._kernel, CHANNELS=96, BLOCK_P=32, BLOCK_C=128)
