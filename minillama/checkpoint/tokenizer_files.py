"""Other people's tokenizer files: SentencePiece or tiktoken as `tokenizer.model`, and Hugging Face's `tokenizer.json`.

The last two are turned into the metadata that a GGUF file would have, from which our tokenizers are made. Their chat
templates are programs and are not run.
"""

import base64
import binascii
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from minillama.checkpoint.files import read_json
from minillama.tokenizer import (
    BYTE,
    BYTE_OF,
    CONTROL,
    LLAMA3_WORDS,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    SentencePieceTokenizer,
    Tokenizer,
    tokenizer_from_gguf,
)  # fmt: skip

SPELLED = {byte: letter for letter, byte in BYTE_OF.items()}  # GPT-2's visible character of each byte
# Llama 3's control tokens, which its tokenizer.model does not list: the 256 ids after the vocabulary. Source: the
# tokenizers of the Llama 3 and 3.1 releases.
LLAMA3_CONTROL = {
    0: "<|begin_of_text|>", 1: "<|end_of_text|>", 4: "<|finetune_right_pad_id|>", 6: "<|start_header_id|>",
    7: "<|end_header_id|>", 8: "<|eom_id|>", 9: "<|eot_id|>", 10: "<|python_tag|>",
}  # fmt: skip

MAX_LIBRARY_BYTES = 2**25  # of a tokenizer.json, Llama 3's has half as many
MAX_TIKTOKEN_BYTES, MAX_TOKEN_BYTES = 2**23, 256  # four times Llama 3's file, and twice its longest token
MAX_TEMPLATE_BYTES = 2**20


def open_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder, or None if there is none. Raises ValueError for one that is damaged or not LLaMA's."""
    model, library = folder / "tokenizer.model", folder / "tokenizer.json"
    try:
        if model.exists() and not _is_tiktoken(model):
            tokenizer: Tokenizer = SentencePieceTokenizer(model, template=_template(folder))
        elif model.exists() or library.exists():
            fields = _from_tiktoken(model) if model.exists() else _from_library(library)
            if template := _template(folder):
                fields["tokenizer.chat_template"] = template
            tokenizer = tokenizer_from_gguf(fields)
        else:
            return None
        # A model may have several ways to end.
        tokenizer.stop_ids |= {i for i in _numbers(folder, "eos_token_id") if i < tokenizer.vocab_size}
        return tokenizer
    except OSError as error:
        raise ValueError(f"cannot read {error.filename}: {error.strerror}.") from None
    except ValueError as error:
        raise ValueError(f"the tokenizer in {folder} cannot be used: {str(error).rstrip('.')}.") from None


def _is_tiktoken(path: Path) -> bool:
    """Lines of "base64 rank"; SentencePiece's file begins with a byte that is no letter."""
    with open(path, "rb") as file:
        line = file.readline(400)
    word, _, rank = line.strip().partition(b" ")
    try:
        return rank.isdigit() and bool(base64.b64decode(word, validate=True))
    except binascii.Error:
        return False


def _from_tiktoken(path: Path) -> dict[str, Any]:
    """Llama 3's file: each token's bytes with its rank, which is its id and says how early it was learned."""
    if (size := path.stat().st_size) > MAX_TIKTOKEN_BYTES:
        raise ValueError(f"tokenizer.model has {size} bytes, expected {MAX_TIKTOKEN_BYTES} at most")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines()):
        word, _, rank = line.partition(b" ")
        try:
            token = base64.b64decode(word, validate=True)
        except binascii.Error:
            token = b""
        if not 0 < len(token) <= MAX_TOKEN_BYTES or rank != b"%d" % number or token in ranks:
            expected = f"a new token of {MAX_TOKEN_BYTES} bytes at most in base64 and the rank {number}"
            raise ValueError(f"line {number + 1} is {line!r:.60}, expected {expected}")
        ranks[token] = number
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(f"it has no token for the byte {missing[0]}")
    merges = []
    for token, place in ranks.items():
        if len(token) > 1:
            left, right = _last_merge(token, place, ranks)
            merges.append(f"{_spell(left)} {_spell(right)}")
    plain = [_spell(token) for token in ranks]
    reserved = iter(range(256))
    control = [LLAMA3_CONTROL.get(i) or f"<|reserved_special_token_{next(reserved)}|>" for i in range(256)]
    return _gguf(
        model="gpt2", pre="llama-bpe", tokens=plain + control, merges=merges, bos_token_id=len(plain),
        token_type=[NORMAL] * len(plain) + [CONTROL] * 256, eos_token_id=len(plain) + 1, add_bos_token=True,
    )  # fmt: skip


