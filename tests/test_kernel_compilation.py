"""Every kernel, in every configuration a launcher may choose, compiled for four GPUs."""

import os

import pytest

pytest.importorskip("triton", reason="Triton is for Linux")
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("the interpreter does not compile", allow_module_level=True)

import triton.language as tl
from compilation import SHARED_LIMIT, TARGETS, Compiled, compile_kernel
from fastpref_kernels import token_logps_kernels as kernels
from fastpref_kernels.gemm_tiles import FUSED_TILES, ROW_TILE

VECTORS = (
    {
        "target_ptr": "*i64",
        "anchor_ptr": "*fp32",
        "max_ptr": "*fp32",
        "sum_ptr": "*fp32",
        "stored_sum_ptr": "*fp32",
        "lse_ptr": "*fp32",
        "grad_ptr": "*fp32",
        "target_grad_ptr": "*fp32",
        "row_max_ptr": "*fp32",
        "row_sum_ptr": "*fp32",
        "row_stored_sum_ptr": "*fp32",
        "scale": "fp32",
        "softcap": "fp32",
    }
    | dict.fromkeys(["N", "R", "first_n", "start_v", "stop_v"], "i32")
    | dict.fromkeys(
        ["stride_n", "stride_v", "stride_logits", "stride_stored", "stride_dlogits"], "i32"
    )
)
PLAIN = {"bias_ptr": None, "HAS_BIAS": False, "HAS_SOFTCAP": False}
FULL = {"bias_ptr": "*bf16", "HAS_BIAS": True, "HAS_SOFTCAP": True}
TRANSFORMS = {"plain": PLAIN, "bias, softcap": FULL}
EXPONENTIALS = {"sums": None, "sums, bf16 exp": tl.bfloat16}
DTYPES = {"bf16": tl.bfloat16, "fp16": tl.float16}


def fused_cases(target):
    tile = FUSED_TILES[target]
    blocks = {
        "BLOCK_N": tile.block_n,
        "BLOCK_V": tile.block_v,
        "BLOCK_D": tile.block_d,
        "GROUP_N": tile.group_n,
    }
    launch = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    for transform, options in TRANSFORMS.items():
        for dtype, out in DTYPES.items():
            for D in (64, 4096):
                gemm = (
                    blocks
                    | options
                    | {
                        "D": D,
                        "input_desc": f"tensordesc<{dtype}[{tile.block_n}, {tile.block_d}]>",
                        "weight_desc": f"tensordesc<{dtype}[{tile.block_v}, {tile.block_d}]>",
                    }
                )
                result = f"tensordesc<{dtype}[{tile.block_n}, {tile.block_v // 2}]>"
                for name, exp in EXPONENTIALS.items():
                    if exp is None or dtype == "bf16":
                        kept = None if exp is None else result
                        types = gemm | {"EXP": exp, "stored_desc": kept}
                        yield (
                            f"sweep {name} {dtype} D {D} {transform}",
                            kernels._sweep_kernel,
                            types,
                            launch,
                        )
                types = gemm | {"OUT": out, "dlogits_desc": result}
                yield f"dlogits {dtype} D {D} {transform}", kernels._dlogits_kernel, types, launch


def row_cases():
    blocks = {"BLOCK_N": ROW_TILE.block_n, "BLOCK_V": ROW_TILE.block_v, "logits_ptr": "*fp32"}
    launch = {"num_warps": ROW_TILE.num_warps}
    for transform, options in TRANSFORMS.items():
        for exp, stored in [(None, None), (tl.bfloat16, "*bf16"), (tl.float32, "*fp32")]:
            types = blocks | options | {"EXP": exp, "stored_ptr": stored}
            yield (
                f"sweep of products {stored} {transform}",
                kernels._sweep_tile_kernel,
                types,
                launch,
            )
        for dtype in ("bf16", "fp16", "fp32"):
            types = blocks | options | {"dlogits_ptr": f"*{dtype}"}
            yield (
                f"dlogits of products {dtype} {transform}",
                kernels._dlogits_tile_kernel,
                types,
                launch,
            )
            operands = options | {"input_ptr": f"*{dtype}", "weight_ptr": f"*{dtype}"}
            types = operands | {"D": 2304, "BLOCK_D": 1024, "logits_ptr": "*fp32"}
            yield f"target logits {dtype} {transform}", kernels._target_logits_kernel, types, {}
            for store in (True, False):
                types = operands | {
                    "D": 2304, "BLOCK_D": 4096, "V": 128256, "BLOCK_V": 2, "STORE": store,
                    "stored_ptr": "*bf16" if store else None,
                    "total_ptr": None if store else "*fp32",
                }  # fmt: skip
                yield f"rescue {dtype} {transform}", kernels._rescue_kernel, types, {"num_warps": 8}
    for stored in (True, False):
        types = {"NUM_BLOCKS": 501, "BLOCK_N": 32, "BLOCK_B": 64, "STORED": stored}
        yield "combine", kernels._combine_kernel, types, {}


# the GPU that the fused kernels were shaped for spills nothing; a few bytes cost nothing elsewhere
SPILL_LIMIT = {"sm_90": 0, "sm_100": 64}


def show(target: str, name: str, compiled: Compiled) -> None:
    print(
        f"{target:<8}{name:<48}{compiled.shared_bytes:>8} B{compiled.registers:>5} regs"
        f"{compiled.spilled_bytes:>5} B spilled{compiled.matrix_instructions:>4} mma"
    )


@pytest.mark.parametrize("target", FUSED_TILES)
def test_fused_kernels_compile_to_matrix_instructions_and_fit(target):
    for name, kernel, types, launch in fused_cases(target):
        compiled = compile_kernel(kernel, VECTORS | types, target, **launch)
        show(target, name, compiled)
        assert compiled.shared_bytes <= SHARED_LIMIT[target], name
        assert compiled.matrix_instructions, name
        assert compiled.spilled_bytes <= SPILL_LIMIT[target], name


@pytest.mark.parametrize("target", TARGETS)
def test_row_kernels_compile_without_spills(target):
    for name, kernel, types, launch in row_cases():
        compiled = compile_kernel(kernel, VECTORS | types, target, **launch)
        show(target, name, compiled)
        assert compiled.shared_bytes <= SHARED_LIMIT[target], name
        assert not compiled.spilled_bytes, name
