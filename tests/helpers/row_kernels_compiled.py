"""Compile every kernel of ``moe.triton_kernels`` for a GPU that need not be there: ``python -m tests.helpers.row_kernels_compiled``.

Prints one JSON line per kernel, width and dtype: how its widest access to global memory is vectorized and whether it uses atomics.
"""

import inspect
import json
import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from symbiotic_titan.moe import triton_kernels

HOPPER = GPUTarget("cuda", 90, 32)
KERNELS = [k for name, k in vars(triton_kernels).items() if name.endswith("_kernel")]
INDICES = ("token_t", "row_tK", "zero_z")
PER_TOKEN = ("weights", "grad_weights")


def compiled(kernel, dim: int, copies: int, dtype: str) -> dict:
    block = triton_kernels.ELEMENTS if "DIM" not in kernel.arg_names else 0
    constants = {"DIM": dim, "COPIES": copies, "PLACES": copies}
    constants["BLOCK"] = block or triton.next_power_of_2(dim)
    signature, attributes = {}, {}
    for i, name in enumerate(inspect.signature(kernel.fn).parameters):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("num_tokens", "size"):
            signature[name] = "i32"
            if name == "size":  # F is a multiple of 16
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            kind = "i64" if name in INDICES else "fp32" if name in PER_TOKEN else dtype
            signature[name] = f"*{kind}"
            # As the launcher finds them: torch's allocations are aligned; slices of index tensors are not.
            if name not in INDICES:
                attributes[(i,)] = [["tt.divisibility", 16]]
    used = {k: v for k, v in constants.items() if k in signature}
    source = ASTSource(kernel, signature, constexprs=used, attrs=attributes)
    asm = triton.compile(source, target=HOPPER, options={"num_warps": 4}).asm
    widths = [
        int(v or 1) * int(b) for v, b in re.findall(r"global\.(?:v(\d)\.)?b(\d+)", asm["ptx"])
    ]
    return {
        "kernel": kernel.fn.__name__,
        "dim": dim,
        "dtype": dtype,
        "cubin_bytes": len(asm["cubin"]),
        "widest_access_bits": max(widths),
        "atomics": len(re.findall(r"\b(?:atom|red)\.global", asm["ptx"])),
    }


if __name__ == "__main__":
    for kernel in KERNELS:
        for dim, copies in ((768, 6), (2048, 8)):
            for dtype in ("bf16", "fp32"):
                print(json.dumps(compiled(kernel, dim, copies, dtype)), flush=True)
