"""Compiling Triton kernels for GPUs that are not here, and reading what came of it."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from fastpref_kernels.launch import COMPILE
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
"""Bytes of shared memory a block may have (CUDA C++ programming guide, table of technical
specifications; 64 KiB of LDS a workgroup on CDNA 3)."""
FUSIBLE = {
    # PTX's products and sums whose rounding is not named, which the assembler may fuse
    "nvidia": r"\b(?:mul|add|sub)(?:\.ftz)?\.f(?:32|64)\b",
    # two fused ones in an instruction: divisions and logarithms expand to single ones
    "amd": r"\bv_pk_fma_f32\b",
}
"""What is only there where the compiler may make a product and a sum one instruction."""
MATRIX_INSTRUCTION = {
    "sm_80": "mma.sync",
    "sm_90": "wgmma.mma_async",
    "sm_100": "tcgen05.mma",
    "gfx942": "v_mfma",
}


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """Resources of a compiled kernel."""

    shared_bytes: int
    registers: int
    spilled_bytes: int
    """Local memory: spills, and arrays that found no register."""
    matrix_instructions: int
    fusible: int
    """Instructions of FUSIBLE."""
    reduced: frozenset[str]
    """Shape and layout over the threads of every tensor that is reduced, which decide the order of
    the sums."""


def compile_kernel(
    kernel: Any, types: dict[str, str], target: str, *, num_warps: int = 4, num_stages: int = 3
) -> Compiled:
    """Compile for a target of TARGETS.

    Args:
        kernel: What `triton.jit` returned.
        types: Triton type of each argument by name ("*bf16", "i32"), or the value of a constant.
        target: Name of the GPU.
        num_warps, num_stages: As in the launch.
    """
    is_type = {name: isinstance(kind, str) for name, kind in types.items()}
    signature = {name: types[name] if is_type[name] else "constexpr" for name in kernel.arg_names}
    constants = {name: types[name] for name in kernel.arg_names if not is_type[name]}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if (name.endswith("_ptr") and is_type[name]) or name.startswith("stride")
    }
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages} | COMPILE
    binary = triton.compile(source, target=TARGETS[target], options=options)
    vendor = "amd" if target.startswith("gfx") else "nvidia"
    read = _read_amd if vendor == "amd" else _read_nvidia
    registers, spilled_bytes, assembly = read(binary)
    return Compiled(
        shared_bytes=binary.metadata.shared,
        registers=registers,
        spilled_bytes=spilled_bytes,
        matrix_instructions=assembly.count(MATRIX_INSTRUCTION[target]),
        fusible=len(re.findall(FUSIBLE[vendor], assembly)),
        reduced=_read_reductions(binary.asm["ttgir"]),
    )


def _read_reductions(ir: str) -> frozenset[str]:
    """`reduced` from Triton's GPU dialect: tensor<8x1024xf32, #ttg.blocked<{…}>>."""
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", ir, re.MULTILINE))
    types = re.findall(r'"tt\.reduce"\(.*?\}\) : \((tensor<[^>]*>)\)', ir, re.DOTALL)
    return frozenset(re.sub(r"#\w+", lambda name: layouts[name[0]], kind) for kind in types)


def _read_nvidia(binary: Any) -> tuple[int, int, str]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    # another worker may read the same kernel's
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(binary.asm["cubin"])
        report = subprocess.run(
            [tool, "-res-usage", path], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", report)
    assert found is not None, report
    registers, stack, local = map(int, found.groups())
    return registers, stack + local, binary.asm["ptx"]


def _read_amd(binary: Any) -> tuple[int, int, str]:
    assembly = binary.asm["amdgcn"]

    def number(field: str) -> int:
        found = re.search(rf"\.{field}: +(\d+)", assembly)
        assert found is not None, f"no {field} in the kernel's metadata"
        return int(found[1])

    return number("vgpr_count"), number("private_segment_fixed_size"), assembly
