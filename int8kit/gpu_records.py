"""Records of GPUs: limits and rates from public documents, one row for each GPU. No other module names a GPU.

`GPUS["rtx3090"]` is a record, `SOURCES["rtx3090"]` its source. To add a GPU, add a row with its source.

Rates are dense, at the boost clock. Where a document has no INT8 rate, it follows from the architecture: 2048 integer
operations a clock and multiprocessor from sm_86 to sm_120. bf16 with float32 accumulation has a quarter of this on a
GeForce, and half on another GPU.

`l2_gb_s` is no published figure but an estimate for the cost model. For sm_86 it is 32 bytes a clock for each 8 bits of
the memory bus. For other GPUs it is scaled by bus width and clock, from the RTX 4090, the RTX 5090 or the H100.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Limits and rates of a GPU."""

    alias: str
    name: str  # as the driver spells it
    arch: int  # compute capability as in sm_86
    sms: int  # streaming multiprocessors
    shared_memory: int  # bytes that one block may use
    shared_memory_sm: int  # bytes of one multiprocessor
    threads_sm: int  # threads resident on one multiprocessor
    l2_bytes: int
    memory_gib: int
    dram_gb_s: float
    l2_gb_s: float
    clock_mhz: int  # boost
    int8_tops: float  # dense
    bf16_tflops: float  # dense, float32 accumulate


def _ampere(alias: str, name: str, arch: int, sms: int, l2_mib: int, gib: int, dram: float, l2: float, clock: int,
            tops: float, tflops: float) -> Gpu:  # fmt: skip
    """A GPU with the shared memory of GA102 and its successors: 100 KiB a multiprocessor, 1 KiB of it reserved."""
    return Gpu(alias, name, arch, sms, 101376, 102400, 1536, l2_mib << 20, gib, dram, l2, clock, tops, tflops)


def _datacenter(alias: str, name: str, arch: int, sms: int, kib: int, l2_mib: int, gib: int, dram: float, l2: float,
                clock: int, tops: float, tflops: float) -> Gpu:  # fmt: skip
    """A GPU with `kib` KiB of shared memory a multiprocessor, 1 KiB of it reserved."""
    return Gpu(alias, name, arch, sms, (kib - 1) << 10, kib << 10, 2048, l2_mib << 20, gib, dram, l2, clock, tops,
               tflops)  # fmt: skip


_GA102 = "NVIDIA Ampere GA102 GPU Architecture whitepaper 2.0"
_ADA = "NVIDIA Ada GPU Architecture whitepaper 2.02"
_BLACKWELL = "NVIDIA RTX Blackwell GPU Architecture whitepaper 1.1"
_GEFORCE_30 = "NVIDIA product pages of the GeForce RTX 30 series"
_GEFORCE_40 = "NVIDIA product pages of the GeForce RTX 40 series"
_GEFORCE_50 = "NVIDIA product pages of the GeForce RTX 50 series"

