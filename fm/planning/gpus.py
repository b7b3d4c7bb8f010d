"""GPUs by name, and what a step would take on one at a stated share of its peak: a ceiling, no measurement."""

from dataclasses import dataclass

from data_pipeline.errors import UserError
from data_pipeline.strict_yaml import nearest

LAUNCH_SECONDS = 5e-6  # from one kernel to the next where the processor that starts them sets the pace; an assumption
STATE_TOUCHES = 13  # reads and writes of float32 numbers per parameter: clip 3, AdamW 7, averaged weights 3


@dataclass(frozen=True)
class Gpu:
    """Peaks as the vendor states them, dense (without sparsity)."""

    name: str
    bf16_tflops: float  # tensor cores, float32 accumulation
    float32_tflops: float
    bandwidth: float  # GB/s of its memory
    memory: float  # GB
    link: float  # GB/s each way to the other GPUs of its node: NVLink, or where there is none PCIe 4.0


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 312, 19.5, 2039, 80, 300),  # NVIDIA A100 data sheet, 80 GB SXM
        Gpu("l40s", 362, 91.6, 864, 48, 32),  # NVIDIA L40S data sheet
        Gpu("h100", 989, 67, 3350, 80, 450),  # NVIDIA H100 data sheet, SXM; half of what it states with sparsity
        Gpu("h200", 989, 67, 4800, 141, 450),  # NVIDIA H200 data sheet, SXM; as above
        Gpu("b200", 2250, 75, 7700, 180, 900),  # NVIDIA Blackwell data sheet, HGX B200; as above
        Gpu("rtx4090", 165.2, 82.6, 1008, 24, 32),  # NVIDIA Ada GPU Architecture white paper, appendix A
    )
}


def find_gpu(name: str) -> Gpu:
    """The GPU of this name, in upper or lower case. UserError, with the nearest, where the table has none."""
    if name.lower() not in GPUS:
        raise UserError(f"--gpu: no GPU {name!r} in the table. {nearest(name.lower(), tuple(GPUS))}")
    return GPUS[name.lower()]


@dataclass(frozen=True)
class Ceiling:
    """A GPU, and the share of its peaks that is assumed to be reached."""

    gpu: Gpu
    utilisation: float
    bf16: bool

    @property
    def flops(self) -> float:
        """FLOP/s assumed for matrix products."""
        return self.utilisation * 1e12 * (self.gpu.bf16_tflops if self.bf16 else self.gpu.float32_tflops)

    def seconds(self, flops: float, moved_bytes: float, operations: float) -> float:
        """Time of kernels one after another: products at the assumed rate, the others at the memory's bandwidth.

        But never less than it takes to launch them.
        """
        return max(flops / self.flops + moved_bytes / (1e9 * self.gpu.bandwidth), operations * LAUNCH_SECONDS)
