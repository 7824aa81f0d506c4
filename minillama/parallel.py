"""Many processes (chapter 16): each holds a part of the model, of the data or of both, and together they take the step
that one would have taken alone.

Three ways, which multiply. dp: every process has the whole model and its own rows of the batch; gradients are averaged.
fsdp: the same, but each keeps only its share of every weight, gradient and optimizer state, and a block's weights are
brought together while it computes. tp: the matrices of a block are cut, and each process computes its own heads.
"""

import os
import shutil
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from minillama.attention import Attention
from minillama.checkpoint.files import sync
from minillama.checkpoint.native import WEIGHTS, describe
from minillama.config import ModelConfig
from minillama.data import Batch
from minillama.model import Llama, begin
from minillama.tokenizer import Tokenizer

# How a block's matrices are cut. By columns: a process has some outputs (some heads, some of the hidden width), and
# needs no word from the others to compute them. By rows: it has the weights that its own outputs meet, and the partial
# results are added up over all. So a block talks twice, once after attention and once after the feed-forward. The
# tables at both ends stay whole: they are a few percent of a large model, fsdp shares them out all the same, and the
# loss sees every score of a token in one place. Source: Shoeybi et al. 2019, "Megatron-LM", section 3.
PLAN = {
    "blocks.*.attention.wq": "column",
    "blocks.*.attention.wk": "column",
    "blocks.*.attention.wv": "column",
    "blocks.*.attention.wo": "row",
    "blocks.*.feedforward.gate": "column",
    "blocks.*.feedforward.up": "column",
    "blocks.*.feedforward.down": "row",
}


@dataclass(frozen=True)
class Layout:
    """How many processes share the data (dp), the data and the weights (fsdp), and each matrix (tp).

    They multiply: `fsdp=2,tp=2` takes four processes, of which each pair that shares matrices lies side by side.
    """

    dp: int = 1
    fsdp: int = 1
    tp: int = 1

    @classmethod
    def parse(cls, text: str) -> "Layout":
        """Read "fsdp=2,tp=2". Raises ValueError for anything else."""
        known = [field.name for field in fields(cls)]
        found: dict[str, int] = {}
        for part in text.split(","):
            name, _, count = part.strip().partition("=")
            if name not in known or name in found or not (count.isdecimal() and len(count) < 9 and int(count) > 0):
                raise ValueError(f"the layout is {text!r:.80}, expected counts of {', '.join(known)}, as fsdp=2,tp=2.")
            found[name] = int(count)
        return cls(**found)

    def __str__(self) -> str:
        return f"dp={self.dp},fsdp={self.fsdp},tp={self.tp}"

    @property
    def processes(self) -> int:
        return self.dp * self.fsdp * self.tp

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError if the model's matrices cannot be cut so."""
        for name, value in (("n_kv_heads", config.n_kv_heads), ("ffn_dim", config.ffn_dim)):
            if value % self.tp:
                raise ValueError(f"tp is {self.tp} and {name} {value}: expected a tp that divides it.")


def start(device: str) -> torch.device:
    """Join the processes that torchrun has started, on a device of one's own: "cuda" or "cpu".

    Raises ValueError where torchrun has not started this process.
    """
    if "RANK" not in os.environ:
        raise ValueError(
            "this process is alone, expected one of several: start them with `torchrun --nproc-per-node 4 -m minillama`"
            " and what was to be done."
        )
    place = torch.device(device, int(os.environ["LOCAL_RANK"])) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(place)
    # What an attempt leaves in torchrun's store is still there in the next one, so each takes a place of its own.
    store, rank, processes = next(iter(dist.rendezvous("env://")))
    place_of_attempt = dist.PrefixStore(f"attempt {store.add(f'attempts of {rank}', 1)}", store)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=place_of_attempt, rank=rank, world_size=processes)
    return place


def stop() -> None:
    """Leave the others. They may still be at work."""
    dist.destroy_process_group()


def make_mesh(layout: Layout, device: str) -> DeviceMesh:
    """The processes as a grid (dp, fsdp, tp). Raises ValueError if there are more or fewer of them than it has places.

    Neighbours in the last dimension talk the most, so they are the ones on one machine.
    """
    if (there := dist.get_world_size()) != layout.processes:
        raise ValueError(f"the layout {layout} needs {layout.processes} processes, and there are {there}: change one.")
    return init_device_mesh(device, (layout.dp, layout.fsdp, layout.tp), mesh_dim_names=("dp", "fsdp", "tp"))


