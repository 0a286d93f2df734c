"""Matrix products that mean the same on a GPU and in Triton's interpreter."""

import triton
import triton.language as tl

# The interpreter multiplies the bits of bf16 numbers as integers; their products are exact in f32.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(left, right):
    """f32 `left @ right`, without TF32."""
    if INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")
