"""The roofline: bytes are counted as they lie in memory, speeds are calls by the clock, and the command says all."""

import re
import time

import pytest
import torch

from minillama import roofline
from minillama.cli import main
from minillama.config import ModelConfig
from minillama.generation import next_logits
from minillama.model import Llama
from minillama.quantize import quantize

SHAPE = {"dim": 64, "n_layers": 3, "n_heads": 6, "n_kv_heads": 2, "head_dim": 32, "ffn_dim": 128, "vocab_size": 48}


@pytest.mark.parametrize("tied", [True, False])
def test_a_token_reads_all_weights_but_the_rest_of_an_untied_table_and_the_cache_before_it(tied):
    config = ModelConfig(**SHAPE, max_seq_len=64, tie_embeddings=tied)
    weights = config.n_params() - (0 if tied else 48 * 64)
    cache = 3 * 2 * 2 * 32 * 10  # layers, keys and values, heads, head_dim, tokens
    model = Llama(config)
    frequencies = 4 * 16
    assert roofline.bytes_per_token(model, 10) == 4 * (weights + cache) + frequencies
    assert roofline.bytes_per_token(model.bfloat16(), 10) == 2 * (weights + cache) + frequencies


def test_in_4_bits_a_weight_of_a_block_is_5_bits_with_its_scale():
    model = quantize(Llama(ModelConfig(**SHAPE, max_seq_len=64, tie_embeddings=True)), "int4")
    parts = model.config.n_params_by_part()
    blocks = (parts["attention"] + parts["feedforward"]) * 5 // 8  # 4 bits, and a scale and a middle of 16 for each 32
    table, norms, frequencies, cache = 48 * 64 + 2 * 48, 2 * parts["norms"], 4 * 16, 3 * 2 * 2 * 32 * 2
    assert roofline.bytes_per_token(model, 1) == blocks + table + norms + frequencies + cache


class Clock:
    """Each call of the model takes its width in seconds, and the first ten times as long."""

    def __init__(self, monkeypatch):
        self.now, self.widths = 0.0, []
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(roofline, "next_logits", self.take)

    def take(self, model, tokens, cache):
        self.widths.append(tokens.shape[1])
        self.now += tokens.shape[1] * (10 if len(self.widths) < 4 else 1)
        return next_logits(model, tokens, cache)


def test_speeds_are_tokens_by_the_clock_behind_as_many_as_asked_for(monkeypatch):
    clock, model = Clock(monkeypatch), Llama(ModelConfig(**SHAPE, max_seq_len=64))
    assert roofline.decode_speed(model, position=9, tokens=4, rounds=2) == 1.0
    assert clock.widths == [9] + 12 * [1]
    assert roofline.prefill_speed(model, tokens=20, rounds=1) == 1.0
    assert clock.widths[13:] == [20, 20]


def test_what_the_machine_can_do_is_more_than_nothing():
    assert roofline.memory_bandwidth() > 1e8
    assert roofline.peak_flops(torch.float32) > 1e8


def test_the_command_shows_every_dtype_and_its_share(capsys, monkeypatch):
    monkeypatch.setattr(roofline, "memory_bandwidth", lambda device: 1e10)
    monkeypatch.setattr(roofline, "peak_flops", lambda dtype, device: 1e10 if dtype == torch.float32 else 4e10)
    monkeypatch.setattr(roofline, "decode_speed", lambda model: 100.0)
    monkeypatch.setattr(roofline, "prefill_speed", lambda model: 1000.0)
    with pytest.raises(SystemExit) as done:
        main(["bench", "toy", "--device", "cpu"])
    out = capsys.readouterr().out
    assert not done.value.code and "reads 10 GB/s; multiplies 10 GFLOP/s in float32, 40 in bfloat16" in out
    lines = {line.split()[0]: line.split() for line in out.splitlines() if re.match(r"(float|bfloat|int)", line)}
    assert list(lines) == ["float32", "bfloat16", "int8", "int4"]
    assert [line[3] for line in lines.values()] == 4 * ["100"] and [line[5] for line in lines.values()] == 4 * ["1,000"]
    megabytes = [float(line[1].replace(",", "")) for line in lines.values()]
    for (_, size, unit, _, share, *_), exact in zip(lines.values(), megabytes, strict=True):
        assert unit == "MB" and abs(float(share[:-1]) - exact) <= 1, (size, share)  # 100 tokens of n MB in 10 GB
    config = ModelConfig.preset("toy")
    parts = config.n_params_by_part()
    matrices, scores = parts["attention"] + parts["feedforward"], config.vocab_size * config.dim / 512  # the last only
    flops = 1000 * (2 * (matrices + scores) + 4 * config.n_layers * 256 * config.n_heads * config.head_dim)
    shares = [float(line[6][:-1]) / 100 for line in lines.values()]
    assert shares == pytest.approx([flops / 1e10, *3 * [flops / 4e10]], abs=0.006)
    with pytest.raises(SystemExit) as done:
        main(["bench", "nowhere"])
    assert done.value.code == 2


@pytest.mark.gpu
def test_on_a_gpu_calls_are_waited_for():
    assert 1e10 < roofline.memory_bandwidth("cuda") < 2e13
    assert 1e12 < roofline.peak_flops(torch.bfloat16, "cuda") < 1e16