def distribute(model: Llama, layout: Layout, half: bool = False, device: torch.device | None = None) -> "Team":
    """Share a model out among the processes, in place; its parameters become DTensors with their names and shapes.

    Every process gives the same weights; or, where none could hold them, a model on the meta device, whose shares then
    begin on `device` with the values that they would have in a new model. `half`: weights are sent to where they are
    needed in bf16, and a block's matrices are never there in fp32 as a whole. Optimizers are made afterwards. dp is
    fsdp with one share: the same code, in which each process keeps all. Raises ValueError if the layout does not suit
    the model. Source: Zhao et al. 2023, "PyTorch FSDP".
    """
    layout.check(model.config)
    mesh = make_mesh(layout, (device or model.norm.weight.device).type)
    if layout.tp > 1:
        cut(model, mesh["tp"])
    data = mesh["dp", "fsdp"] if layout.dp > 1 else mesh["fsdp"]
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    if half:  # also for validation, which one process does in fp32
        model.hidden = torch.autocast(mesh.device_type, torch.bfloat16)(model.hidden)  # type: ignore[method-assign]
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # we change no scores in place
    for block in model.blocks:
        fully_shard(block, mesh=data, mp_policy=policy if half else MixedPrecisionPolicy())
    fully_shard(model, mesh=data)
    register_fsdp_forward_method(model, "hidden")  # the loss asks for it alone, and makes the scores a part at a time
    if device is not None:
        model.to_empty(device=device)
        _begin(model)
    return Team(mesh)


