"""Writing with a model that is shared out: the numbers of the whole model, and no more read or held than a share."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file

from minillama import generate, load, save
from minillama.cache import KVCache
from minillama.checkpoint import save_huggingface
from minillama.checkpoint.load import fill, open_checkpoint
from minillama.checkpoint.names import META, expand
from minillama.config import ModelConfig
from minillama.generation import Sampling, stream_tokens
from minillama.model import Llama
from minillama.parallel import Layout
from minillama.parallel_load import from_first, load_share, share
from tests.distributed.together import together
from tests.test_checkpoint import CONFIG, random_model, write_gguf

CPU = torch.device("cpu")
TWO = Layout(tp=2)


def load_part(path: Path, part: int, parts: int = 2, **options: Any) -> Llama:
    return load(path, share=partial(share, part=part, parts=parts), **options)[0]


def part_of(name: str, tensor: torch.Tensor, part: int, parts: int) -> torch.Tensor:
    """What a part has of a tensor, written out once more."""
    layer = name.split(".")[-2]
    if layer in ("wq", "wk", "wv", "gate", "up"):
        return tensor.chunk(parts, 0)[part]
    return tensor.chunk(parts, 1)[part] if layer in ("wo", "down") else tensor


def assert_is_part(model: Llama, whole: dict[str, torch.Tensor], part: int, parts: int = 2) -> None:
    state = model.state_dict()
    assert list(state) == list(whole)
    for name, tensor in state.items():
        assert torch.equal(tensor, part_of(name, whole[name], part, parts)), name


# What is read.


def write_bins(model: Llama, folder: Path) -> None:
    save_huggingface(model, None, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def write_two_files(model: Llama, folder: Path) -> None:
    save_huggingface(model, None, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for i in range(2):
        save_file(dict(list(tensors.items())[i::2]), folder / f"model-{i}.safetensors")


def write_floats(model: Llama, path: Path) -> None:
    write_gguf(path, model)


def write_native(model: Llama, folder: Path) -> None:
    save(model, None, folder)


def write_huggingface(model: Llama, folder: Path) -> None:
    save_huggingface(model, None, folder)


@pytest.mark.parametrize("write", [write_native, write_huggingface, write_two_files, write_bins, write_floats])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_part_has_its_rows_and_columns_whatever_the_format(write, tied, tmp_path):
    whole = random_model(replace(CONFIG, tie_embeddings=tied))
    write(whole, path := tmp_path / "c.gguf")
    for part in range(2):
        model = load_part(path, part)
        assert (model.config.n_heads, model.config.n_kv_heads, model.config.ffn_dim) == (3, 1, 48)
        assert_is_part(model, whole.state_dict(), part)


META_LIKE = ModelConfig(dim=48, n_layers=2, n_heads=6, n_kv_heads=6, ffn_dim=96, vocab_size=60, max_seq_len=2048)


def test_metas_files_are_cut_anew_into_any_number_of_parts(tmp_path):
    whole = random_model(META_LIKE)
    state = whole.state_dict()
    for i in range(3):
        part = {theirs: part_of(ours, state[ours], i, 3).clone() for theirs, ours in expand(META, 2).items()}
        torch.save(part, tmp_path / f"consolidated.{i:02}.pth")
    (tmp_path / "params.json").write_text(json.dumps({"dim": 48, "n_layers": 2, "n_heads": 6, "vocab_size": 60}))
    for part in range(2):
        assert_is_part(load_part(tmp_path, part), state, part)


IN_BLOCKS = replace(CONFIG, head_dim=32, ffn_dim=128)  # halves end where blocks of 32 do


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.Q4_1], ids=str)
def test_blocks_of_a_gguf_file_are_read_by_rows_and_columns(kind, tmp_path):
    write_gguf(path := tmp_path / "c.gguf", random_model(IN_BLOCKS), kind)
    whole = load(path)[0].state_dict()
    for part in range(2):
        assert_is_part(load_part(path, part), whole, part)


def test_4_bits_of_a_part_are_those_of_the_file(tmp_path):
    write_gguf(path := tmp_path / "c.gguf", random_model(IN_BLOCKS), Kind.Q4_0)
    whole = load(path, dtype="int4")[0]
    for part in range(2):
        model = load_part(path, part, dtype="int4")
        for name in ("attention.wo", "feedforward.down"):
            ours, theirs = (m.blocks[1].get_submodule(name).dequantize() for m in (model, whole))
            assert torch.equal(ours, theirs.chunk(2, 1)[part])


def test_a_cut_through_blocks_is_refused(tmp_path):
    write_gguf(path := tmp_path / "c.gguf", random_model(), Kind.Q8_0)
    with pytest.raises(ValueError, match=r"has 32 weights of a row in one block \(Q8_0\), and a share of 48 .*: take"):
        load_part(path, 1)


def test_heads_that_cannot_be_shared_out_are_refused(tmp_path):
    save(random_model(), None, tmp_path / "c")
    with pytest.raises(ValueError, match="tp is 3 and n_kv_heads 2: expected a tp that divides it"):
        load_part(tmp_path / "c", 0, 3)


@pytest.mark.parametrize("shape", [(98, 64), (97, 64), (96,)])
def test_a_weight_of_another_shape_is_refused_in_a_part_too(shape, tmp_path):
    save(random_model(), None, tmp_path / "c")
    file = tmp_path / "c" / "model.safetensors"
    save_file(load_file(file) | {"blocks.1.attention.wq.weight": torch.zeros(shape)}, file)
    with pytest.raises(ValueError, match="blocks.1.attention.wq.weight has the shape"):
        load_part(tmp_path / "c", 0)


def test_only_the_share_has_to_fit_into_memory(tmp_path):
    save(random_model(), None, tmp_path / "c")
    needed = replace(CONFIG, n_heads=3, n_kv_heads=1, ffn_dim=48).bytes("float32")
    assert needed < CONFIG.bytes("float32")
    load_part(tmp_path / "c", 0, max_memory=needed)
    with pytest.raises(ValueError, match="the weights need"):
        load_part(tmp_path / "c", 0, max_memory=needed - 1)


LARGE = ModelConfig(
    dim=768, n_layers=8, n_heads=12, n_kv_heads=4, head_dim=64, ffn_dim=2048, vocab_size=500, max_seq_len=64
)  # 200 MB


def from_proc(file: str, name: str) -> int:
    text = Path("/proc/self", file).read_text()
    return int(re.search(rf"^{name}:\s+(\d+)", text, re.M)[1])  # type: ignore[index]


def measure(work: Any) -> tuple[int, int]:
    """The bytes that `work` read from files, and those that it held in memory at most."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    read, held = from_proc("io", "rchar"), from_proc("status", "VmRSS")
    result = work()
    assert result is not None
    return from_proc("io", "rchar") - read, (from_proc("status", "VmHWM") - held) * 1024


