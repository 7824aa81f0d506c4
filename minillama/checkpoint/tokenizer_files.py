"""Other people's tokenizer files: SentencePiece or tiktoken as `tokenizer.model`, and Hugging Face's `tokenizer.json`.

The last two are turned into the metadata that a GGUF file would have, from which our tokenizers are made. Their chat
templates are programs and are not run.
"""

import base64
import binascii
import json
from pathlib import Path
from typing import Any

from minillama.tokenizer import (
    BYTE,
    BYTE_OF,
    CONTROL,
    LLAMA3_WORDS,
    MAX_FILE_BYTES,
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


def open_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder, or None if there is none. Raises ValueError for one that is damaged or not LLaMA's."""
    model, library = folder / "tokenizer.model", folder / "tokenizer.json"
    for path in (model, library):
        if path.exists() and path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, expected {MAX_FILE_BYTES} at most.")
    tokenizer: Tokenizer | None = None
    try:
        if model.exists() and _is_tiktoken(model):
            tokenizer = tokenizer_from_gguf(_from_tiktoken(model.read_bytes()))
        elif model.exists():
            tokenizer = SentencePieceTokenizer(model)
        elif library.exists():
            tokenizer = tokenizer_from_gguf(_from_library(json.loads(library.read_text(encoding="utf-8")), folder))
        if tokenizer:  # a model may have several ways to end
            tokenizer.stop_ids |= {i for i in _numbers(folder, "eos_token_id") if i < tokenizer.vocab_size}
    except OSError as error:
        raise ValueError(f"cannot read {error.filename}: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the tokenizer in {folder} cannot be used: {str(error).rstrip('.')}.") from None
    return tokenizer


def _is_tiktoken(path: Path) -> bool:
    """Lines of "base64 rank"; SentencePiece's file begins with a byte that is no letter."""
    with open(path, "rb") as file:
        line = file.readline(400)
    word, _, rank = line.strip().partition(b" ")
    try:
        return rank.isdigit() and bool(base64.b64decode(word, validate=True))
    except binascii.Error:
        return False


def _from_tiktoken(data: bytes) -> dict[str, Any]:
    """Llama 3's file: each token's bytes with its rank, which is its id and says how early it was learned."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines()):
        word, _, rank = line.partition(b" ")
        try:
            token = base64.b64decode(word, validate=True)
        except binascii.Error:
            token = b""
        if not token or not rank.isdigit() or int(rank) != number or token in ranks:
            raise ValueError(f"line {number + 1} is {line!r:.60}, expected a new token in base64 and the rank {number}")
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
    while len(parts) > 2:
        pairs = [(ranks.get(a + b, rank), i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))]
        earliest, i = min(pairs)
        if earliest >= rank:
            raise ValueError(f"the token {token!r:.60} cannot be made of two that were learned before it")
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def _spell(token: bytes) -> str:
    return "".join(SPELLED[byte] for byte in token)


def _gguf(**fields: Any) -> dict[str, Any]:
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items() if value is not None}


# ---------------------------------------------------------------------------------------------------------------------
# tokenizer.json


def _from_library(file: Any, folder: Path) -> dict[str, Any]:
    """The file of Hugging Face's `tokenizers`; which tokens begin and end a text is said in the files beside it."""
    model = file.get("model") if isinstance(file, dict) else None
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
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            path = folder / file
            settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            token = settings.get(f"{name}_token") if isinstance(settings, dict) else None
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
    for file in ("generation_config.json", "config.json"):
        path = folder / file
        settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        found = settings.get(key) if isinstance(settings, dict) else None
        found = found if isinstance(found, list) else [found]
        if found and all(type(i) is int and i >= 0 for i in found):
            return found
    return []


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
    raise ValueError(f"tokenizer.json cuts text into words by {', '.join(map(str, kinds)) or 'nothing'}, "
                     "expected the way of Llama 3 or of SmolLM")  # fmt: skip


def _adds_bos(file: dict[str, Any]) -> bool:
    """Whether its template for a single text begins with a control token."""
    steps = file.get("post_processor") or {}
    for step in steps.get("processors", [steps]):
        if step.get("type") == "TemplateProcessing":
            return bool(step.get("single")) and "SpecialToken" in step["single"][0]
    return False