_RECORDS: tuple[tuple[Gpu, str], ...] = (
    # alias, name, arch, multiprocessors, L2 MiB, GiB, DRAM GB/s, L2 GB/s, MHz, INT8 TOP/s, bf16 TFLOP/s
    (_ampere("rtx3060", "NVIDIA GeForce RTX 3060", 86, 28, 3, 12, 360, 1360, 1777, 102, 25.5), _GEFORCE_30),
    (_ampere("rtx3060ti", "NVIDIA GeForce RTX 3060 Ti", 86, 38, 4, 8, 448, 1705, 1665, 129.6, 32.4), _GEFORCE_30),
    (_ampere("rtx3070", "NVIDIA GeForce RTX 3070", 86, 46, 4, 8, 448, 1766, 1725, 162.6, 40.6), _GA102),
    (_ampere("rtx3080", "NVIDIA GeForce RTX 3080", 86, 68, 5, 10, 760, 2190, 1710, 238, 59.5), _GA102),
    (_ampere("rtx3080-12gb", "NVIDIA GeForce RTX 3080", 86, 70, 6, 12, 912, 2627, 1710, 245.1, 61.3), _GEFORCE_30),
    (_ampere("rtx3080ti", "NVIDIA GeForce RTX 3080 Ti", 86, 80, 6, 12, 912, 2557, 1665, 272.8, 68.2), _GEFORCE_30),
    (_ampere("rtx3090", "NVIDIA GeForce RTX 3090", 86, 82, 6, 24, 936, 2600, 1695, 284, 71), _GA102),
    (_ampere("rtx3090ti", "NVIDIA GeForce RTX 3090 Ti", 86, 84, 6, 24, 1008, 2857, 1860, 320, 80), _GEFORCE_30),
    (_ampere("a10", "NVIDIA A10", 86, 72, 6, 24, 600, 2604, 1695, 250, 125), "NVIDIA A10 data sheet"),
    (_ampere("a40", "NVIDIA A40", 86, 84, 6, 48, 696, 2673, 1740, 299.3, 149.7), _GA102),
    (_ampere("a6000", "NVIDIA RTX A6000", 86, 84, 6, 48, 768, 2765, 1800, 309.7, 154.8), _GA102),
    (_ampere("rtx4060ti", "NVIDIA GeForce RTX 4060 Ti", 89, 34, 32, 8, 288, 1677, 2535, 176.5, 44.1), _GEFORCE_40),
    (
        _ampere("rtx4060ti-16gb", "NVIDIA GeForce RTX 4060 Ti", 89, 34, 32, 16, 288, 1677, 2535, 176.5, 44.1),
        _GEFORCE_40,
    ),
    (_ampere("rtx4070", "NVIDIA GeForce RTX 4070", 89, 46, 36, 12, 504, 2455, 2475, 233.2, 58.3), _GEFORCE_40),
    (_ampere("rtx4070ti", "NVIDIA GeForce RTX 4070 Ti", 89, 60, 48, 12, 504, 2589, 2610, 320.7, 80.2), _ADA),
    (_ampere("rtx4080", "NVIDIA GeForce RTX 4080", 89, 76, 64, 16, 717, 3313, 2505, 389.9, 97.5), _ADA),
    (_ampere("rtx4090", "NVIDIA GeForce RTX 4090", 89, 128, 72, 24, 1008, 5000, 2520, 660.6, 165.2), _ADA),
    (_ampere("l4", "NVIDIA L4", 89, 58, 48, 24, 300, 2024, 2040, 242.5, 121), "NVIDIA L4 data sheet"),
    (_ampere("l40s", "NVIDIA L40S", 89, 142, 96, 48, 864, 5000, 2520, 733, 362), "NVIDIA L40S data sheet"),
    (_ampere("rtx6000ada", "NVIDIA RTX 6000 Ada Generation", 89, 142, 96, 48, 960, 4970, 2505, 728.5, 364.2), _ADA),
    (_ampere("rtx5070ti", "NVIDIA GeForce RTX 5070 Ti", 120, 70, 48, 16, 896, 3311, 2452, 351.5, 87.9), _GEFORCE_50),
    (_ampere("rtx5080", "NVIDIA GeForce RTX 5080", 120, 84, 64, 16, 960, 3534, 2617, 450.2, 112.6), _BLACKWELL),
    (_ampere("rtx5090", "NVIDIA GeForce RTX 5090", 120, 170, 96, 32, 1792, 6500, 2407, 838, 209.5), _BLACKWELL),
    # alias, name, arch, multiprocessors, KiB of shared memory, then as above
    (
        _datacenter("a100", "NVIDIA A100-SXM4-80GB", 80, 108, 164, 40, 80, 2039, 3600, 1410, 624, 312),
        "NVIDIA A100 data sheet",
    ),
    (
        _datacenter("h100", "NVIDIA H100 80GB HBM3", 90, 132, 228, 50, 80, 3350, 5500, 1980, 1979, 989),
        "NVIDIA H100 data sheet",
    ),
    (
        _datacenter("h200", "NVIDIA H200", 90, 132, 228, 50, 141, 4800, 5500, 1980, 1979, 989),
        "NVIDIA H200 data sheet",
    ),
    # bus, multiprocessors and L2 as the driver reports them: github.com/pytorch/ao pull request 4002
    (
        _datacenter("b200", "NVIDIA B200", 100, 148, 228, 126, 180, 7672, 8187, 1965, 4500, 2250),
        "NVIDIA HGX B200 data sheet; CUDA Blackwell Tuning Guide",
    ),
)

GPUS: dict[str, Gpu] = {gpu.alias: gpu for gpu, _ in _RECORDS}
SOURCES: dict[str, str] = {gpu.alias: source for gpu, source in _RECORDS}
"""The public document of each record's figures."""
