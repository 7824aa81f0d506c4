"""Training (chapter 09): predict, measure the surprise, nudge every weight, many thousand times; and lose nothing.

All that a run has become after a step is in its newest checkpoint: weights, optimizers, random state, the number of
the step. What comes next follows from these alone, so a run that is killed and resumed ends with the same bits as one
that is not.
"""

import contextlib
import json
import math
import os
import pickle
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from minillama.checkpoint import save
from minillama.checkpoint.files import sync
from minillama.checkpoint.native import WEIGHTS, open_native
from minillama.data import Batch, Validation
from minillama.loss import IGNORE, cross_entropy, head_cross_entropy
from minillama.model import Llama
from minillama.tokenizer import Tokenizer

if TYPE_CHECKING:  # what it imports takes seconds, and only several processes need it
    from minillama.parallel import Team

STATE, OPTIMIZER = "trainer.pt", "optimizer.safetensors"

MANY = 2**24  # logits that a batch may have before they are made a few rows at a time: fewer are quicker as a whole


@dataclass(frozen=True)
class TrainSettings:
    """How to train. Raises ValueError for a setting that cannot work.

    steps, warmup: optimizer steps in all, and those during which the learning rate rises from zero.
    learning_rate, final_rate: its peak, and the share of the peak at which the cosine ends.
    optimizer: "muon" (for the blocks' matrices; AdamW for the rest) or "adamw" (for everything).
    clip: the largest norm of the gradient as a whole. accumulate: batches whose gradients are added up for one step.
    precision: "float32", or "bfloat16" for matrix products in bf16 (weights and sums stay in fp32).
    checkpointing: keep each block's input only for the way back; see `Llama`.
    validate_every, save_every: in steps.
    """

    steps: int = 1000
    learning_rate: float = 4e-3
    final_rate: float = 0.0
    warmup: int = 50
    weight_decay: float = 0.01
    optimizer: str = "muon"
    clip: float = 1.0
    accumulate: int = 1
    precision: str = "float32"
    checkpointing: bool = False
    validate_every: int = 100
    save_every: int = 100

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "validate_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1.")
        if not 0 <= self.warmup <= self.steps:
            raise ValueError(f"warmup is {self.warmup}, expected 0 to {self.steps}, the number of steps.")
        for name, good, expected in (
            ("learning_rate", 0 < self.learning_rate <= 1, "above 0, and at most 1"),
            ("final_rate", 0 <= self.final_rate <= 1, "from 0 to 1"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "from 0 on"),
            ("clip", self.clip > 0, "above 0"),
        ):
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a number {expected}.")
        for name, value, known in (
            ("optimizer", self.optimizer, ("muon", "adamw")),
            ("precision", self.precision, ("float32", "bfloat16")),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}, expected {known[0]!r} or {known[1]!r}.")