def _last_merge(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens from which a token was made: what is left after all merges that were learned before it."""
    parts = [token[i : i + 1] for i in range(len(token))]
    learned = [ranks.get(a + b, rank) for a, b in pairwise(parts)]  # when each pair of neighbours was
    while len(parts) > 2:
        if (earliest := min(learned)) >= rank:
            raise ValueError(f"the token {token!r:.60} cannot be made of two that were learned before it")
        i = learned.index(earliest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        near = slice(max(i - 1, 0), i + 2)  # only the neighbours of the new part have new pairs
        learned[near] = [ranks.get(a + b, rank) for a, b in pairwise(parts[near])]
    return parts[0], parts[1]


def _spell(token: bytes) -> str:
    return "".join(SPELLED[byte] for byte in token)


def _gguf(**fields: Any) -> dict[str, Any]:
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items() if value is not None}


# ---------------------------------------------------------------------------------------------------------------------
# tokenizer.json


def _from_library(path: Path) -> dict[str, Any]:
    """The file of Hugging Face's `tokenizers`; which tokens begin and end a text is said in the files beside it."""
    file = read_json(path, MAX_LIBRARY_BYTES)
    try:
        return _fields(file, path.parent)
    except (AttributeError, IndexError, KeyError, TypeError) as error:  # somewhere in it is a value of another type
        raise ValueError(f"tokenizer.json is not built as expected: {error!r:.120}") from None


def _fields(file: dict[str, Any], folder: Path) -> dict[str, Any]:
    model = file.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise ValueError("tokenizer.json holds no byte-pair encoding, the kind that LLaMA has")
    by_id = {i: token for token, i in model["vocab"].items()}
    added = {entry["id"]: entry for entry in file.get("added_tokens") or [] if isinstance(entry, dict)}
    by_id |= {i: entry["content"] for i, entry in added.items()}
    if sorted(by_id) != list(range(len(by_id))):
        raise ValueError(f"tokenizer.json has {len(by_id)} tokens, whose ids are not 0 to {len(by_id) - 1}")
    tokens = [by_id[i] for i in range(len(by_id))]
    merges = [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in model.get("merges") or []]
    if bad := [merge for merge in merges if len(merge) != 2 or not all(isinstance(part, str) for part in merge)]:
        raise ValueError(f"the merge {bad[0]!r:.60} in tokenizer.json is not two tokens")
    special = {i for i, entry in added.items() if entry.get("special")}
    types = [CONTROL if i in special else USER_DEFINED if i in added else NORMAL for i in range(len(tokens))]
    ends = _ends(folder, tokens)
    if not model.get("byte_fallback"):
        return _gguf(model="gpt2", pre=_pre(file), tokens=tokens, token_type=types, add_bos_token=_adds_bos(file),
                     merges=[" ".join(merge) for merge in merges], **ends)  # fmt: skip
    learned: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        learned.setdefault("".join(merge), rank)
    for i, token in enumerate(tokens):
        if types[i] == NORMAL and len(token) == 6 and token.startswith("<0x"):
            types[i] = BYTE
    unknown = model.get("unk_token")
    if unknown in tokens:
        types[tokens.index(unknown)] = UNKNOWN
        ends["unknown_token_id"] = tokens.index(unknown)
    scores = [-float(learned.get(token, len(merges))) for token in tokens]  # the highest is joined first
    return _gguf(model="llama", tokens=tokens, token_type=types, scores=scores, add_space_prefix=_prefixes(file),
                 **ends)  # fmt: skip


def _ends(folder: Path, tokens: list[str]) -> dict[str, int]:
    """The ids that begin and end a text, from the files that may say so."""
    ids = {}
    for name in ("bos", "eos", "pad"):
        for settings in _settings(folder, "tokenizer_config.json", "special_tokens_map.json"):
            token = settings.get(f"{name}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if token in tokens:
                ids[f"{'padding' if name == 'pad' else name}_token_id"] = tokens.index(token)
                break
        else:  # some name the ids only
            numbers = _numbers(folder, f"{name}_token_id")
            if numbers and numbers[0] < len(tokens):
                ids[f"{'padding' if name == 'pad' else name}_token_id"] = numbers[0]
    return ids


def _numbers(folder: Path, key: str) -> list[int]:
    """An id, or several, from generation_config.json or else config.json."""
    for settings in _settings(folder, "generation_config.json", "config.json"):
        found = settings.get(key)
        found = found if isinstance(found, list) else [found]
        if found and all(type(i) is int and i >= 0 for i in found):
            return found
    return []


def _template(folder: Path) -> str | None:
    """The chat template, from its own file or, in earlier releases, from among the tokenizer's settings."""
    path = folder / "chat_template.jinja"
    if path.exists():
        if (size := path.stat().st_size) > MAX_TEMPLATE_BYTES:
            raise ValueError(f"{path.name} has {size} bytes, expected {MAX_TEMPLATE_BYTES} at most")
        return path.read_text(encoding="utf-8")
    for settings in _settings(folder, "tokenizer_config.json"):
        several = settings.get("chat_template")
        for entry in several if isinstance(several, list) else [{"name": "default", "template": several}]:
            if isinstance(entry, dict) and entry.get("name") == "default" and isinstance(entry.get("template"), str):
                return entry["template"]
    return None


def _settings(folder: Path, *names: str) -> Iterator[dict[str, Any]]:
    """What is in those of these files that are there."""
    return (read_json(folder / name) for name in names if (folder / name).exists())


def _prefixes(file: dict[str, Any]) -> bool:
    """Whether it puts a space before a text, in either of two ways."""
    normalizer, cut = file.get("normalizer") or {}, file.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    return any(step.get("type") == "Prepend" for step in steps) or cut.get("prepend_scheme", "never") != "never"


def _pre(file: dict[str, Any]) -> str:
    """GGUF's name for the way in which a tokenizer.json cuts text into words, if it is one of ours."""
    cut = file.get("pre_tokenizer") or {}
    steps = cut.get("pretokenizers", [cut]) if isinstance(cut, dict) else []
    kinds = [step.get("type") for step in steps if isinstance(step, dict)]
    if kinds == ["Split", "ByteLevel"] and steps[0].get("pattern") == {"Regex": LLAMA3_WORDS}:
        return "llama-bpe"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    raise ValueError(f"tokenizer.json cuts text into words by {kinds!r:.120}, expected the way of Llama 3 or of SmolLM")


def _adds_bos(file: dict[str, Any]) -> bool:
    """Whether its template for a single text begins with a control token."""
    steps = file.get("post_processor") or {}
    for step in steps.get("processors", [steps]):
        if step.get("type") == "TemplateProcessing":
            return bool(step.get("single")) and "SpecialToken" in step["single"][0]
    return False
