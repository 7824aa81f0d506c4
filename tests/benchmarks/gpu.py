"""Writing on a GPU: tokens per second of a model with random weights, against what its memory's speed allows.

    python -m tests.benchmarks.gpu [preset] [dtype …]

For each dtype, eager and compiled: a compiled step over a static cache is recorded as a CUDA graph, so that Python no
longer calls every kernel. The limit is the measured bandwidth over the bytes of a token. By itself: it needs a GPU.
"""

import sys

import torch

from minillama import roofline
from minillama.cache import StaticCache
from minillama.checkpoint.load import check_device
from minillama.config import ModelConfig
from minillama.generation import compiled_step
from minillama.model import Llama
from minillama.quantize import quantize

POSITION, TOKENS, MAX_LEN = 64, 32, 256


def random_model(preset: str, dtype: str, device: torch.device) -> Llama:
    """In its dtype from the start: a whole copy in fp32 would not fit beside it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = Llama(ModelConfig.preset(preset)).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    return model if dtype == "bfloat16" else quantize(model, dtype)


def compiled_speed(model: Llama, dtype: str) -> float:
    """Tokens in a second, by a compiled step."""
    device = model.norm.weight.device
    cache = StaticCache(model.config, 1, MAX_LEN, device=device, dtype=model.norm.weight.dtype)
    step = compiled_step(device.type, dtype == "int8")
    token = torch.ones(1, 1, dtype=torch.int64, device=device)

    def write() -> None:
        cache.rewind(POSITION)
        for _ in range(TOKENS):
            step(model, token, cache)

    for _ in range(3):  # compiled, then recorded
        write()
    return TOKENS / roofline.seconds(write, device, 5)


def main(preset: str = "llama2-7b", *dtypes: str) -> None:
    try:
        device = check_device("cuda")
    except ValueError as error:
        sys.exit(f"{error}")
    bandwidth = roofline.memory_bandwidth(device)
    print(f"{torch.cuda.get_device_name()}: {bandwidth / 1e9:,.0f} GB/s")
    for dtype in dtypes or ("bfloat16", "int8", "int4"):
        model = random_model(preset, dtype, device)
        limit = bandwidth / roofline.bytes_per_token(model, POSITION)
        for how, speed in (("eager", roofline.decode_speed(model)), ("compiled", compiled_speed(model, dtype))):
            print(f"{preset} {dtype:9} {how:9} {speed:8.1f} tokens/s, {speed / limit:4.0%} of {limit:.1f}", flush=True)
        del model
        torch.compiler.reset()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main(*sys.argv[1:])