@torch.no_grad()
def _begin(model: Llama) -> None:
    """First values, drawn as one process alone would draw them: each weight whole, one after the other."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):  # draws numbers when it is made, and then others from the same source
            nn.Linear(layer.in_features, layer.out_features, bias=False)
    for name, p in model.named_parameters():
        assert isinstance(p, DTensor), "the model is shared out"
        begin(name, whole := torch.empty(p.shape))
        p.copy_(distribute_tensor(whole.to(p.device), p.device_mesh, p.placements, src_data_rank=None))


def cut(model: Llama, mesh: DeviceMesh) -> None:
    """Cut the blocks' matrices by the PLAN, in place: each process of the mesh (tp,) keeps its heads and its part of
    the hidden width, and the activations between the blocks are whole everywhere."""
    whole = Replicate()
    styles: dict[str, ParallelStyle] = {
        name: ColwiseParallel(input_layouts=whole) if kind == "column" else RowwiseParallel(output_layouts=whole)
        for name, kind in PLAN.items()
    }
    # Made a DTensor once for all the matrices that read it, so that their gradients are added up here first, then sent.
    styles["blocks.*.attention"] = PrepareModuleInput(
        input_layouts=(whole, None, None, None), desired_input_layouts=(whole, None, None, None)
    )
    styles["blocks.*.feedforward"] = PrepareModuleInput(input_layouts=(whole,), desired_input_layouts=(whole,))
    parallelize_module(model, mesh, styles)
    for layer in model.modules():
        if isinstance(layer, Attention):
            layer.n_heads, layer.n_kv_heads = layer.n_heads // mesh.size(), layer.n_kv_heads // mesh.size()


@dataclass(frozen=True)
class Team:
    """The processes of a run as a grid (dp, fsdp, tp): what they settle among themselves at every step.

    What it does for several, `trainer.Alone` does for one.
    """

    mesh: DeviceMesh

    @property
    def first(self) -> bool:
        """Whether this is the one that speaks for all: it shows the bar and writes what is not shared out."""
        return dist.get_rank() == 0

    @property
    def parts(self) -> int:
        """Into how many shares a batch goes. Gradients are averaged over them."""
        return self.mesh.size() // self.mesh["tp"].size()

    @property
    def muon(self) -> type[torch.optim.Muon]:
        return SharedMuon

    def share(self, batch: Batch) -> tuple[Batch, int]:
        """Of a batch that all have, the rows that fall to this process, and how many of their targets count.

        Who has nothing to score reads a row for nothing, since the others need its share of the weights.
        """
        part = dist.get_rank() // self.mesh["tp"].size()
        tensors = (batch.inputs, batch.targets, batch.segments)
        inputs, targets, segments = (None if t is None else t[part :: self.parts] for t in tensors)
        assert inputs is not None and targets is not None
        if count := (mine := Batch(inputs, targets, segments)).scored:
            return mine, count
        return Batch(batch.inputs[:1], batch.inputs[:1]), 0

    def total(self, value: float) -> float:
        """The sum of a number over the shares of the batch; the same bits everywhere."""
        number = torch.tensor(value, dtype=torch.float64, device=self.mesh.device_type)
        dist.all_reduce(number)
        return number.item() / self.mesh["tp"].size()

    def local(self, tensor: Tensor) -> Tensor:
        """What this process has of a tensor that is shared out."""
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def wait(self) -> None:
        """Until all have come so far."""
        dist.barrier()

    def clip(self, parameters: Iterable[Tensor], largest: float) -> Tensor:
        """Scale the gradients so that their norm as a whole is at most `largest`; the norm before that, ().

        What is cut lies on another grid than what is not, and PyTorch adds up norms on one grid.
        """
        grids: dict[DeviceMesh, list[Tensor]] = {}
        for p in parameters:
            assert isinstance(p.grad, DTensor), "the model is shared out"
            grids.setdefault(p.grad.device_mesh, []).append(p)
        norms: list[Any] = [
            nn.utils.get_total_norm([p.grad for p in some if p.grad is not None]) for some in grids.values()
        ]
        norm = torch.linalg.vector_norm(torch.stack([one.full_tensor() for one in norms]))
        for some in grids.values():
            nn.utils.clip_grads_with_norm_(some, largest, norm)
        return norm

    def save(self, model: Llama, tokenizer: Tokenizer | None, folder: Path) -> None:
        """Write a checkpoint that `load` reads, into a new folder."""
        if self.first:
            describe(model.config, tokenizer, folder)
        self.write(model.state_dict(), folder / WEIGHTS)

    def write(self, tensors: dict[str, Tensor], path: Path) -> None:
        """Write named tensors into a safetensors file, which shows no trace of how they were shared out.

        Every process writes what it has; then the first puts that together, so that the disk sees each byte twice, and
        no memory ever holds the whole. Raises OSError in all of them if one cannot write.
        """
        parts = path.with_suffix(".parts")
        writer = HuggingFaceStorageWriter(str(parts), save_distributed=True, enable_consolidation=True)
        try:
            checkpoint.save(dict(tensors), storage_writer=writer)
        except CheckpointException as error:
            raise OSError(_reason(error)) from None
        if self.first:
            (parts / "model-00001-of-00001.safetensors").rename(path)
            sync(path)
            shutil.rmtree(parts)
        self.wait()

    def read(self, tensors: dict[str, Tensor], path: Path) -> None:
        """Fill named tensors from a safetensors file: each process reads its shares alone, whoever wrote them.

        Raises OSError in all processes if one of them cannot read.
        """
        try:
            checkpoint.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(path.parent)))
        except CheckpointException as error:
            raise OSError(_reason(error)) from None


def _reason(error: CheckpointException) -> str:
    """What went wrong, in the words of the first process to which it happened."""
    return str(next(iter(error.failures.values()))[0]).partition("\n")[0]


class SharedMuon(torch.optim.Muon):
    """Muon for matrices that are shared out. To make a step orthogonal takes the whole matrix: it is gathered, every
    process does all of that work, and keeps its share. The momentum stays shared out."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p.data))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                whole = nn.Parameter(torch.zeros(p.shape, dtype=p.dtype, device=p.device))
                whole.grad = p.grad.lerp(momentum, group["momentum"]).full_tensor()
                kept = {name: group[name] for name in ("lr", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")}
                torch.optim.Muon([whole], weight_decay=0, momentum=0, nesterov=False, **kept).step()
                everywhere = DTensor.from_local(whole.data, p.device_mesh, [Replicate()] * p.device_mesh.ndim)
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(everywhere.redistribute(placements=p.placements))
