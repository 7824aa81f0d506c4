"""The plan (chapter 16): what a training run will take, before anything is bought or begun.

Memory is counted tensor by tensor, as this package's trainer holds them; time is arithmetic over the share of a
device's peak that is reached. Numbers only: a model of 405 billion parameters is planned on a laptop.
Units: bytes, seconds, FLOP; 1 GB is 10⁹ bytes. A card sold as one of 80 GB has 80·2³⁰: the difference, 7 %, is left to
the driver, to libraries and to gaps between tensors.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from minillama.config import ModelConfig


@dataclass(frozen=True)
class Device:
    """Peak FLOP/s of dense matrix products in bf16 and in fp32, bytes of memory, and watts."""

    name: str
    half: float
    single: float
    memory: float
    watts: float


# NVIDIA's data sheets, SXM modules and dense products; fp32 is that without TF32. The laptop is eight cores of 3 GHz,
# each with 32 FLOP a cycle (AVX2), and no units for bf16.
DEVICES = {
    "laptop": Device("laptop", 0.77e12, 0.77e12, 16e9, 45),
    "rtx4090": Device("RTX 4090", 165e12, 83e12, 24e9, 450),
    "a100": Device("A100-80GB", 312e12, 19.5e12, 80e9, 400),
    "h100": Device("H100-80GB", 989e12, 67e12, 80e9, 700),
    "h200": Device("H200", 989e12, 67e12, 141e9, 700),
}

# L(N, D) = E + A / N^α + B / D^β, the loss of N parameters after D tokens: (A, B, α, β), without E, which decides
# nothing here. Hoffmann et al. 2022 ("Chinchilla"), equation 10, disagrees with the 20 tokens a parameter of its own
# two other approaches; Besiroglu et al. 2024 ("Chinchilla Scaling: A Replication Attempt") fit the same data again.
LAWS = {"Hoffmann": (406.4, 410.7, 0.34, 0.28), "Besiroglu": (482.01, 2085.43, 0.3478, 0.3658)}
ROWS, MANY = 512, 2**24  # of scores: a chunk in loss.py, and where trainer.py begins to use chunks
LONGEST = 8192  # tokens: what the published models of longer contexts are trained on for nearly all of the time


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is to be trained, how, and on what. Raises ValueError for what cannot be.

    dp, fsdp, tp: devices that share the data, the data and the weights, each matrix; they multiply.
    micro_batch: sequences of `context` tokens that a group of tp devices computes at once.
    batch: tokens in a step, over all devices; where it is more than they compute at once, gradients are added up.
    precision: "float32", or "bfloat16" for products (weights, gradients and optimizer stay in fp32).
    checkpointing: only the input of each block is kept for the backward pass, which computes the rest again.
    utilisation: the share of the device's peak that is reached. tokens: of the whole run.
    pue: what the building draws, for each watt of its devices (1.1: Touvron et al. 2023a, section 6).
    """

    config: ModelConfig
    device: Device = DEVICES["a100"]
    dp: int = 1
    fsdp: int = 1
    tp: int = 1
    micro_batch: int = 1
    context: int = None  # type: ignore[assignment]  # never None after construction
    batch: int = None  # type: ignore[assignment]
    tokens: int = None  # type: ignore[assignment]
    precision: str = "bfloat16"
    optimizer: str = "adamw"
    checkpointing: bool = False
    utilisation: float = 0.4
    pue: float = 1.1

    def __post_init__(self) -> None:
        fill = {"context": min(self.config.max_seq_len, LONGEST), "tokens": optimal_tokens(self.config.n_params())}
        for name, value in fill.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.batch is None:
            object.__setattr__(self, "batch", self.at_once)
        for name in ("dp", "fsdp", "tp", "micro_batch", "context", "batch", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1.")
        for name, number, low, high in (
            ("utilisation", self.utilisation, 0, 1),
            ("pue", self.pue, 0.999, 100),
            ("the device's memory in GB", self.device.memory / 1e9, 0, 1e9),
        ):
            if not low < number <= high:
                raise ValueError(f"{name} is {number:g}, expected above {low:g} and at most {high:g}.")
        for name, known in (("precision", ("float32", "bfloat16")), ("optimizer", ("adamw", "muon"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected {known[0]!r} or {known[1]!r}.")
        for name in ("n_kv_heads", "ffn_dim"):
            if getattr(self.config, name) % self.tp:
                raise ValueError(f"tp is {self.tp} and {name} {getattr(self.config, name)}: expected a divisor of it.")
        if self.context > self.config.max_seq_len:
            raise ValueError(f"context is {self.context}, expected at most {self.config.max_seq_len}, the model's.")
        if self.batch % self.at_once:
            raise ValueError(
                f"batch is {self.batch} tokens, expected a multiple of {self.at_once}, of what {self.dp * self.fsdp} "
                f"groups compute at once with {self.micro_batch} sequences of {self.context} each."
            )

    @property
    def devices(self) -> int:
        return self.dp * self.fsdp * self.tp

    @property
    def at_once(self) -> int:
        """Tokens that all devices together compute before gradients are added up again."""
        return self.dp * self.fsdp * self.micro_batch * self.context

    @property
    def passes(self) -> int:
        """Forward and backward passes in a step."""
        return self.batch // self.at_once

    @property
    def width(self) -> int:
        """Bytes of a number in a matrix product."""
        return 2 if self.precision == "bfloat16" else 4


@dataclass(frozen=True)
class Memory:
    """Bytes on one device (the fullest, where a split leaves a rest), by what they are for.

    weights, gradients, optimizer: in fp32, a share of each.
    copies: of weights, in the precision of products or brought together from other devices.
    activations: what the forward pass keeps for the backward pass.
    loss: scores of the vocabulary and their gradients.
    update: what the end of a step needs beside the gradients.
    """

    weights: int
    gradients: int
    optimizer: int
    copies: int
    activations: int
    loss: int
    update: int
    passes: int = 1

    @property
    def peak(self) -> int:
        """The most that is held at once. In a step of one pass, gradients appear as activations go."""
        start = self.activations + self.loss + (self.gradients if self.passes > 1 else 0)
        return self.weights + self.optimizer + self.copies + max(start, self.gradients + self.update)


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    kv_cache: bytes on each device for one sequence of `context` tokens, when the model writes.
    flops_per_token: 6 for each parameter that multiplies, and attention; with checkpointing a third more.
    sent: bytes that each device sends in a step, by what they carry; rings, so n devices pass on (n-1)/n of it all.
    optimal: tokens at which this size is the best use of its arithmetic, by 20 a parameter and by the fitted LAWS.
    """

    parameters: int
    memory: Memory
    fits: bool
    kv_cache: int
    flops_per_token: float
    step_seconds: float
    tokens_per_second: float
    days: float
    device_hours: float
    megawatt_hours: float
    sent: dict[str, float]
    optimal: dict[str, int]

    @property
    def tokens_per_day(self) -> float:
        return 86400 * self.tokens_per_second


def plan(run: Run) -> Plan:
    """What the run takes, on each device and in all."""
    config, memory = run.config, memory_of(run)
    flops = config.flops_per_token(run.context, training=True) * (4 / 3 if run.checkpointing else 1)
    peak = run.device.half if run.precision == "bfloat16" else run.device.single
    per_second = run.devices * peak * run.utilisation / flops
    hours = run.tokens / per_second / 3600 * run.devices
    return Plan(
        parameters=config.n_params(),
        memory=memory,
        fits=memory.peak <= run.device.memory,
        kv_cache=config.kv_cache_bytes(1, run.context, run.precision) // run.tp,
        flops_per_token=flops,
        step_seconds=run.batch / per_second,
        tokens_per_second=per_second,
        days=run.tokens / per_second / 86400,
        device_hours=hours,
        megawatt_hours=hours * run.device.watts * run.pue / 1e6,
        sent=sent(run),
        optimal={law: optimal_tokens(config.n_params(), law) for law in ("20 a parameter", *LAWS)},
    )


def optimal_tokens(parameters: int, law: str = "20 a parameter") -> int:
    """Tokens D after which no other size has a lower loss for the arithmetic 6·N·D that N parameters have had.

    Along 6·N·D = constant the loss is lowest where α·A / N^α = β·B / D^β.
    """
    if law not in LAWS:
        return 20 * parameters  # Hoffmann et al. 2022, table 3: nearly the same at every size
    a, b, alpha, beta = LAWS[law]
    return round((beta * b * parameters**alpha / (alpha * a)) ** (1 / beta))


def matrices(config: ModelConfig, tp: int) -> list[tuple[int, int, int]]:
    """The weights of a block on one of tp devices: how many of (rows, columns), the norms last."""
    dim, q, kv = config.dim, config.n_heads * config.head_dim // tp, config.n_kv_heads * config.head_dim // tp
    ffn = config.ffn_dim // tp
    return [(1, q, dim), (2, kv, dim), (1, dim, q), (2, ffn, dim), (1, dim, ffn), (2, dim, 1)]


def memory_of(run: Run) -> Memory:
    """Bytes on one device, by part."""
    c = run.config

    def shares(shapes: list[tuple[int, int, int]]) -> int:  # rows are dealt out; the first device has the most
        return sum(n * -(-rows // run.fsdp) * columns for n, rows, columns in shapes)

    hidden = c.n_layers * shares(matrices(c, run.tp)[:-1])
    others = shares([(1 if c.tie_embeddings else 2, c.vocab_size, c.dim), (2 * c.n_layers + 1, c.dim, 1)])
    weights = 4 * (hidden + others)
    return Memory(
        weights=weights,
        gradients=weights,
        optimizer=(4 if run.optimizer == "muon" else 8) * hidden + 8 * others,
        copies=copies(run),
        activations=activations(run),
        loss=loss(run),
        update=update(run),
        passes=run.passes,
    )


def copies(run: Run) -> int:
    """Weights and gradients that are there a second time.

    Alone: all matrices in bf16. Among several devices: of two blocks the weights, whole and in the precision of
    products (one computes, the next arrives), of one the gradients, and of the tables at both ends both.
    """
    c = run.config
    block = sum(n * rows * columns for n, rows, columns in matrices(c, run.tp))
    if run.devices == 1:
        return 2 * (c.n_layers * (block - 2 * c.dim) + c.vocab_size * c.dim) if run.width == 2 else 0
    return (2 * run.width + 4) * block + 8 * (1 if c.tie_embeddings else 2) * c.vocab_size * c.dim


def activations(run: Run) -> int:
    """What the forward pass keeps for the backward pass: what each product, norm and gate was computed from.

    In fp32 a token leaves in a block 6·dim + 4·H·D + 4·ffn_dim numbers: for each norm its input, the normalized vector
    and its output; queries, keys and values (repeated for every query head), and what attention makes of them; gate,
    its SiLU, up, and their product. In bf16 what lies between products takes half; norms keep fp32, and every matrix
    that reads a norm's output has a bf16 copy of it. The T×T matrix of all pairs is nowhere. tp divides all but norms.
    """
    c, tokens, w = run.config, run.micro_batch * run.context, run.width
    norm, copy = (12 * c.dim + 4, 0) if w == 4 else (8 * c.dim + 4, 2 * c.dim)
    inside = (4 * c.n_heads * c.head_dim + 4 * c.ffn_dim) * w + 4 * c.n_heads
    block = tokens * (2 * norm + 5 * copy + inside // run.tp) + 8 * c.head_dim * run.context
    ends = tokens * (norm + copy + 8)
    if run.checkpointing:
        return ends + block + c.n_layers * tokens * 4 * c.dim
    return ends + c.n_layers * block


def loss(run: Run) -> int:
    """Scores of every token of the vocabulary, their log-softmax, and the gradients of both; of the four three at once.

    Many scores are made in chunks of rows, where all four meet, and with each the gradients of the output head and of
    what it reads, which are there twice when they are handed on (among several devices, `copies` has the head's).
    """
    c, tokens = run.config, run.micro_batch * run.context
    if tokens * c.vocab_size <= MANY:
        return 12 * tokens * c.vocab_size
    gradients = 4 * (c.vocab_size + tokens) * c.dim
    again = gradients if run.devices == 1 else 4 * tokens * c.dim
    return gradients + max(again, 16 * min(ROWS, tokens) * c.vocab_size)


def update(run: Run) -> int:
    """The second gradient of a table that is read at both ends, or what Muon needs for the largest matrix: the step in
    fp32 and its powers in bf16; where it is shared out, the matrix and its gradient as a whole too."""
    c = run.config
    table = 4 * c.vocab_size * c.dim if c.tie_embeddings else 0
    matrix = c.dim * max(c.ffn_dim, c.n_heads * c.head_dim) if run.optimizer == "muon" else 0
    return max(table, matrix * (12 if run.devices == 1 else 24))


def sent(run: Run) -> dict[str, float]:
    """Bytes that a device sends in a step, in rings: to gather or to scatter n bytes among f takes (f-1)/f of n, to add
    them up everywhere twice that. Blocks are gathered in both passes, tables once."""
    c = run.config
    tables = (1 if c.tie_embeddings else 2) * c.vocab_size * c.dim
    blocks = c.n_layers * sum(n * rows * columns for n, rows, columns in matrices(c, run.tp))
    others, all_others, beside = ((n - 1) / n for n in (run.fsdp, run.dp, run.tp))
    each = run.micro_batch * run.context * c.dim * run.width
    sums = c.n_layers * (6 if run.checkpointing else 4)  # after attention and feed-forward, there and back
    return {
        "weights": run.passes * others * (2 * run.width * blocks + 4 * tables),
        "gradients": run.passes * 4 * (blocks + tables) * (others + 2 * all_others / run.fsdp),
        "activations": run.passes * sums * 2 * beside * each,
    }


def fitting(run: Run) -> Run | None:
    """The run itself if it fits, or the nearest that does; None if none was found.

    Each is tried on top of those before: fewer sequences at once, checkpointing, fsdp for all that was dp, tp up to 8
    of the same devices, a context so short that all but the shares fits, and up to 1024 times the devices.
    """
    return next((tried for tried in _changes(run) if memory_of(tried).peak <= tried.device.memory), None)


def _changes(run: Run) -> Iterator[Run]:
    def changed(**fields: int | bool) -> Run:
        new = dataclasses.replace(run, **{"batch": None, **fields})  # type: ignore[arg-type]
        return dataclasses.replace(new, batch=new.at_once * max(1, run.batch // new.at_once))

    yield run
    while run.micro_batch > 1:
        yield (run := changed(micro_batch=run.micro_batch // 2))
    yield (run := changed(checkpointing=True))
    yield (run := changed(dp=1, fsdp=run.dp * run.fsdp))
    heads = math.gcd(run.config.n_kv_heads, run.config.ffn_dim)
    while run.tp < 8 and run.fsdp % 2 == 0 and heads % (2 * run.tp) == 0:
        yield (run := changed(fsdp=run.fsdp // 2, tp=2 * run.tp))
    while run.context > 256 and (m := memory_of(run)).copies + m.activations + m.loss > run.device.memory:
        yield (run := changed(context=run.context // 2))
    for _ in range(10):
        yield (run := changed(fsdp=2 * run.fsdp))
