"""What a checkpoint needs is known before its weights are read: `inspect`, and the memory that `load` asks for."""

import pytest
import torch

from minillama.checkpoint import load, memory, save
from minillama.cli import main
from minillama.config import ModelConfig
from minillama.model import Llama

CONFIG = ModelConfig(
    dim=24, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=10, ffn_dim=56, vocab_size=37, max_seq_len=64
)


@pytest.fixture
def folder(tmp_path):
    save(Llama(CONFIG), None, tmp_path / "model")
    return tmp_path / "model"


def inspect(capsys, *arguments) -> tuple[int, str]:
    with pytest.raises(SystemExit) as done:
        main(["inspect", *map(str, arguments)])
    return done.value.code or 0, capsys.readouterr().out


def test_inspect_says_what_is_in_a_checkpoint_and_reads_no_weight(folder, capsys, monkeypatch):
    monkeypatch.setattr(torch, "empty", None)
    code, out = inspect(capsys, folder, "--tensors")
    assert code == 0
    assert f"{CONFIG.n_params():,} parameters" in out and "head_dim        10" in out and "no tokenizer" in out
    assert "21 tensors: 21 F32" in out and "blocks.1.attention.wk.weight" in out and "20×24" in out


def test_inspect_names_the_preset_and_the_tokenizer(capsys):
    code, out = inspect(capsys, "toy")
    assert code == 0 and "the shape of toy" in out and "2,048 tokens, SentencePiece" in out
    assert inspect(capsys, "nowhere")[0] == 2


def test_a_model_that_does_not_fit_is_refused_with_what_would(folder, monkeypatch):
    needs = CONFIG.bytes("float32")
    with pytest.raises(ValueError, match="in float32, and cpu has .* for them: try dtype=bfloat16"):
        load(folder, max_memory=needs - 1)
    with pytest.raises(ValueError, match="take a smaller model"):
        load(folder, max_memory=100)
    load(folder, max_memory=needs)
    monkeypatch.setattr(memory, "free_memory", lambda device: 100)
    with pytest.raises(ValueError, match="take a smaller model"):
        load(folder)
