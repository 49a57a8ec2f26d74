"""Every kernel, in the forms and dtypes that launchers choose, compiled for four GPUs."""

import os
from collections import Counter, defaultdict

import pytest

pytest.importorskip("triton", reason="Triton is for Linux")
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("the interpreter does not compile", allow_module_level=True)

import triton.language as tl
from compilation import SHARED_LIMIT, TARGETS, compile_kernel
from fastpref_kernels import rescue_kernels
from fastpref_kernels import sequence_log_ratios_kernels as sequence_kernels
from fastpref_kernels import token_logps_gradient_kernels as gradient_kernels
from fastpref_kernels import token_logps_kernels as kernels
from fastpref_kernels import token_logps_kl_gradient_kernels as joint_gradient_kernels
from fastpref_kernels import token_logps_kl_kernels as joint_kernels
from fastpref_kernels.gemm_tiles import FUSED_TILES, JOINT_ROW_TILE, JOINT_TILES, ROW_TILE
from triton.runtime.autotuner import Autotuner

VECTORS = {
    "anchor_ptr": "*fp32",
    "max_ptr": "*fp32",
    "sum_ptr": "*fp32",
    "stored_sum_ptr": "*fp32",
    "lse_ptr": "*fp64",
    "grad_ptr": "*fp32",
    "target_grad_ptr": "*fp32",
    "row_max_ptr": "*fp32",
    "row_sum_ptr": "*fp32",
    "extra_ptr": "*fp32",
    "row_extra_ptr": "*fp32",
    "reference_anchor_ptr": "*fp32",
    "reference_max_ptr": "*fp32",
    "reference_sum_ptr": "*fp32",
    "gap_ptr": "*fp32",
    "reference_lse_ptr": "*fp64",
    "grad_logps_ptr": "*fp32",
    "grad_kl_ptr": "*fp32",
    "kl_ptr": "*fp32",
    "log_scale_ptr": "*fp32",
    "reference_log_scale_ptr": "*fp32",
    "others_lse_ptr": "*fp32",
    "reference_others_lse_ptr": "*fp32",
    "target_ptr": "*i64",
    "rescued_ptr": "*i1",
    "scale": "fp32",
    "softcap": "fp32",
}
VECTORS |= dict.fromkeys(["N", "R", "C", "V", "first_n", "start_v", "stop_v"], "i32")
VECTORS |= dict.fromkeys(["stride_n", "stride_v", "stride_logits", "stride_stored"], "i32")
VECTORS |= dict.fromkeys(["stride_dlogits", "stride_reference_n", "stride_reference_v"], "i32")
PLAIN = {"bias_ptr": None, "HAS_BIAS": False, "HAS_SOFTCAP": False}
FULL = {"bias_ptr": "*bf16", "HAS_BIAS": True, "HAS_SOFTCAP": True}
BIAS = {"bias_ptr": "*bf16", "HAS_BIAS": True, "HAS_SOFTCAP": False}
TRANSFORMS = {"plain": PLAIN, "bias, softcap": FULL}
KEPT_POINTERS = {
    None: (None, None),
    tl.bfloat16: ("*bf16", "*fp16"),
    tl.float32: ("*fp32", "*fp32"),
}
JOINT_TRANSFORMS = {
    "plain": PLAIN | {"reference_bias_ptr": None, "HAS_REFERENCE_BIAS": False},
    "bias, softcap": FULL | {"reference_bias_ptr": "*bf16", "HAS_REFERENCE_BIAS": True},
}
EXPONENTIALS = {"sums": None, "sums, bf16 exp": tl.bfloat16}
DTYPES = {"bf16": tl.bfloat16, "fp16": tl.float16}


def blocks_of(tile):
    return {
        "BLOCK_N": tile.block_n,
        "BLOCK_V": tile.block_v,
        "BLOCK_D": tile.block_d,
        "GROUP_N": tile.group_n,
        "PROMOTE_D": tile.promote_d,
    }


MULTIPROCESSORS = 132
"""Of an H100 and an H200."""


def fused_cases(target):
    tile = FUSED_TILES[target]
    # a program a tile, and where that was measured a program a multiprocessor
    programs = tile.programs * MULTIPROCESSORS
    for name, kernel, types, launch in one_model_cases(tile):
        looping = f"{name}{' looping' * bool(programs)}"
        yield looping, kernel, types | {"PROGRAMS": programs}, launch


