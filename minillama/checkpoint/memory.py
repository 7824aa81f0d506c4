"""Whether a model fits: known from its config, before a byte of its weights is read."""

from pathlib import Path

import torch

from minillama.config import ModelConfig

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_memory(config: ModelConfig, device: torch.device, dtype: torch.dtype, limit: float | None) -> None:
    """Raise ValueError if the weights do not fit, before one of them is read."""
    limit = free_memory(device) if limit is None else limit
    needed = {kind: config.bytes(str(kind).removeprefix("torch.")) for kind in DTYPES}
    if needed[dtype] <= limit:
        return
    smaller = next((kind for kind in DTYPES if needed[kind] <= limit), None)
    hint = f"try dtype={smaller}" if smaller else "take a smaller model"
    raise ValueError(
        f"the weights need {needed[dtype] / 1e9:.1f} GB in {str(dtype).removeprefix('torch.')}, and {device} has "
        f"{limit / 1e9:.1f} GB for them: {hint}."
    )


def free_memory(device: torch.device | None = None) -> float:
    """Bytes that programs can still get on a device (the processor's memory if it is None); infinity where nobody
    says."""
    if device is not None and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return float("inf")
