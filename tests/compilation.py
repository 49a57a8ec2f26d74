"""Compiling Triton kernels for GPUs that are not here, and reading what came of it."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
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
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    binary = triton.compile(source, target=TARGETS[target], options=options)
    read = _read_amd if target.startswith("gfx") else _read_nvidia
    registers, spilled_bytes, assembly = read(binary)
    return Compiled(
        shared_bytes=binary.metadata.shared,
        registers=registers,
        spilled_bytes=spilled_bytes,
        matrix_instructions=assembly.count(MATRIX_INSTRUCTION[target]),
    )


def _read_nvidia(binary: Any) -> tuple[int, int, str]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    path = Path(triton.knobs.cache.dir or ".") / f"{binary.hash}.cubin"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(binary.asm["cubin"])
    report = subprocess.run(
        [tool, "-res-usage", path], capture_output=True, text=True, check=True
    ).stdout
    path.unlink()
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
