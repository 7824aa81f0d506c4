"""Whether a model fits: known from its config, before a byte of its weights is read."""

from pathlib import Path

import torch

from minillama.config import ModelConfig
from minillama.quantize import GROUP

DTYPES = ("float32", "bfloat16", "float16", "int8", "int4")  # what `load` can make of a checkpoint


def needed_memory(config: ModelConfig, dtype: str) -> int:
    """Bytes of a model's weights. Quantized ones bring their scales along, and leave norms and, in 4 bits, the tables
    of embeddings and of output at more."""
    if dtype not in ("int8", "int4"):
        return config.bytes(dtype)
    parts = config.n_params_by_part()
    matrices, tables = parts["attention"] + parts["feedforward"], parts["embedding"] + parts["output"]
    rows = (matrices + tables) // min(config.dim, config.ffn_dim)  # at most; two bytes a scale
    if dtype == "int8":
        return matrices + tables + 2 * rows + 2 * parts["norms"]
    return matrices // 2 + 4 * matrices // GROUP + tables + 2 * rows + 2 * parts["norms"]


def check_memory(config: ModelConfig, device: torch.device, dtype: str, limit: float | None) -> None:
    """Raise ValueError if the weights do not fit, before one of them is read."""
    limit = free_memory(device) if limit is None else limit
    needed = {kind: needed_memory(config, kind) for kind in DTYPES}
    if needed[dtype] <= limit:
        return
    smaller = next((kind for kind in DTYPES if needed[kind] <= limit), None)
    hint = f"try dtype={smaller}" if smaller else "take a smaller model"
    raise ValueError(
        f"the weights need {needed[dtype] / 1e9:.1f} GB in {dtype}, and {device} has {limit / 1e9:.1f} GB for them: "
        f"{hint}."
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