def one_model_cases(tile):
    blocks = blocks_of(tile)
    launch = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    for transform, options in TRANSFORMS.items():
        for dtype, out in DTYPES.items():
            # a GEMM of one block is in another place of the loop, whatever its dtype
            for D in (64, 4096) if (transform, dtype) == ("plain", "bf16") else (4096,):
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
                        types = gemm | {"EXP": exp, "GAP": False, "PARTS": 2, "stored_desc": kept}
                        yield (
                            f"sweep {name} {dtype} D {D} {transform}",
                            kernels._sweep_kernel,
                            types,
                            launch,
                        )
                types = gemm | {"OUT": out, "dlogits_desc": result}
                yield (
                    f"dlogits {dtype} D {D} {transform}",
                    gradient_kernels._dlogits_kernel,
                    types,
                    launch,
                )


def fused_gap_cases(target):
    """TDPO1's sweep over the reference, which knows no softcap."""
    tile = FUSED_TILES[target]
    programs = tile.programs * MULTIPROCESSORS
    looping = " looping" * bool(programs)
    types = blocks_of(tile) | {
        "PROGRAMS": programs,
        "PARTS": 4,
        "EXP": tl.bfloat16,
        "GAP": True,
        "input_desc": f"tensordesc<bf16[{tile.block_n}, {tile.block_d}]>",
        "weight_desc": f"tensordesc<bf16[{tile.block_v}, {tile.block_d}]>",
        "stored_desc": f"tensordesc<bf16[{tile.block_n}, {tile.block_v // 4}]>",
    }
    launch = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    for transform, options in {"plain": PLAIN, "bias": BIAS}.items():
        for D in (64, 4096):
            name = f"sweep sums, bf16 exp, gap D {D} {transform}{looping}"
            yield name, kernels._sweep_kernel, types | options | {"D": D}, launch
    # of a model in float16, or beside one in another dtype: the most shared memory of all
    types |= PLAIN | {
        "EXP": tl.float32,
        "input_desc": types["input_desc"].replace("bf16", "fp16"),
        "weight_desc": types["weight_desc"].replace("bf16", "fp16"),
        "stored_desc": types["stored_desc"].replace("bf16", "fp32"),
    }
    name = f"sweep sums, fp32 exp, gap D 4096{looping}"
    yield name, kernels._sweep_kernel, types | {"D": 4096}, launch


def row_cases():
    blocks = {"BLOCK_N": ROW_TILE.block_n, "BLOCK_V": ROW_TILE.block_v, "logits_ptr": "*fp32"}
    launch = {"num_warps": ROW_TILE.num_warps}
    for transform, options in TRANSFORMS.items():
        for exp, stored in [(None, None), (tl.bfloat16, "*bf16"), (tl.float32, "*fp32")]:
            for gap in {False, bool(exp) and not options["HAS_SOFTCAP"]}:
                types = blocks | options | {"EXP": exp, "GAP": gap, "stored_ptr": stored}
                yield (
                    f"sweep of products {stored}{' gap' * gap} {transform}",
                    kernels._sweep_tile_kernel,
                    types,
                    launch,
                )
        for dtype in ("bf16", "fp16", "fp32"):
            types = blocks | options | {"dlogits_ptr": f"*{dtype}"}
            yield (
                f"dlogits of products {dtype} {transform}",
                gradient_kernels._dlogits_tile_kernel,
                types,
                launch,
            )
            operands = options | {"input_ptr": f"*{dtype}", "weight_ptr": f"*{dtype}"}
            types = operands | {"D": 2304, "BLOCK_D": 1024, "logits_ptr": "*fp32"}
            yield f"target logits {dtype} {transform}", kernels._target_logits_kernel, types, {}
            for store in (True, False) if dtype != "fp16" else (False,):
                types = operands | {
                    "D": 2304, "BLOCK_D": 4096, "V": 128256, "BLOCK_V": 2, "STORE": store,
                    "ROWS": rescue_kernels.RESCUE_ROWS,
                    "GAP": store and not options["HAS_SOFTCAP"],
                    "stored_ptr": "*bf16" if store else None,
                    "total_ptr": None if store else "*fp32",
                }  # fmt: skip
                yield (
                    f"rescue {dtype} {transform}",
                    rescue_kernels._rescue_kernel,
                    types,
                    {"num_warps": 8},
                )
    for extra, over_max in [(False, False), (True, False), (True, True)]:
        types = {
            "NUM_BLOCKS": 1002,
            "BLOCK_N": 32,
            "BLOCK_B": 64,
            "EXTRA": extra,
            "OVER_MAX": over_max,
        }
        yield "combine", kernels._combine_kernel, types, {}


