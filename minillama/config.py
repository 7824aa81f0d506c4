"""The shape of a LLaMA model, and what that shape costs in parameters, memory and arithmetic.

Nothing here needs PyTorch: a model of 405 billion parameters is weighed with a few multiplications.
Letters: L layers, H heads, K key/value heads, D numbers per head, B sequences in a batch, T tokens in a sequence.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "int8": 8, "int4": 4}  # of one number, by dtype name

# Far above any model yet published, and low enough that a hostile file cannot ask for a table without end.
LIMITS = {
    "dim": 2**17, "n_layers": 2**10, "n_heads": 2**11, "n_kv_heads": 2**11, "head_dim": 2**11, "ffn_dim": 2**20,
    "vocab_size": 2**22, "max_seq_len": 2**24, "norm_eps": 1.0, "rope_theta": 1e12,
}  # fmt: skip


def _check_int(name: str, value: Any, limit: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:  # True is an int in Python
        raise ValueError(f"{name} must be a whole number from 1 to {limit}, got {reprlib.repr(value)}")


def _check_float(name: str, value: Any, limit: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= limit:  # nan fails both bounds
        raise ValueError(f"{name} must be a number above 0 and at most {limit:g}, got {reprlib.repr(value)}")
    return float(value)


@dataclass(frozen=True)
class LinearScaling:
    """Divide every position by `factor` (at least 1) before it is rotated: position interpolation.

    Source: Chen et al. 2023, "Extending Context Window of Large Language Models via Positional Interpolation",
    section 2.3.
    Raises ValueError for a factor below 1 or not finite.
    """

    factor: float

    def __post_init__(self) -> None:
        _set_scaling_floats(self, "factor")


@dataclass(frozen=True)
class Llama3Scaling:
    """Slow rotations are divided by `factor`, fast ones are kept, and those in between are blended.

    A rotation that turns fewer than `low_freq_factor` times within `original_max_seq_len` tokens is slow;
    one that turns more than `high_freq_factor` times is fast.
    Source: Llama 3.1's reference code (`apply_scaling`).
    Raises ValueError for a factor below 1, or bands that are not 0 < low < high.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seq_len: int

    def __post_init__(self) -> None:
        _set_scaling_floats(self, "factor", "low_freq_factor", "high_freq_factor")
        _check_int("rope_scaling original_max_seq_len", self.original_max_seq_len, LIMITS["max_seq_len"])
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                "rope_scaling low_freq_factor must be below high_freq_factor, "
                f"got low_freq_factor={self.low_freq_factor} and high_freq_factor={self.high_freq_factor}"
            )


def _set_scaling_floats(scaling: LinearScaling | Llama3Scaling, *names: str) -> None:
    for name in names:
        object.__setattr__(scaling, name, _check_float(f"rope_scaling {name}", getattr(scaling, name), 1e6))
    if scaling.factor < 1:
        raise ValueError(f"rope_scaling factor must be at least 1 (it stretches the context), got {scaling.factor}")


SCALINGS: dict[str, type[LinearScaling] | type[Llama3Scaling]] = {"linear": LinearScaling, "llama3": Llama3Scaling}


