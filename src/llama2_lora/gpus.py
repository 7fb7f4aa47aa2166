"""GPUs by name: memory, peak rates, links, number formats. Data sheet values, dense (no sparsity); one line a part.

Memory is what nvidia-smi or rocm-smi reports for the part, in MiB, which is what a process can at most allocate. Rates:
NVIDIA H100, H200, H200 NVL and GH200, DGX B200, DGX B300, GB200 NVL72 and GB300 NVL72 data sheets; AMD Instinct MI300X, MI325X,
MI350X and MI355X data sheets. Link: GB/s in one direction between two GPUs of one scale-up domain (NVLink, Infinity Fabric).
Formats: Transformer Engine 2.9, pytorch/quantization.py, check_mxfp8_support and check_nvfp4_support (compute capability 10.0).
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class Accelerator:
    name: str
    part_gb: int  # how the part is sold
    memory_mib: int
    memory_tb_s: float
    bf16_tflops: float
    fp8_tflops: float
    fp4_tflops: float | None
    link_gb_s: float
    domain: int  # GPUs that the fast link connects; more nodes than one in an NVL72 rack
    family: str  # parts that reach the same share of their peak (timing.py)
    needs_fp8_transposes: bool  # FP8 GEMMs take one layout: the backward needs a transposed copy of each weight
    mxfp8: bool
    nvfp4: bool

    @property
    def memory_bytes(self) -> int:
        return self.memory_mib * MIB


# fmt: off
ACCELERATORS = {a.name: a for a in (
    Accelerator("H100", 80, 81_559, 3.35, 989, 1979, None, 450, 8, "Hopper", True, False, False),
    Accelerator("H200", 141, 143_771, 4.8, 989, 1979, None, 450, 8, "Hopper", True, False, False),
    Accelerator("H200-NVL", 141, 143_771, 4.8, 835, 1671, None, 450, 4, "H200-NVL", True, False, False),
    Accelerator("GH200", 96, 97_871, 4.0, 989, 1979, None, 450, 4, "GH200", True, False, False),
    Accelerator("B200", 180, 183_359, 7.7, 2250, 4500, 9000, 900, 8, "Blackwell", False, True, True),
    Accelerator("B300", 288, 275_040, 7.7, 2250, 4500, 13_500, 900, 8, "B300", False, True, True),
    Accelerator("GB200", 192, 189_471, 8.0, 2500, 5000, 10_000, 900, 72, "Blackwell", False, True, True),
    Accelerator("GB300", 288, 284_208, 8.0, 2500, 5000, 15_000, 900, 72, "GB300", False, True, True),
    Accelerator("MI300X", 192, 196_592, 5.3, 1307, 2615, None, 64, 8, "MI300X", True, False, False),
    Accelerator("MI325X", 256, 262_128, 6.0, 1307, 2615, None, 64, 8, "MI325X", True, False, False),
    Accelerator("MI350X", 288, 294_896, 8.0, 2307, 4614, 9227, 77, 8, "MI355X", True, True, False),
    Accelerator("MI355X", 288, 294_896, 8.0, 2517, 5033, 10_066, 77, 8, "MI355X", True, True, False),
)}
# fmt: on


def named_in(text: str) -> Accelerator | None:
    """The part with the longest name that the text contains, whatever its case: GB200, not B200, in `DGXGB200_2x4x2`."""
    names = [name for name in ACCELERATORS if name in text.upper()]
    return ACCELERATORS[max(names, key=len)] if names else None


def accelerator_of(accelerator: str, system_name: str) -> Accelerator | None:
    """The part that ACCELERATOR names, else the one that DGXSYSTEM contains; None where neither tells."""
    return ACCELERATORS.get(accelerator) if accelerator else named_in(system_name)