def fused_joint_cases(target):
    tile = JOINT_TILES[target]
    blocks = blocks_of(tile)
    launch = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    for transform, options in JOINT_TRANSFORMS.items():
        for dtype, out in DTYPES.items() if transform == "plain" else [("bf16", tl.bfloat16)]:
            operand = f"tensordesc<{dtype}[{tile.block_n}, {tile.block_d}]>"
            weight = f"tensordesc<{dtype}[{tile.block_v}, {tile.block_d}]>"
            gemm = blocks | options | {"D": 4096, "D_REFERENCE": 2304}
            gemm |= {"input_desc": operand, "reference_input_desc": operand}
            gemm |= {"weight_desc": weight, "reference_weight_desc": weight}
            result = f"tensordesc<{dtype}[{tile.block_n}, {tile.block_v // 8}]>"
            # what is summed under either does not depend on the operands' dtype
            for direction in (True, False) if (transform, dtype) == ("plain", "bf16") else (True,):
                gemm |= {"UNDER_REFERENCE": direction}
                name = f"{dtype} {'reference' if direction else 'policy'} {transform}"
                types = gemm | {"OUT": out, "dlogits_desc": result}
                yield (
                    f"joint dlogits {name}",
                    joint_gradient_kernels._joint_dlogits_kernel,
                    types,
                    launch,
                )
                for exp in (None, tl.bfloat16):
                    if exp is None or dtype == "bf16":
                        kept = None if exp is None else result
                        ratio = None if exp is None else tl.float16
                        ratios = None if exp is None else kept.replace("bf16", "fp16")
                        types = gemm | {"EXP": exp, "larger_desc": kept}
                        types |= {"RATIO": ratio, "log_ratio_desc": ratios}
                        kernel = joint_kernels._joint_sweep_kernel
                        yield f"joint sweep{', kept' if exp else ''} {name}", kernel, types, launch


def joint_row_cases():
    blocks = {"BLOCK_N": JOINT_ROW_TILE.block_n, "BLOCK_V": JOINT_ROW_TILE.block_v}
    blocks |= {"logits_ptr": "*fp32", "reference_logits_ptr": "*fp32"}
    launch = {"num_warps": JOINT_ROW_TILE.num_warps}
    for transform, options in JOINT_TRANSFORMS.items():
        for direction in (True, False):
            rows = blocks | options | {"UNDER_REFERENCE": direction}
            name = f"{'reference' if direction else 'policy'} {transform}"
            for exp, ratio in [(None, None), (tl.bfloat16, tl.float16), (tl.float32, tl.float32)]:
                kept, ratios = KEPT_POINTERS[exp]
                types = rows | {"EXP": exp, "larger_ptr": kept}
                types |= {"RATIO": ratio, "log_ratio_ptr": ratios}
                kernel = joint_kernels._joint_sweep_tile_kernel
                yield f"joint sweep of products {kept} {name}", kernel, types, launch
            for dtype in ("bf16", "fp16", "fp32"):
                types = rows | {"dlogits_ptr": f"*{dtype}"}
                kernel = joint_gradient_kernels._joint_dlogits_tile_kernel
                yield f"joint dlogits of products {dtype} {name}", kernel, types, launch
            for kept, ratios in list(KEPT_POINTERS.values())[1:]:
                types = rows | {"larger_ptr": kept, "log_ratio_ptr": ratios, "dlogits_ptr": kept}
                kernel = joint_gradient_kernels._stored_gradient_kernel
                yield f"joint dlogits of kept {kept} {name}", kernel, types, launch
        for dtype in ("bf16", "fp32"):
            pointers = ("input_ptr", "weight_ptr", "larger_ptr", "log_ratio_ptr")
            pointers += ("reference_input_ptr", "reference_weight_ptr")
            types = options | dict.fromkeys(pointers, f"*{dtype}")
            types |= {"V": 128256, "D": 4096, "D_REFERENCE": 2304, "BLOCK_V": 1, "BLOCK_D": 4096}
            types |= {"ROWS": rescue_kernels.RESCUE_ROWS}
            kernel = rescue_kernels._joint_rescue_kernel
            yield f"joint rescue {dtype} {transform}", kernel, types, {"num_warps": 8}