def llama_ffn_dim(dim: int, multiple_of: int = 256, multiplier: float = 1.0) -> int:
    """Width of the feed-forward layer: two thirds of 4·dim, times `multiplier`, rounded up to `multiple_of`.

    SwiGLU has three matrices where a plain layer has two; two thirds of the width keeps the parameters equal.
    Source: Touvron et al. 2023 (LLaMA), section 2.2; the rounding and the multiplier follow Meta's reference code.
    """
    return multiple_of * math.ceil(int(multiplier * (8 * dim // 3)) / multiple_of)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that fixes a model's shape. Frozen and hashable; every field is concrete once it is made.

    Left out, `n_kv_heads` is `n_heads`, `head_dim` is dim / n_heads, and `ffn_dim` follows `llama_ffn_dim`.
    `dataclasses.replace` keeps those values: name them again when you change what they came from.
    Raises ValueError when a field is of the wrong type or out of range, or when two fields do not fit together.
    """

    dim: int  # width of the residual stream
    n_layers: int
    n_heads: int  # query heads
    n_kv_heads: int = None  # type: ignore[assignment]  # never None after construction, so users need no check
    head_dim: int = None  # type: ignore[assignment]
    ffn_dim: int = None  # type: ignore[assignment]
    vocab_size: int
    max_seq_len: int  # tokens
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: LinearScaling | Llama3Scaling | None = None
    tie_embeddings: bool = False  # the output head is the embedding table

    def __post_init__(self) -> None:
        for name in ("dim", "n_layers", "n_heads", "vocab_size", "max_seq_len"):
            _check_int(name, getattr(self, name), LIMITS[name])
        if self.head_dim is None and self.dim % self.n_heads:
            raise ValueError(
                f"dim must be a multiple of n_heads when head_dim is not given, got dim={self.dim} and "
                f"n_heads={self.n_heads}; change one of them or give head_dim"
            )
        derived = {
            "n_kv_heads": self.n_heads,
            "head_dim": self.dim // self.n_heads,
            "ffn_dim": llama_ffn_dim(self.dim),
        }
        for name, value in derived.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
            _check_int(name, getattr(self, name), LIMITS[name])
        for name in ("norm_eps", "rope_theta"):
            object.__setattr__(self, name, _check_float(name, getattr(self, name), LIMITS[name]))
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads must be a multiple of n_kv_heads, got n_heads={self.n_heads} and "
                f"n_kv_heads={self.n_kv_heads}; each key/value head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim must be even, got head_dim={self.head_dim} (dim={self.dim}, n_heads={self.n_heads}); "
                "rotary embeddings turn its numbers in pairs"
            )
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, LinearScaling | Llama3Scaling):
            got = reprlib.repr(self.rope_scaling)
            raise ValueError(f"rope_scaling must be None, a LinearScaling or a Llama3Scaling, got {got}")
        if not isinstance(self.tie_embeddings, bool):
            raise ValueError(f"tie_embeddings must be True or False, got {reprlib.repr(self.tie_embeddings)}")

    @staticmethod
    def preset(name: str) -> ModelConfig:
        """The configuration of a published model or of a toy. Raises ValueError with the nearest names."""
        if name not in PRESETS:
            near = difflib.get_close_matches(name.lower(), PRESETS, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(PRESETS)}"
            raise ValueError(f"there is no preset {reprlib.repr(name)}; {hint}")
        return PRESETS[name]

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values. `rope_scaling` is None or a dictionary whose "type" is "linear" or "llama3"."""
        fields = dataclasses.asdict(self)
        for kind, scaling in SCALINGS.items():
            if isinstance(self.rope_scaling, scaling):
                fields["rope_scaling"] = {"type": kind, **fields["rope_scaling"]}
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`. Nothing is filled in or dropped.

        Raises ValueError for an unknown key (with the nearest known one), a missing key or a wrong value.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        _check_keys("the model config", fields, names)
        fields = dict(fields)
        for name in names:
            if fields[name] is None and name != "rope_scaling":
                raise ValueError(f"{name} must be given in full in a saved config, got None")
        scaling = fields["rope_scaling"]
        if scaling is not None:
            kind = scaling.get("type") if isinstance(scaling, dict) else None
            if not isinstance(kind, str) or kind not in SCALINGS:
                expected = " or ".join(f'"{kind}"' for kind in SCALINGS)
                raise ValueError(
                    f'rope_scaling must be None or a dictionary with "type" {expected}, got {reprlib.repr(scaling)}'
                )
            names = ["type", *(field.name for field in dataclasses.fields(SCALINGS[kind]))]
            _check_keys(f'rope_scaling of type "{kind}"', scaling, names)
            fields["rope_scaling"] = SCALINGS[kind](**{name: scaling[name] for name in names[1:]})
        return cls(**fields)

    def n_params_by_part(self) -> dict[str, int]:
        """Parameters in each part; the parts sum to `n_params()`.

        embedding    vocab·dim
        attention    L · (dim·H·D + 2·dim·K·D + H·D·dim)    wq, then wk and wv, then wo
        feedforward  L · 3·dim·ffn_dim                      gate, up, down
        norms        (2L + 1) · dim                         two in each layer, one at the end
        output       dim·vocab, or 0 when it is the embedding table again
        """
        return {
            "embedding": self.vocab_size * self.dim,
            "attention": self.n_layers * 2 * self.dim * self.head_dim * (self.n_heads + self.n_kv_heads),
            "feedforward": self.n_layers * 3 * self.dim * self.ffn_dim,
            "norms": (2 * self.n_layers + 1) * self.dim,
            "output": 0 if self.tie_embeddings else self.dim * self.vocab_size,
        }

    def n_params(self) -> int:
        """All parameters; a tied embedding table counts once."""
        return sum(self.n_params_by_part().values())

    def bytes(self, dtype: str) -> int:
        """Memory of the weights: n_params · bits / 8, rounded up.

        For "int8" and "int4" these are the raw bits only: the scales that each group of quantized weights carries
        come on top (one float16 scale for 32 weights adds 0.5 bit a weight), and norms usually stay in floats.
        """
        return _bytes(self.n_params(), dtype)

    def kv_cache_bytes(self, batch: int, tokens: int, dtype: str) -> int:
        """Memory of a full key/value cache: 2 · L · B · T · K · D numbers (the 2: keys and values).

        It is the number of KV heads, K, that counts, not of query heads: that is what grouped queries are for
        (Ainslie et al. 2023, "GQA").
        """
        _check_int("batch", batch, 2**24)
        _check_int("tokens", tokens, LIMITS["max_seq_len"])
        return _bytes(2 * self.n_layers * batch * tokens * self.n_kv_heads * self.head_dim, dtype)

    def training_bytes(self, dtype: str = "float32") -> int:
        """Memory of training with AdamW, without activations: weights, gradients and two moments, 4 · bytes(dtype).

        In float32 that is 16 bytes a parameter. Mixed precision with a float32 master copy needs 16 as well:
        2 + 2 for weights and gradients in half precision, 4 + 4 + 4 for the copy and the moments
        (Rajbhandari et al. 2020, "ZeRO", section 3.1).
        """
        return 4 * self.bytes(dtype)

    def flops_per_token(self, context: int, *, training: bool = False) -> int:
        """Floating-point operations for one token that looks at `context` tokens; a multiply-add counts as 2.

        forward   2 · (parameters in matrices that multiply) + L · 4 · context · H · D
        training  3 × forward: the backward pass multiplies twice, for the inputs and for the weights

        The first term is the "2N" rule with N = attention + feed-forward + output head (tied or not); looking up an
        embedding costs nothing. The second is queries · keys and probabilities · values. Norms, rotations, softmax
        and SiLU are left out. A dense kernel over T tokens computes every pair, so context = T for each; one that
        skips the masked half computes about T / 2. Sources: Kaplan et al. 2020, section 2.1 and table 1 (without the
        output head, and half of the second term); Hoffmann et al. 2022, "Chinchilla", appendix F (every pair).
        """
        _check_int("context", context, LIMITS["max_seq_len"])
        parts = self.n_params_by_part()
        matrices = parts["attention"] + parts["feedforward"] + self.dim * self.vocab_size
        forward = 2 * matrices + self.n_layers * 4 * context * self.n_heads * self.head_dim
        return 3 * forward if training else forward


def _bytes(numbers: int, dtype: str) -> int:
    if dtype not in BITS:
        raise ValueError(f"dtype must be one of {', '.join(BITS)}, got {reprlib.repr(dtype)}")
    return (numbers * BITS[dtype] + 7) // 8  # in whole numbers: a float is exact only up to 2**53


def _check_keys(what: str, fields: Any, names: Iterable[str]) -> None:
    if not isinstance(fields, dict):
        raise ValueError(f"{what} must be a dictionary, got {reprlib.repr(fields)}")
    for key in fields:
        if key not in names:
            near = difflib.get_close_matches(str(key).lower(), names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known keys are {', '.join(names)}"
            raise ValueError(f"{what} has the unknown key {reprlib.repr(key)}; {hint}")
    missing = [name for name in names if name not in fields]
    if missing:
        raise ValueError(f"{what} lacks the key {missing[0]}; it must have {', '.join(names)}")


_LLAMA31 = Llama3Scaling(8.0, 1.0, 4.0, 8192)  # Llama 3.1's params and config: the context grows from 8k to 128k
_LLAMA32 = Llama3Scaling(32.0, 1.0, 4.0, 8192)  # Llama 3.2's

# Widths are those of the checkpoints; the comments say where to read them.
# fmt: off
_TABLE = {
    # name:        dim layers heads kv head_dim ffn  vocab  context   eps     theta    scaling  tied
    "toy":          (128, 4, 8, 4, 32, 384, 2048, 512, 1e-5, 1e5, None, True),  # the course's own
    "toy-small":    (96, 3, 6, 3, 32, 256, 2048, 512, 1e-5, 1e5, None, True),  # the course's own
    # LLaMA: Touvron et al. 2023a, table 2; eps from each checkpoint's params.json
    "llama-7b":     (4096, 32, 32, 32, 128, 11008, 32000, 2048, 1e-6, 1e4, None, False),  # 6.7B in table 2
    "llama-13b":    (5120, 40, 40, 40, 128, 13824, 32000, 2048, 1e-6, 1e4, None, False),  # 13.0B in table 2
    "llama-30b":    (6656, 60, 52, 52, 128, 17920, 32000, 2048, 1e-6, 1e4, None, False),  # "30B" is 32.5B in table 2
    "llama-65b":    (8192, 80, 64, 64, 128, 22016, 32000, 2048, 1e-5, 1e4, None, False),  # 65.2B in table 2
    # Llama 2: Touvron et al. 2023b, table 1; widths from each checkpoint's config
    "llama2-7b":    (4096, 32, 32, 32, 128, 11008, 32000, 4096, 1e-5, 1e4, None, False),
    "llama2-13b":   (5120, 40, 40, 40, 128, 13824, 32000, 4096, 1e-5, 1e4, None, False),
    "llama2-70b":   (8192, 80, 64, 8, 128, 28672, 32000, 4096, 1e-5, 1e4, None, False),  # grouped queries, 8 KV heads
    # Llama 3: Dubey et al. 2024, table 3; context and scaling from each checkpoint's config
    "llama3-8b":    (4096, 32, 32, 8, 128, 14336, 128256, 8192, 1e-5, 5e5, None, False),
    "llama3-70b":   (8192, 80, 64, 8, 128, 28672, 128256, 8192, 1e-5, 5e5, None, False),
    "llama3.1-8b":  (4096, 32, 32, 8, 128, 14336, 128256, 131072, 1e-5, 5e5, _LLAMA31, False),
    "llama3.1-70b": (8192, 80, 64, 8, 128, 28672, 128256, 131072, 1e-5, 5e5, _LLAMA31, False),
    "llama3.1-405b": (16384, 126, 128, 8, 128, 53248, 128256, 131072, 1e-5, 5e5, _LLAMA31, False),  # 8 KV heads
    # Llama 3.2: the model card and each checkpoint's config
    "llama3.2-1b":  (2048, 16, 32, 8, 64, 8192, 128256, 131072, 1e-5, 5e5, _LLAMA32, True),
    "llama3.2-3b":  (3072, 28, 24, 8, 128, 8192, 128256, 131072, 1e-5, 5e5, _LLAMA32, True),
    # TinyLlama: Zhang et al. 2024, section 2.2
    "tinyllama-1.1b": (2048, 22, 32, 4, 64, 5632, 32000, 2048, 1e-5, 1e4, None, False),
    # SmolLM2: Ben Allal et al. 2025; widths and theta from each checkpoint's config
    "smollm2-135m": (576, 30, 9, 3, 64, 1536, 49152, 8192, 1e-5, 1e5, None, True),
    "smollm2-360m": (960, 32, 15, 5, 64, 2560, 49152, 8192, 1e-5, 1e5, None, True),
    "smollm2-1.7b": (2048, 24, 32, 32, 64, 8192, 49152, 8192, 1e-5, 1.3e5, None, True),
}
# fmt: on
_FIELDS = [field.name for field in dataclasses.fields(ModelConfig)]
PRESETS = {name: ModelConfig(**dict(zip(_FIELDS, row, strict=True))) for name, row in _TABLE.items()}  # type: ignore[arg-type]