def rate_at(step: int, settings: TrainSettings) -> float:
    """The share of the peak learning rate at a step: up in a straight line, then down along half a cosine."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.final_rate + (1 - settings.final_rate) * (1 + math.cos(math.pi * progress)) / 2


def make_optimizers(
    model: nn.Module, settings: TrainSettings, muon: type[torch.optim.Muon] = torch.optim.Muon
) -> list[torch.optim.Optimizer]:
    """One or two optimizers that share the model's parameters between them, as far as these are to be trained.

    Muon makes each step of a matrix orthogonal, so that no direction is left behind; it is for matrices between hidden
    layers. Embeddings, output and norms keep AdamW. Weight decay is for matrices, not for norms.
    Sources: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization"; Jordan et al. 2024, "Muon".
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    hidden = [p for name, p in trained.items() if p.dim() == 2 and "blocks." in name]
    tables = [p for name, p in trained.items() if p.dim() == 2 and "blocks." not in name]
    vectors = [p for p in trained.values() if p.dim() < 2]
    rate, decay = settings.learning_rate, settings.weight_decay
    groups = [{"params": tables, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    if settings.optimizer == "adamw":
        groups[0]["params"] = hidden + tables
    adamw = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)
    if settings.optimizer == "adamw" or not hidden:
        return [adamw]
    # Scaled so that a step has the size that AdamW's would have: one learning rate then suits both.
    return [muon(hidden, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"), adamw]


def batch_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The mean loss of a batch in nats per scored token, ()."""
    device = next(model.parameters()).device
    packed: dict[str, Any] = {} if batch.segments is None else {"segments": batch.segments.to(device)}
    inputs, targets = batch.inputs.to(device), batch.targets.to(device)
    if not isinstance(model, Llama):
        return cross_entropy(model(inputs, **packed), targets)
    x = model.hidden(inputs, **packed)
    if 0 < 2 * batch.scored < targets.numel():  # of a prompt, which is not scored, no logits are made
        x, targets = x[targets != IGNORE], targets[targets != IGNORE]
    if targets.numel() * model.config.vocab_size > MANY:
        head = model.embedding if model.output is None else model.output
        return head_cross_entropy(x, head.weight, targets)
    return cross_entropy(model.scores(x), targets)


class Alone:
    """A run of one process: what `parallel.Team` does for one of several."""

    first, parts, muon = True, 1, torch.optim.Muon
    clip, save = staticmethod(nn.utils.clip_grad_norm_), staticmethod(save)

    def share(self, batch: Batch) -> tuple[Batch, int]:
        return batch, batch.scored

    def total(self, value: float) -> float:
        return value

    def local(self, tensor: Tensor) -> Tensor:
        return tensor

    def wait(self) -> None:
        pass

    def write(self, tensors: dict[str, Tensor], path: Path) -> None:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        sync(path)

    def read(self, tensors: dict[str, Tensor], path: Path) -> None:
        with safe_open(path, "pt") as file:
            for name, tensor in tensors.items():
                tensor.copy_(file.get_tensor(name))


ALONE = Alone()


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Batch], team: "Alone | Team" = ALONE) -> float:
    """The mean loss in nats per scored token over all batches, each token counted once."""
    total, count = 0.0, 0
    for batch in batches:
        part, counted = team.share(batch)
        total += batch_loss(model, part).item() * counted
        count += batch.scored
    return team.total(total) / count


@dataclass
class Trainer:
    """A run in a folder: `step-N/` is a checkpoint, `metrics.jsonl` has a line for each step.

    `batches(step)` gives the data. `snapshots` are the steps whose checkpoints are kept; of the others only the newest
    two are. `on_step(record)` is called after each step, for a live curve. After `run` the model is trained, and
    `records` holds what `metrics.jsonl` holds: step, tokens, loss, grad_norm, rate, seconds, at times validation.
    `team` is what `parallel.distribute` returned for a model that is shared out among processes: each gives all of
    `batches`, and computes its share. A checkpoint does not depend on how many they are.
    """

    model: Llama
    tokenizer: Tokenizer | None
    batches: Callable[[int], Batch]
    settings: TrainSettings
    folder: Path
    validation: Validation | None = None
    snapshots: tuple[int, ...] = ()
    on_step: Callable[[dict[str, Any]], None] | None = None
    team: "Alone | Team" = ALONE

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        self.optimizers = make_optimizers(self.model, self.settings, self.team.muon)
        self.device = next(self.model.parameters()).device
        for module in self.model.modules():
            if isinstance(module, Llama):
                module.checkpointing = self.settings.checkpointing
        self.step = 0
        self.records: list[dict[str, Any]] = []

    def run(self) -> None:
        """Train to the last step, going on from the newest checkpoint in the folder if there is one.

        Ctrl-C lets the step that is under way finish, writes a checkpoint and raises KeyboardInterrupt.
        Raises ValueError if the folder holds a run with other settings, OSError when it cannot be written, and
        FloatingPointError when the loss or its gradient is no longer a number; the last checkpoint is still good then.
        """
        first = self.team.first
        self.folder.mkdir(parents=True, exist_ok=True)
        self._resume()
        self.model.train()
        bar = tqdm(total=self.settings.steps, initial=self.step, unit="step", dynamic_ncols=True, disable=not first)
        with _held_back_interrupts() as interrupted, bar:
            while self.step < self.settings.steps:
                record = self._one_step()
                self.records.append(record)
                if first:
                    with self._explained(), open(self.folder / "metrics.jsonl", "a") as metrics:
                        print(json.dumps(record), file=metrics)
                bar.set_postfix(self._progress(), refresh=False)
                bar.update()
                if self.on_step:
                    self.on_step(record)
                stop = self.team.total(interrupted.is_set()) > 0  # at the same step everywhere
                last = stop or self.step == self.settings.steps
                if last or self.step % self.settings.save_every == 0 or self.step in self.snapshots:
                    with self._explained():
                        self._save()
                if stop:
                    raise KeyboardInterrupt(f"stopped after step {self.step}; the same command goes on from here")
        self.model.eval()

    def _one_step(self) -> dict[str, Any]:
        started = time.perf_counter()
        rate = rate_at(self.step, self.settings)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * self.settings.learning_rate
        first = self.step * self.settings.accumulate
        parts = [self.batches(first + i) for i in range(self.settings.accumulate)]
        scored = sum(part.scored for part in parts)
        # Each part counts by its scored tokens, so that the sum is the gradient of one big batch.
        loss = self.team.total(math.fsum(self._backward(part, scored) for part in parts))
        norm = self.team.clip(self.model.parameters(), self.settings.clip).item()
        if not math.isfinite(loss + norm):
            raise self._diverged(f"the loss is {loss} and the norm of its gradient {norm}")
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        record: dict[str, Any] = {"step": self.step, "tokens": scored, "loss": loss, "grad_norm": norm, "rate": rate}
        if self.validation and (self.step % self.settings.validate_every == 0 or self.step == self.settings.steps):
            record["validation"] = mean_loss(self.model, self.validation.batches, self.team)
        record["seconds"] = round(time.perf_counter() - started, 3)
        return record

    def _diverged(self, what: str) -> FloatingPointError:
        return FloatingPointError(
            f"after step {self.step} {what}, expected numbers: the last checkpoint in {self.folder} is still good, go "
            f"on from it with a learning rate below {self.settings.learning_rate}."
        )

    def _backward(self, batch: Batch, scored: int) -> float:
        half = self.settings.precision == "bfloat16"
        part, counted = self.team.share(batch)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            loss = batch_loss(self.model, part) * (counted / scored)
        (loss * self.team.parts).backward()  # the gradients of the parts are averaged
        return loss.item()

    def _progress(self) -> dict[str, str]:
        """What stands behind the progress bar."""
        shown = {"loss": f"{self.records[-1]['loss']:.3f}"}
        scores = [record["validation"] for record in self.records if "validation" in record]
        if scores:
            shown["validation"] = f"{scores[-1]:.4f}"
            if self.validation and self.validation.floor is not None:
                shown |= {"floor": f"{self.validation.floor:.4f}", "KL": f"{scores[-1] - self.validation.floor:.4f}"}
        return shown

    def _save(self) -> None:
        """Write the checkpoint under another name, then rename it: under its own name it is always whole."""
        if self.team.total(sum(not self.team.local(p).isfinite().all() for p in self.model.parameters())):
            raise self._diverged("a weight is infinite or no number")
        unfinished = self.folder / "unfinished"
        if self.team.first:
            sync(self.folder / "metrics.jsonl")  # a checkpoint never says more than these, even after a power cut
            for left in [unfinished, *self.folder.glob(".unfinished.*")]:  # by a run that was killed while it wrote
                shutil.rmtree(left, ignore_errors=True)
        self.team.wait()
        self._write(unfinished)
        self.team.write(self._optimizer_states(), unfinished / OPTIMIZER)
        if self.team.first:
            self._finish(unfinished)

    def _finish(self, unfinished: Path) -> None:
        state = {"step": self.step, "settings": asdict(self.settings), "random": torch.get_rng_state()}
        torch.save(state, unfinished / STATE)
        sync(unfinished / STATE)
        finished = self.folder / f"step-{self.step}"
        shutil.rmtree(finished, ignore_errors=True)
        unfinished.rename(finished)
        for later in checkpoints(self.folder):  # which could not be read
            if step_of(later) > self.step:
                shutil.rmtree(later)
        self._remove_old()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """What goes wrong when the run is written, whatever the library that writes, as one sentence."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(self.folder / "unfinished", ignore_errors=True)
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
            kept = checkpoints(self.folder)
            raise OSError(
                f"{self.folder} cannot be written at step {self.step} ({reason}): make room, or get leave to write; "
                f"the same command goes on from {kept[-1].name if kept else 'the beginning'}."
            ) from error

    def _write(self, folder: Path) -> None:
        """Write what is trained; what trains only a part of a model overrides this and the next."""
        self.team.save(self.model, self.tokenizer, folder)

    def _read(self, folder: Path) -> None:
        saved = open_native(folder)
        if saved.config != self.model.config:
            raise ValueError(
                f"{self.folder} holds a model with {saved.config}, not {self.model.config}: "
                f"go on with the same model, or choose another folder."
            )
        self.team.read(self.model.state_dict(), folder / WEIGHTS)

    def _optimizer_states(self) -> dict[str, Tensor]:
        """What the optimizers remember of each parameter; a single number as a vector (1,)."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        states = ((names[p], state) for optimizer in self.optimizers for p, state in optimizer.state.items())
        return {f"{name}.{kind}": t if t.dim() else t.view(1) for name, state in states for kind, t in state.items()}

    def _read_optimizer_states(self, path: Path) -> None:
        parameters = dict(self.model.named_parameters())
        groups = [(optimizer, group) for optimizer in self.optimizers for group in optimizer.param_groups]
        owners = {p: optimizer for optimizer, group in groups for p in group["params"]}
        with safe_open(path, "pt") as file:
            for key in file.keys():
                name, _, kind = key.rpartition(".")
                p = parameters[name]
                single = file.get_slice(key).get_shape() == [1]
                owners[p].state[p][kind] = torch.zeros((), device=self.device) if single else torch.zeros_like(p)
        self.team.read(self._optimizer_states(), path)

    def _remove_old(self) -> None:
        for old in [path for path in checkpoints(self.folder) if step_of(path) <= self.step][:-2]:
            if step_of(old) not in self.snapshots:
                shutil.rmtree(old)

    def _resume(self) -> None:
        """Take up the newest checkpoint that can be read, and cut off what `metrics.jsonl` says about later steps.

        Raises ValueError, with what is wrong with the newest, when none can be.
        """
        faults = []
        for checkpoint in reversed(checkpoints(self.folder)):
            try:
                self._take_up(checkpoint)
            except ValueError as error:
                faults.append(error)
                continue
            if faults:
                print(f"minillama: {faults[0]} Going on from {checkpoint.name}.", file=sys.stderr)
            break
        else:
            if faults:
                raise faults[0]
        self.team.wait()
        if self.team.first:
            self._remove_old()  # a run that was killed while it did so
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines()[: self.step] if path.exists() else []
        self.records = [json.loads(line) for line in lines]
        if self.team.first:
            rewritten = path.with_suffix(".new")
            rewritten.write_text("".join(line + "\n" for line in lines))
            os.replace(rewritten, path)

    def _take_up(self, checkpoint: Path) -> None:
        try:
            # weights_only: a file that would run code when it is read is refused.
            state = torch.load(checkpoint / STATE, map_location=self.device, weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"{checkpoint / STATE} cannot be read ({type(error).__name__}), expected the state of a run: "
                f"delete the folder {checkpoint.name}."
            ) from error
        for name, value in asdict(self.settings).items():
            if state["settings"].get(name, value) != value:
                raise ValueError(
                    f"{self.folder} holds a run with {name} {state['settings'][name]}, not {value}: "
                    f"go on with the same settings, or choose another folder."
                )
        try:
            self._read(checkpoint)
            self._read_optimizer_states(checkpoint / OPTIMIZER)
        except (OSError, SafetensorError, KeyError) as error:
            raise ValueError(
                f"{checkpoint} cannot be read ({type(error).__name__}), expected weights and what the optimizers "
                f"remember of them: delete the folder {checkpoint.name}."
            ) from error
        torch.set_rng_state(state["random"].cpu())
        self.step = state["step"]


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(Path(folder).glob("step-*"), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("step-"))


@contextlib.contextmanager
def _held_back_interrupts() -> Iterator[threading.Event]:
    """Ctrl-C sets an event, for whoever is in the middle of a step; a second one interrupts at once, as ever."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted  # signals only ever reach the main thread
        return
    before = signal.getsignal(signal.SIGINT)

    def hold_back(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, before)
        interrupted.set()

    signal.signal(signal.SIGINT, hold_back)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