def sequence_cases():
    strides = ("stride_logps", "stride_reference", "stride_weights", "stride_ids", "stride_grad")
    common = dict.fromkeys((*strides, "S"), "i32") | {"BLOCK_N": 1024, "ids_ptr": "*i64"}
    for dtype in ("fp32", "bf16"):
        for weights in (None, "*fp32"):
            types = common | {"weights_ptr": weights, "HAS_WEIGHTS": weights is not None}
            types |= {"logps_ptr": f"*{dtype}", "reference_logps_ptr": f"*{dtype}"}
            types |= {"sums_ptr": "*fp32", "NUM_BLOCKS": 16}
            types |= {"grad_ptr": "*fp32", "grad_logps_ptr": f"*{dtype}"}
            name = f"{dtype}{' weighted' if weights else ''}"
            yield f"sequence sums {name}", sequence_kernels._sum_kernel, types, {}
            yield f"sequence gradients {name}", sequence_kernels._spread_kernel, types, {}


SPILL_LIMIT = {"sm_90": 16, "sm_100": 320}
"""Bytes a thread: on the GPU that the fused kernels were shaped for four numbers at most, written
and read once behind the GEMM. On Blackwell the joint sweep that keeps its exponentials spills more,
which a tile of its own would end."""
LOOPING_SPILL_LIMIT = 56
"""The same where one loop goes over tiles and their GEMMs: TDPO1's sweep, and with Triton 3.6 that
under a softcap, both at a D of one block."""
RESCUE_SPILL_LIMIT = 8
"""Bytes a thread of a kernel that hardly ever has anything to do: Triton 3.6 spills two numbers on
sm_90."""
SWEEPS = (
    kernels._sweep_kernel,
    kernels._sweep_tile_kernel,
    kernels._combine_kernel,
    joint_kernels._joint_sweep_kernel,
    joint_kernels._joint_sweep_tile_kernel,
)


ROW_CASES = [row_cases, joint_row_cases, sequence_cases]
FUSED_CASES = [fused_cases, fused_gap_cases, fused_joint_cases]
ALL = [(target, cases) for cases in ROW_CASES for target in TARGETS]
ALL += [(target, cases) for cases in FUSED_CASES for target in FUSED_TILES]


def cases_for(target, cases):
    """All for the GPU that tiles are shaped for; for others every third one of a kernel's, whose
    forms differ in what is loaded and not in what a GPU can do."""
    num_seen = Counter()
    for case in cases(target) if cases in FUSED_CASES else cases():
        _, kernel, *_ = case
        if target == "sm_90" or num_seen[kernel] % 3 == 0:
            yield case
        num_seen[kernel] += 1


def compiled_cases(target, cases):
    """Name, kernel and what became of it, of every case."""
    found = []
    for name, kernel, types, launch in cases_for(target, cases):
        compiled = compile_kernel(kernel, VECTORS | types, target, **launch)
        print(
            f"{target:<8}{name:<48}{compiled.shared_bytes:>8} B{compiled.registers:>5} regs"
            f"{compiled.spilled_bytes:>5} B spilled{compiled.matrix_instructions:>4} mma"
        )
        found.append((name, kernel, compiled))
    return found


# one test of all that is asked, because compiling takes minutes
@pytest.mark.parametrize(("target", "cases"), ALL)
def test_kernels_compile_without_spills_or_fused_sums(target, cases):
    found = compiled_cases(target, cases)
    for name, kernel, compiled in found:
        assert compiled.shared_bytes <= SHARED_LIMIT[target], name
        assert compiled.spilled_bytes <= spill_limit(target, cases, name, kernel), name
        assert compiled.matrix_instructions or cases in ROW_CASES, name
        # a·s - b·s is 0 where a is b only if both products are rounded: no KL between equal models
        assert not compiled.fusible, name
    # the bits of a row's sums do not tell what was stored beside them
    reduced = defaultdict(set)
    for _, kernel, compiled in found:
        if kernel in SWEEPS:
            reduced[kernel].add(compiled.reduced)
    for layouts in reduced.values():
        (layout,) = layouts
        assert layout


def spill_limit(target, cases, name, kernel):
    """Bytes that a case may spill."""
    if cases in ROW_CASES:
        return RESCUE_SPILL_LIMIT if kernel is rescue_kernels._rescue_kernel else 0
    return LOOPING_SPILL_LIMIT if "looping" in name else SPILL_LIMIT[target]


def test_no_kernel_is_tuned_while_it_runs():
    # an autotuner runs a kernel several times: what it writes in place would be wrong
    for module in (
        kernels,
        gradient_kernels,
        joint_kernels,
        joint_gradient_kernels,
        sequence_kernels,
    ):
        tuned = [name for name, value in vars(module).items() if isinstance(value, Autotuner)]
        assert not tuned
