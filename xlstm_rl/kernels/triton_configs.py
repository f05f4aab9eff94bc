"""Static shapes of the GPU kernels by head width and dtype, and what a GPU must have for them.

Found by compiling for every GPU and taking what spills no register there; nothing is tuned at run time.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

WIDTHS = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.bfloat16)
KIB = 1024


class Launch(NamedTuple):
    """How a kernel is launched.

    Attributes:
        warps: threads by 32 (64 on AMD).
        dots: how float32 is multiplied, "ieee" without tensor cores, "tf32x3" with them, in three products that keep
            the digits; bfloat16 always takes the tensor cores.
        chunk: steps per chunk of the mLSTM.
        share: rows or columns of the mLSTM's matrix memory per program, a divisor of its width.
        streams: whether the sLSTM loads its recurrent weights at every step instead of keeping them on chip.
    """

    warps: int
    dots: str = "ieee"
    chunk: int = 16
    share: int = 16
    streams: bool = False

    @property
    def precision(self) -> str:
        """`dots` as this machine has it: AMD has matrix instructions for float32 and no three-product mode."""
        return self.dots if torch.version.hip is None else "ieee"

    @property
    def options(self) -> dict[str, Any]:
        """What Triton is told beside the arguments."""
        options = {"num_warps": self.warps, "num_stages": 1, "enable_fp_fusion": True}
        # All registers there are: left alone, the compiler may spill some to run more programs at a time.
        return options if torch.version.hip is not None else {**options, "maxnreg": 255}


# By head width and whether the inputs are bfloat16.
_CONFIGS: dict[str, dict[tuple[int, bool], Launch]] = {
    "mlstm_forward": {
        (16, False): Launch(1),
        (32, False): Launch(8, share=32),
        (64, False): Launch(8, "tf32x3"),
        (128, False): Launch(8),
        (16, True): Launch(1),
        (32, True): Launch(4, share=32),
        (64, True): Launch(4, share=64),
        (128, True): Launch(8, share=32),
    },
    "mlstm_step": {
        (D, is_half): launch
        for is_half in (False, True)
        for D, launch in {
            16: Launch(1),
            32: Launch(1, share=32),
            64: Launch(2, share=32),
            128: Launch(4, share=32),
        }.items()
    },
    "mlstm_backward": {
        (16, False): Launch(2),
        (32, False): Launch(4, share=32),
        (64, False): Launch(8, "tf32x3"),
        (128, False): Launch(8),
        (16, True): Launch(2),
        (32, True): Launch(2),
        (64, True): Launch(4, share=32),
        (128, True): Launch(8, share=64),
    },
    "slstm_forward": {
        (16, False): Launch(2),
        (32, False): Launch(4),
        (64, False): Launch(8, "tf32x3"),
        (16, True): Launch(1),
        (32, True): Launch(2),
        (64, True): Launch(4),
        (128, True): Launch(8),
    },
    "slstm_backward": {
        (16, False): Launch(2),
        (32, False): Launch(4),
        (64, False): Launch(8, "tf32x3"),
        (16, True): Launch(2),
        (32, True): Launch(4),
        (64, True): Launch(8),
        (128, True): Launch(8),
    },
}
# In place of these on chips with less shared memory, consumer and AMD cards.
_SMALL_CHIP: dict[str, dict[tuple[int, bool], Launch]] = {
    "mlstm_backward": {(16, True): Launch(1), (64, False): Launch(8), (128, True): Launch(8)},
    "slstm_forward": {(64, False): Launch(8), (64, True): Launch(8)},
    "slstm_backward": {(64, False): Launch(8)},
}
_SMALL = 137 * KIB
# Bytes of shared memory without which an sLSTM streams its recurrent weights; the others fit on every GPU.
_WEIGHTS_ON_CHIP = {(64, False): 81 * KIB, (64, True): 75 * KIB, (128, False): 512 * KIB, (128, True): 149 * KIB}
_STREAMING = {
    (64, False): Launch(4, "tf32x3", streams=True),
    (64, True): Launch(4, streams=True),
    (128, False): Launch(8, "tf32x3", streams=True),
    (128, True): Launch(8, streams=True),
}


def launch_for(kernel: str, tensor: Tensor) -> Launch:
    """The configuration of a kernel for inputs [..., D] like this one, on its device."""
    key = tensor.shape[-1], tensor.dtype == torch.bfloat16
    shared = shared_memory(tensor.device)
    if kernel.startswith("slstm") and shared < _WEIGHTS_ON_CHIP.get(key, 0):
        return _STREAMING[key]
    launch = _CONFIGS[kernel][key]
    return launch if shared >= _SMALL else _SMALL_CHIP.get(kernel, {}).get(key, launch)


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have; tests without a GPU take the configurations of an H100."""
    return device_facts(device).shared_memory if device.type == "cuda" else 227 * KIB


class DeviceFacts(NamedTuple):
    """What decides which kernels a GPU can run; shared memory in bytes per program."""

    capability: tuple[int, int]
    shared_memory: int
    is_amd: bool


@cache
def device_facts(device: torch.device) -> DeviceFacts:
    """Ask the driver, once per device."""
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    return DeviceFacts(torch.cuda.get_device_capability(device), int(shared), torch.version.hip is not None)


def slstm_trace_fields(gates: Tensor) -> int:
    """How many float32 values per unit and step the sLSTM keeps for its backward pass.

    3 are cell, normalizer and stabilizer. 7 are these and the four pre-activations, where the chip cannot hold the
    recurrent weights twice, once to compute the gates again and once, turned, for the gradient.
    """
    return 3 if gates.dtype == torch.bfloat16 and gates.shape[-1] <= 64 else 7