def read_a_share(folder: Path) -> None:
    load_share("toy", TWO, device=CPU)  # what is read once, as code
    half = replace(LARGE, n_heads=6, n_kv_heads=2, ffn_dim=1024).bytes("float32")
    read, held = measure(lambda: load_share(folder, TWO, device=CPU))
    assert 0.95 * half < read < 1.01 * half  # tables may be left in the file, where all processes find them
    assert held < half + 2**25  # 32 MiB on their way
    _, whole = measure(lambda: fill(open_checkpoint(folder), CPU, "float32"))
    if whole > 0.5 * LARGE.bytes("float32"):  # and is not left in the file
        assert held < 0.7 * whole


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="this system does not say what a process reads")
@pytest.mark.parametrize("write", [write_native, write_huggingface])
def test_a_process_reads_and_holds_its_share_and_no_more(write, tmp_path):
    write(Llama(LARGE), tmp_path / "c")
    together(2, read_a_share, tmp_path / "c")


# What is computed.


def compare_with_whole(path: Path) -> None:
    whole, _ = load(path)
    model, _ = load_share(path, TWO, device=CPU)
    tokens = torch.tensor([[1, 319, 7, 250, 33, 8], [9, 9, 100, 2, 0, 4]])
    with torch.no_grad():
        expected = whole(tokens)
        assert (model(tokens) - expected).abs().max() < 1e-5 * expected.abs().max()
        cache = KVCache(model.config, 2, 6)
        steps = [model(tokens[:, :4], cache), model(tokens[:, 4:5], cache), model(tokens[:, 5:], cache)]
        assert (torch.cat(steps, 1) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert cache.layers[0].k.shape == (2, 1, 6, 16)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("write", [write_native, write_huggingface])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_scores_are_those_of_the_whole_model(write, tied, tmp_path):
    write(random_model(replace(CONFIG, tie_embeddings=tied)), tmp_path / "c")
    together(2, compare_with_whole, tmp_path / "c")


def compare_texts() -> None:
    whole, tokenizer = load("toy")
    model, _ = load_share("toy", TWO, device=CPU)
    prompts = ["Once upon a time", "", "One day, Mia found a red ball."]
    for settings in (
        {"temperature": 0.0}, {"seed": 3, "top_p": 0.9}, {"beams": 3}, {"temperature": 0.0, "lookup": 4},
    ):  # fmt: skip
        texts = [
            generate(m, tokenizer, prompts, max_new_tokens=15, stop=["friend"], **settings) for m in (whole, model)
        ]
        assert texts[0] == texts[1]
    pieces = generate(model, tokenizer, prompts[0], max_new_tokens=15, temperature=0.0, stream=True)
    assert prompts[0] + "".join(pieces) == generate(whole, tokenizer, prompts[0], max_new_tokens=15, temperature=0.0)


def test_the_texts_are_those_of_the_whole_model():
    together(2, compare_texts)


def part_the_processes() -> None:
    """One of them has a damaged table, and would draw other tokens."""
    model, _ = load_share("toy", TWO, device=CPU)
    if dist.get_rank() == 1:
        model.embedding.weight.data = model.embedding.weight.flip(0)
    steps = stream_tokens(model, [[1, 50]], max_new_tokens=20, sampling=Sampling(seed=0))
    texts: list[Any] = [None, None]
    dist.all_gather_object(texts, list(steps))
    assert texts[0] == texts[1]


def test_all_processes_draw_the_tokens_of_the_first():
    together(2, part_the_processes)


def compare_quantized(kind: str) -> None:
    exact, whole = load("toy")[0], load("toy", dtype=kind)[0]
    model, _ = load_share("toy", TWO, device=CPU, dtype=kind)
    tokens = torch.arange(100, 140)[None]
    with torch.no_grad():
        expected = exact(tokens)[:, -1]
        errors = []
        for quantized in (whole, model):
            cache = KVCache(quantized.config, 1, 40, dtype=torch.bfloat16)
            quantized(tokens[:, :39], cache)
            errors.append((quantized(tokens[:, 39:], cache)[:, 0].float() - expected).norm())
    assert errors[1] < 1.5 * errors[0]


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantized_parts_add_up_too(kind):
    together(2, compare_quantized, kind)


def refuse_layouts() -> None:
    for layout, sentence in ((Layout(fsdp=2), "to write takes tp alone"), (Layout(tp=4), "there are 2: change one")):
        with pytest.raises(ValueError, match=sentence):
            load_share("toy", layout, device=CPU)


def test_a_layout_that_cannot_write_is_refused():
    together(2, refuse_layouts)


def ask_the_first() -> None:
    assert from_first(("Once", 7) if dist.get_rank() == 0 else None) == ("Once", 7)


def test_what_was_typed_is_known_to_all():
    together(2, ask_the_first)


# The command.


def torchrun(processes: int, *arguments: str, typed: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "minillama", "generate", "--device", "cpu", "--max-new-tokens", "20", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, input=typed, env=environment, capture_output=True, text=True, timeout=110)


def test_the_first_process_alone_reads_and_prints():
    done = torchrun(2, "-", "--parallel", "tp=2", "--temperature", "0", typed="Once upon a time\n")
    model, tokenizer = load("toy")
    assert done.returncode == 0, done.stderr
    assert done.stdout == generate(model, tokenizer, "Once upon a time", max_new_tokens=20, temperature=0.0) + "\n"


def test_a_mistake_is_said_once_and_ends_all():
    done = torchrun(3, "Once", "--parallel", "tp=3")
    assert done.returncode != 0 and done.stdout == ""
    assert re.findall("^minillama: .*", done.stderr, re.M) == [
        "minillama: tp is 3 and n_kv_heads 4: expected a tp that divides it."
    ]
    assert (
        re.search(r"exitcode\s+: 2 ", done.stderr) and "cli/app.py" not in done.stderr
    )  # torchrun shows its own lines


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_process_on_a_gpu(tmp_path):
    save(random_model(), None, tmp_path / "c")
    dist.init_process_group("nccl", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        whole, _ = load(tmp_path / "c", device="cuda", dtype=torch.bfloat16)
        model, _ = load_share(tmp_path / "c", Layout(), device=torch.device("cuda", 0), dtype=torch.bfloat16)
        with torch.inference_mode():
            tokens = torch.tensor([[1, 319, 7, 250]], device="cuda")
            assert torch.equal(model.scores(model.hidden(tokens)), whole(tokens))
    finally:
        dist.destroy_process_group()
