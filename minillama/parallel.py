"""Many processes (chapter 16): each holds a part of the model, of the data or of both, and together they take the step
that one would have taken alone.

Three ways, which multiply. dp: every process has the whole model and its own rows of the batch; gradients are averaged.
fsdp: the same, but each keeps only its share of every weight, gradient and optimizer state, and a block's weights are
brought together while it computes. tp: the matrices of a block are cut, and each process computes its own heads.
"""

import os
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from minillama.config import ModelConfig
from minillama.model import Llama

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
            if name not in known or name in found or not (count.isdecimal() and int(count) > 0):
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
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
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


def distribute(model: Llama, layout: Layout, half: bool = False) -> DeviceMesh:
    """Share a model out among the processes, in place; its parameters become DTensors with their names and shapes.

    Every process gives the same weights. `half`: weights are sent to where they are needed in bf16, and a block's
    matrices are never there in fp32 as a whole. Optimizers are made afterwards. dp is fsdp with one share: the same
    code, in which each process keeps all. Returns the grid. Raises ValueError if the layout does not suit the model.
    Source: Zhao et al. 2023, "PyTorch FSDP".
    """
    layout.check(model.config)
    mesh = make_mesh(layout, model.norm.weight.device.type)
    if layout.tp > 1:
        cut(model, mesh["tp"])
    data = mesh["dp", "fsdp"] if layout.dp > 1 else mesh["fsdp"]
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=data, mp_policy=policy if half else MixedPrecisionPolicy())
    fully_shard(model, mesh=data)
    return mesh


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
    for block in model.blocks:
        block.attention.n_heads //= mesh.size()
        block.attention.n_kv_heads //= mesh.size()
