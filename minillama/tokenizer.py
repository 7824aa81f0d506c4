"""Text to tokens and back.

A token is a short string of bytes with a number, its id; a tokenizer cuts any text into tokens and joins them again.
Both kinds here are byte-pair encodings (BPE; Sennrich et al. 2016, arXiv:1508.07909): start from single characters and
join, again and again, the neighbouring pair that was learned first. They differ in where they start:

- `SentencePieceTokenizer` starts from characters, and writes a character it has never seen as its UTF-8 bytes
  (Kudo and Richardson 2018, arXiv:1808.06226). LLaMA 1 and 2 (arXiv:2302.13971, section 2.1), and the toy.
- `BPETokenizer` cuts the text into words first and starts from bytes (GPT-2, Radford et al. 2019). Llama 3 and SmolLM2.

A *control token* (`<s>`, `<|im_end|>`) has no bytes. It marks where a text or a turn of a chat begins and ends, so text
that only looks like one is text: nobody ends another's turn by typing `<|im_end|>`.
"""

from __future__ import annotations

import codecs
import io
import json
import operator
import os
import re
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Regex, models, pre_tokenizers
from tokenizers import Tokenizer as Library

ROLES = ("system", "user", "assistant")
CHATML, LLAMA3_CHAT = ("<|im_start|>", "<|im_end|>"), ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
# Llama 2's marks are plain text; that a model knows them is told by its template, which has both of these in it.
LLAMA2_CHAT, LLAMA2_MARKS = ("bos_token + '[INST] '", "<<SYS>>"), ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
END_OF_TURN = ("<|im_end|>", "<|eot_id|>")  # ChatML's and Llama 3's: generation stops here as well as at EOS
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of token: SentencePiece and GGUF agree
TEMPLATE = 200  # where a SentencePiece file holds a chat template: from here on, its fields are anybody's
MAX_FILE_BYTES = 200_000_000  # the largest published tokenizer file is a tenth of this


class Tokenizer:
    """What the two kinds share: bytes to text, control tokens, chat.

    vocab_size: number of tokens; ids go from 0 to vocab_size - 1.
    bos_id, eos_id: the control tokens that begin (None: there is none) and end a text.
    pad_id: fills up the shorter rows of a batch; equals eos_id where a model brought none, so mask by length, not id.
    stop_ids: generation stops at any of these.
    add_bos: the model expects its prompts to begin with BOS (LLaMA: yes; SmolLM2: no).
    system: the system message that `chat` puts before a conversation without one (None: no message).
    template: the chat template that came with the model (None: there was none). It is a program; `chat` never runs it
        and only looks whether it is Llama 2's.
    """

    def __init__(
        self,
        tokens: list[str],
        contents: list[bytes | None],
        *,
        bos_id: int | None,
        eos_id: int | None,
        pad_id: int | None,
        add_bos: bool,
        space_prefix: bool = False,
    ) -> None:
        """contents: the bytes of each token, None for a control token. space_prefix: a text is encoded with one space
        before it, so that its first word is the same token as anywhere else; decoding takes the space off again."""
        self.vocab_size = len(tokens)
        token, count = Counter(["", *tokens]).most_common(1)[0]
        if count > 1:
            raise ValueError(f"the vocabulary has {token!r:.60} {count} times; tokens must differ, none may be empty")
        if eos_id is None:
            raise ValueError("the vocabulary names no EOS token; without one no text ever ends")
        self._tokens, self._contents, self._space_prefix = tokens, contents, space_prefix
        self._control = {token: i for i, token in enumerate(tokens) if contents[i] is None}
        longest_first = sorted(self._control, key=len, reverse=True)
        self._control_pattern = re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")
        self.bos_id, self.eos_id, self.pad_id = bos_id, eos_id, eos_id if pad_id is None else pad_id
        self.stop_ids = frozenset({eos_id} | {self._control[token] for token in END_OF_TURN if token in self._control})
        self.add_bos = add_bos and bos_id is not None
        self.system: str | None = None
        self.template: str | None = None

    def _encode_text(self, text: str) -> list[int]:
        """Ids of plain text, not empty; never a control token."""
        raise NotImplementedError

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's file(s) into `folder`, for `load_tokenizer`."""
        raise NotImplementedError

    def encode(self, text: str, *, bos: bool = False, eos: bool = False, control: bool = False) -> list[int]:
        """The ids of `text`, with BOS before and EOS after it if asked for.

        control: text that spells a control token becomes that token. Leave it off for text that somebody typed.
        Raises ValueError for a value that is not a str, and for text that has no UTF-8 form (a lone surrogate).
        """
        ids: list[int] = []
        if bos:
            if self.bos_id is None:
                raise ValueError("bos=True, but this tokenizer has no BOS token")
            ids.append(self.bos_id)
        at_start, text = self._space_prefix, _check_text(text)
        for n, part in enumerate(self._control_pattern.split(text) if control else [text]):
            if n % 2:  # re.split puts the matches, the control tokens, at the odd places
                ids.append(self._control[part])
                at_start = at_start and ids[-1] == self.bos_id
            elif part:
                ids += self._encode_text(" " + part if at_start else part)
                at_start = False
        return ids + [self.eos_id] if eos else ids

    def decode_stream(self, ids: Iterable[int], *, control: bool = False, start: bool = True) -> Iterator[str]:
        """Yield text while ids come in. No piece ends inside a character; the joined pieces equal `decode(ids)`.

        start: the ids begin a text. For ids that continue one (a model's answer to a prompt) say False: then a space
        before the first word is kept.
        """
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")  # holds the bytes of an unfinished character back
        at_start = start and self._space_prefix
        for i in map(self._check_id, ids):
            content = self._contents[i]
            if content is None:
                content = self._tokens[i].encode() if control else b""
                at_start = at_start and i == self.bos_id
            else:
                content = content[1:] if at_start and content.startswith(b" ") else content
                at_start = False
            if piece := utf8.decode(content):
                yield piece
        if piece := utf8.decode(b"", final=True):
            yield piece

    def decode(self, ids: Iterable[int], *, control: bool = False, start: bool = True) -> str:
        """The text of `ids`. Control tokens are left out unless control=True; bytes that are not UTF-8 become U+FFFD.

        start: see `decode_stream`. Raises ValueError for an id outside the vocabulary.
        """
        return "".join(self.decode_stream(ids, control=control, start=start))

    def token(self, token_id: int) -> str:
        """A token as its vocabulary spells it; see `piece` for one to read."""
        return self._tokens[self._check_id(token_id)]

    def piece(self, token_id: int) -> str:
        """One token to read, for figures: a space shows as ▁, a line break as \\n, half a character as \\xe4."""
        content = self._contents[self._check_id(token_id)]
        if content is None:
            return self._tokens[token_id]
        text = content.decode("utf-8", errors="backslashreplace").replace(" ", "▁")
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)

    def chat(self, messages: Sequence[Mapping[str, str]], *, reply: bool = True) -> list[int]:
        """The ids of a conversation, in ChatML, or in the format of Llama 3 or Llama 2.

        ChatML: `<|im_start|>role⏎content<|im_end|>⏎` for each message. Llama 3: BOS, then
        `<|start_header_id|>role<|end_header_id|>⏎⏎content<|eot_id|>`, the content without spaces around it. Which of
        them is told by the control tokens; Llama 2's, by its template: BOS, `[INST] question [/INST] answer `, EOS,
        again and again, the system message in the first question. Its marks are text, so no question may have them.
        messages: mappings with "role" (system, user or assistant) and "content", which is always plain text.
        reply: open the assistant's turn at the end, for the model to go on. Raises ValueError for anything else.
        """
        llama2 = all(mark in (self.template or "") for mark in LLAMA2_CHAT)
        chatml, llama3 = (all(token in self._control for token in marks) for marks in (CHATML, LLAMA3_CHAT))
        if not (chatml or llama3 or llama2):
            raise ValueError(
                f"this tokenizer lacks the control tokens {' and '.join(CHATML)} of ChatML, those of Llama 3, and a "
                "template like Llama 2's, so it has no format for a chat"
            )
        if not messages:
            raise ValueError("a chat needs at least one message, got none")
        for message in messages:
            if not isinstance(message, Mapping) or message.keys() != {"role", "content"}:
                raise ValueError(f'a message must be {{"role": ..., "content": ...}}, got {message!r}')
            if message["role"] not in ROLES:
                raise ValueError(f"unknown role {message['role']!r}: expected one of {', '.join(ROLES)}")
            _check_text(message["content"])
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        if llama2:
            return self._llama2(messages, reply)
        turn = self._chatml if chatml else self._llama3
        ids = [self.bos_id] if llama3 and not chatml and self.bos_id is not None else []
        for message in messages:
            ids += turn(message["role"], message["content"])
        return ids + turn("assistant", None) if reply else ids

    def _chatml(self, role: str, content: str | None) -> list[int]:
        """A turn, or with no content its opening."""
        start, end = (self._control[token] for token in CHATML)
        if content is None:
            return [start, *self._encode_text(f"{role}\n")]
        return [start, *self._encode_text(f"{role}\n{content}"), end, *self._encode_text("\n")]

    def _llama3(self, role: str, content: str | None) -> list[int]:
        start, header_end, end = (self._control[token] for token in LLAMA3_CHAT)
        ids = [start, *self._encode_text(role), header_end]
        if content is None:
            return ids + self._encode_text("\n\n")
        return [*ids, *self._encode_text("\n\n" + content.strip()), end]

    def _llama2(self, messages: Sequence[Mapping[str, str]], reply: bool) -> list[int]:
        """Each question with its answer is a text of its own, to which the tokenizer may give a space."""
        system = [message["content"] for message in messages[:1] if message["role"] == "system"]
        turns = messages[len(system) :]
        roles = [turn["role"] for turn in turns]
        taken = (["user", "assistant"] * len(roles))[: len(roles)]
        if not roles or roles != taken or (reply and roles[-1] != "user"):
            order = "the user first and last" if reply else "the user first"
            raise ValueError(f"in Llama 2's format user and assistant take turns, {order}; got the roles {roles!r:.80}")
        for message in messages:
            if message["role"] != "assistant" and (marks := [m for m in LLAMA2_MARKS if m in message["content"]]):
                raise ValueError(f"a message has {marks[0]!r} in it, a mark of Llama 2's format: write it otherwise")
        ids: list[int] = []
        for n in range(0, len(turns), 2):
            question, *answer = (turn["content"] for turn in turns[n : n + 2])
            if system and n == 0:
                question = f"<<SYS>>\n{system[0]}\n<</SYS>>\n\n{question}"
            text = f"[INST] {question.strip()} [/INST]" + "".join(f" {content.strip()} " for content in answer)
            ids += self.encode(text, bos=True, eos=bool(answer))
        return ids

    def _check_id(self, token_id: Any) -> int:
        try:
            i = operator.index(token_id)  # also takes the integers of NumPy and PyTorch
        except TypeError:
            raise ValueError(f"a token id must be an integer, got {token_id!r}") from None
        if not 0 <= i < self.vocab_size:
            size = self.vocab_size
            raise ValueError(f"token id {i} is outside the vocabulary of {size} tokens, 0 to {size - 1}")
        return i


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece BPE model of LLaMA's kind: bytes for what is not in the vocabulary, text left as it is."""

    def __init__(self, model: str | Path | bytes, *, template: str | None = None) -> None:
        """model: a `tokenizer.model` file, or its bytes. template: a chat template from elsewhere, which becomes part
        of the model. Raises ValueError if it is not a model of LLaMA's kind."""
        where = "the SentencePiece model" if isinstance(model, bytes) else str(model)
        self._model = model if isinstance(model, bytes) else _read(Path(model))
        trainer: dict[int, int | bytes] = {}
        normalizer: dict[int, int | bytes] = {}
        stored: str | None = None
        try:
            for number, value in _protobuf_fields(self._model):
                if number in (2, 3) and isinstance(value, bytes):
                    (trainer if number == 2 else normalizer).update(_protobuf_fields(value))
                elif number == TEMPLATE and isinstance(value, bytes):
                    stored = value.decode(errors="replace")
        except (IndexError, KeyError):
            raise ValueError(f"{where} is damaged or not a SentencePiece model; get the file again") from None
        for name, got, expected in (  # with other settings, what is decoded need not be what was encoded
            ("trainer_spec.model_type", trainer.get(3, 1), 2),  # 2 is BPE
            ("trainer_spec.byte_fallback", trainer.get(35, 0), 1),
            ("trainer_spec.treat_whitespace_as_suffix", trainer.get(24, 0), 0),
            ("normalizer_spec.precompiled_charsmap", normalizer.get(2, b""), b""),
            ("normalizer_spec.remove_extra_whitespaces", normalizer.get(4, 1), 0),
            ("normalizer_spec.escape_whitespaces", normalizer.get(5, 1), 1),
        ):
            if got != expected:
                raise ValueError(f"{where} is damaged or not of LLaMA's kind: {name} is {got!r:.40}, not {expected!r}")
        if template is not None and template != stored:
            self._model += _protobuf(TEMPLATE, _check_text(template).encode())
        # Of a field that comes twice the last one counts, so this switches normalizer_spec.add_dummy_prefix off: the
        # space before a text is put there by `encode`, where it can be seen.
        no_prefix = _protobuf(3, bytes([3 << 3, 0]))
        self._library = sentencepiece.SentencePieceProcessor()
        try:
            self._library.LoadFromSerializedProto(self._model + no_prefix)
            tokens = [self._library.IdToPiece(i) for i in range(self._library.GetPieceSize())]
        except (RuntimeError, UnicodeDecodeError) as error:
            raise ValueError(f"{where} is damaged: {error}") from None
        self._underline = [tokens.index(f"<0x{b:02X}>") for b in "▁".encode()]
        bos_id, eos_id, pad_id = self._library.bos_id(), self._library.eos_id(), self._library.pad_id()  # -1: none
        super().__init__(
            tokens,
            [self._bytes_of(i, token) for i, token in enumerate(tokens)],
            bos_id=None if bos_id < 0 else bos_id,
            eos_id=None if eos_id < 0 else eos_id,
            pad_id=None if pad_id < 0 else pad_id,
            add_bos=True,
            space_prefix=bool(normalizer.get(3, 1)),
        )
        self.template = stored if template is None else template

    def _bytes_of(self, i: int, token: str) -> bytes | None:
        if self._library.IsByte(i):
            return bytes.fromhex(token[3:5])  # "<0x0A>"
        no_bytes = self._library.IsControl(i) or self._library.IsUnknown(i) or self._library.IsUnused(i)
        return None if no_bytes else token.replace("▁", " ").encode()

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int) -> SentencePieceTokenizer:
        """Learn a vocabulary from `texts`, as LLaMA did: digits one by one, unknown characters as bytes, nothing
        normalised away. Ids 0 to 6 are unknown, BOS, EOS, padding, `<|im_start|>`, `<|im_end|>` and the line break,
        then come the 256 bytes. The same texts give the same bytes.

        Raises ValueError if the texts have too many different characters, or too few pairs, for `vocab_size`.
        """
        if isinstance(texts, str):
            raise ValueError("texts must be several strings, got one str; put it into a list")
        texts = [_check_text(text) for text in texts]
        if not any(text.strip("\r\n") for text in texts):
            raise ValueError("there is no text to learn a vocabulary from")
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.Train(
                sentence_iterator=iter(texts),
                model_writer=model,
                vocab_size=vocab_size,
                model_type="bpe",
                byte_fallback=True,
                split_digits=True,
                allow_whitespace_only_pieces=True,
                character_coverage=1.0,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=True,
                pad_id=3,
                control_symbols=["<|im_start|>", "<|im_end|>"],
                user_defined_symbols=["\n"],
                max_sentence_length=2**30,  # the default silently drops longer texts
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            problem = str(error)
            if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", problem):
                problem = f"too small for these texts: control tokens, bytes and characters alone are {found[1]} tokens"
            elif found := re.search(r"too high .* value <= (\d+)", problem):
                problem = f"too large for these texts: they have pairs for {found[1]} tokens at most"
            raise ValueError(f"vocab_size={vocab_size} is not possible: {problem}") from None
        return cls(model.getvalue())

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any]) -> SentencePieceTokenizer:
        """Build from a GGUF file's metadata, whose `tokenizer.ggml.model` is "llama"."""
        tokens, types = _gguf_list(fields, "tokens", str), _gguf_list(fields, "token_type", int)
        scores = _gguf_list(fields, "scores", float)
        if not len(tokens) == len(types) == len(scores):
            counts = f"{len(tokens)} tokens, {len(types)} token types and {len(scores)} scores"
            raise ValueError(f"there are {counts}; they must be equally many")
        if not set(types) <= set(range(NORMAL, BYTE + 1)) or any(abs(score) > 1e38 for score in scores):
            raise ValueError(
                f"token types must be {NORMAL} to {BYTE} and scores 1e38 at most; the GGUF file is damaged"
            )
        _check_text("".join(tokens))
        if _gguf(fields, "ggml.add_bos_token", bool) is False:
            raise ValueError("tokenizer.ggml.add_bos_token is false, but LLaMA 1 and 2 begin every text with BOS")
        pieces = bytearray()
        for token, score, kind in zip(tokens, scores, types, strict=True):
            piece = _protobuf(1, token.encode()) + struct.pack("<Bf", 2 << 3 | 5, score) + bytes([3 << 3, kind])
            pieces += _protobuf(1, piece)
        trainer = bytes([3 << 3, 2]) + _integer(35 << 3) + b"\1"  # BPE, with bytes for what is not in the vocabulary
        for number, name in ((45, "unknown"), (46, "bos"), (47, "eos"), (48, "padding")):
            if (i := _gguf_id(fields, name, tokens)) is not None:
                trainer += _protobuf(number, tokens[i].encode())
        prefix = _gguf(fields, "ggml.add_space_prefix", bool) is not False
        squeeze = _gguf(fields, "ggml.remove_extra_whitespaces", bool) is True
        normalizer = bytes([3 << 3, prefix, 4 << 3, squeeze])
        model = bytes(pieces) + _protobuf(2, trainer) + _protobuf(3, normalizer)
        return cls(model, template=_gguf(fields, "chat_template", str))

    def _encode_text(self, text: str) -> list[int]:
        # The library writes a space as ▁ (U+2581) and reads both back as a space: a real ▁ goes in as its bytes.
        ids: list[int] = []
        for n, part in enumerate(text.split("▁")):
            ids += self._underline if n else []
            ids += self._library.EncodeAsIds(part) if part else []
        return ids

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.model`: the same bytes that were read or trained."""
        _write(Path(folder), "tokenizer.model", self._model, not_beside="tokenizer.json")


def _words(pattern: str | None) -> pre_tokenizers.PreTokenizer:
    """Cut a text into words, then spell each word's bytes. No pattern: digits one by one, then GPT-2's own pattern."""
    cut = pre_tokenizers.Split(Regex(pattern), "isolated") if pattern else pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)])


LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# GGUF's name for a way to cut text into words -> (the way; whether a word that is a token is taken whole, not merged)
PRE_TOKENIZERS = {"smollm": (_words(None), False), "llama-bpe": (_words(LLAMA3_WORDS), True)}
# GPT-2 spells each byte as one visible character; the n-th byte without one (a space is the 33rd) as chr(255 + n): "Ġ".
_VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_HIDDEN = [b for b in range(256) if b not in _VISIBLE]
BYTE_OF = {chr(b): b for b in _VISIBLE} | {chr(256 + n): b for n, b in enumerate(_HIDDEN)}


class BPETokenizer(Tokenizer):
    """Byte-level BPE, run by the `tokenizers` library."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        """fields: a GGUF file's metadata. Used from it: the vocabulary in order of id, its bytes spelled as in GPT-2;
        the type of each token; the merges, "left right", first learned first; a name in PRE_TOKENIZERS; the control
        tokens' ids; and the chat template, which is not run, only searched for the default system message.

        Raises ValueError if something is missing or does not fit.
        """
        self._fields = {name: value for name, value in fields.items() if name.startswith("tokenizer.")}
        tokens, types = _gguf_list(fields, "tokens", str), _gguf_list(fields, "token_type", int)
        merges = _gguf_list(fields, "merges", str)
        pre, add_bos = _gguf(fields, "ggml.pre", str), _gguf(fields, "ggml.add_bos_token", bool)
        if pre not in PRE_TOKENIZERS:
            raise ValueError(f"unknown pre-tokenizer {pre!r:.40}: expected one of {', '.join(PRE_TOKENIZERS)}")
        if _gguf(fields, "ggml.add_space_prefix", bool):
            raise ValueError("tokenizer.ggml.add_space_prefix is true; byte-level BPE is supported only without it")
        if len(types) != len(tokens):
            raise ValueError(f"there are {len(tokens)} tokens but {len(types)} token types; they must be equally many")
        _check_text("".join(tokens))
        contents: list[bytes | None] = []
        for token, kind in zip(tokens, types, strict=True):
            if not NORMAL <= kind <= UNUSED:
                expected = f"byte-level BPE has types {NORMAL} to {UNUSED}"
                raise ValueError(f"the token {token!r:.60} has type {kind}; {expected}")
            if kind == NORMAL and not set(token) <= BYTE_OF.keys():
                raise ValueError(f"the normal token {token!r:.60} is not spelled in GPT-2's characters for bytes")
            normal = bytes(BYTE_OF[c] for c in token) if kind == NORMAL else None
            contents.append(token.encode() if kind == USER_DEFINED else normal)
        template = _gguf(fields, "chat_template", str)
        system = re.search(r"<\|im_start\|>system(?:\n|\\n)([^'\"{}<]+)<\|im_end\|>", template or "")
        bos_id, eos_id, pad_id = (_gguf_id(fields, name, tokens) for name in ("bos", "eos", "padding"))
        add_bos = pre == "llama-bpe" if add_bos is None else add_bos
        super().__init__(tokens, contents, bos_id=bos_id, eos_id=eos_id, pad_id=pad_id, add_bos=add_bos)
        self.system, self.template = system and system[1], template
        # The library never hears of the control tokens, so no text can be encoded as one.
        vocabulary = {token: i for i, token in enumerate(tokens) if contents[i] is not None}
        pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
        for left, right in pairs:
            if not {left, right, left + right} <= vocabulary.keys():
                raise ValueError(f"the merge {left + ' ' + right!r:.80} must be two tokens that make a third")
        words, ignore_merges = PRE_TOKENIZERS[pre]
        self._library = Library(models.BPE(vocabulary, pairs, ignore_merges=ignore_merges))
        self._library.pre_tokenizer = words
        user_defined = [token for token, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED]
        self._library.add_tokens([AddedToken(token, normalized=False) for token in user_defined])
        # The library silently drops bytes that have no token (SmolLM2 lacks 21; most of them never occur in UTF-8).
        self._unwritable = bytes(b for c, b in BYTE_OF.items() if c not in vocabulary)

    def _encode_text(self, text: str) -> list[int]:
        if self._unwritable and len(text.encode().translate(None, self._unwritable)) < len(text.encode()):
            bad = next(c for c in text if not set(c.encode()).isdisjoint(self._unwritable))
            raise ValueError(f"the text has {bad!r} at position {text.index(bad)}, which this vocabulary cannot write")
        return self._library.encode(text, add_special_tokens=False).ids

    def to_library(self) -> dict[str, Any]:
        """The contents of Hugging Face's `tokenizer.json`, in which the control tokens are part of the vocabulary."""
        file = json.loads(self._library.to_str())
        file["model"]["vocab"] = {token: i for i, token in enumerate(self._tokens)}
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        added = {entry["id"]: entry for entry in file["added_tokens"]}
        for token, i in self._control.items():
            added[i] = {"id": i, "content": token, **plain, "special": True}
        file["added_tokens"] = [added[i] for i in sorted(added)]
        file["decoder"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        if self.add_bos and self.bos_id is not None:
            bos = self._tokens[self.bos_id]
            text, start = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": bos, "type_id": 0}}
            other = {"Sequence": {"id": "B", "type_id": 1}}
            file["post_processor"] = {
                "type": "TemplateProcessing", "single": [start, text], "pair": [start, text, other],
                "special_tokens": {bos: {"id": bos, "ids": [self.bos_id], "tokens": [bos]}},
            }  # fmt: skip
        return file

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json`: the metadata that the constructor takes, as JSON."""
        _write(Path(folder), "tokenizer.json", json.dumps(self._fields).encode(), not_beside="tokenizer.model")


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer that `save` put into a checkpoint's folder. Raises ValueError if there is none."""
    model, fields = Path(folder) / "tokenizer.model", Path(folder) / "tokenizer.json"
    if model.exists():
        return SentencePieceTokenizer(model)
    if not fields.exists():
        raise ValueError(f"{folder} has no tokenizer: expected tokenizer.model (SentencePiece) or tokenizer.json (BPE)")
    try:
        return tokenizer_from_gguf(json.loads(_read(fields)))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{fields} is damaged or was not written by `save`: {error}") from None


def tokenizer_from_gguf(fields: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that a GGUF file's metadata describes. fields: name -> value, as str, int, bool, float or list."""
    kind = fields.get("tokenizer.ggml.model") if isinstance(fields, Mapping) else fields
    if kind == "llama":
        return SentencePieceTokenizer.from_gguf(fields)
    if kind == "gpt2":
        return BPETokenizer(fields)
    raise ValueError(f"unknown kind of tokenizer: tokenizer.ggml.model is {kind!r:.60}, expected 'llama' or 'gpt2'")


def _gguf(fields: Mapping[str, Any], name: str, kind: type) -> Any:
    value = fields.get(f"tokenizer.{name}")
    if value is not None and type(value) is not kind:
        raise ValueError(f"tokenizer.{name} must be of type {kind.__name__}, got {value!r:.60}")
    return value


def _gguf_list(fields: Mapping[str, Any], name: str, kind: type) -> list:
    values = _gguf(fields, f"ggml.{name}", list)
    if values is None or any(type(value) is not kind for value in values):
        raise ValueError(f"tokenizer.ggml.{name} must be a list of {kind.__name__}, got {values!r:.60}")
    return values


def _gguf_id(fields: Mapping[str, Any], name: str, tokens: list[str]) -> int | None:
    i = _gguf(fields, f"ggml.{name}_token_id", int)
    if i is not None and not 0 <= i < len(tokens):
        raise ValueError(f"tokenizer.ggml.{name}_token_id is {i}, but there are {len(tokens)} tokens")
    return i


def _protobuf_fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a protobuf message, which is what a SentencePiece file is. A value is an integer
    or bytes: a text, a float32, or a message inside. Raises IndexError or KeyError where the message is damaged."""
    at = 0

    def integer() -> int:  # seven bits in each byte, the low ones first; the eighth bit says that more follow
        nonlocal at
        value = 0
        for shift in range(0, 70, 7):
            value |= (message[at] & 127) << shift
            at += 1
            if message[at - 1] < 128:
                return value
        raise IndexError("an integer of more than ten bytes")

    while at < len(message):
        number, wire_type = divmod(integer(), 8)
        if wire_type == 0:
            yield number, integer()
        else:
            size = integer() if wire_type == 2 else {1: 8, 5: 4}[wire_type]
            if at + size > len(message):
                raise IndexError("a field that is cut off")
            yield number, message[at : at + size]
            at += size


def _integer(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + _integer(value >> 7)


def _protobuf(number: int, value: bytes) -> bytes:
    """A protobuf field: a text, or a message inside."""
    return _integer(number << 3 | 2) + _integer(len(value)) + value


def _check_text(text: Any) -> str:
    if not isinstance(text, str):
        raise ValueError(f"text must be a str, got {type(text).__name__}: {text!r:.60}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has {text[error.start]!r} at position {error.start}: half of a surrogate pair is "
            "not a character and has no UTF-8 bytes; read the text with the right encoding"
        ) from None
    return text


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise ValueError(f"{path} has {size} bytes; a tokenizer's file has {MAX_FILE_BYTES} at most")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None


def _write(folder: Path, name: str, data: bytes, not_beside: str) -> None:
    """Write a file so that at every moment the old one or the new one is there, whole."""
    if (folder / not_beside).exists():
        raise ValueError(f"{folder} already has a {not_beside}, another tokenizer's; save into another folder")
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{name}.{os.getpid()}.tmp"
    try:
        temporary.write_bytes(data)
        os.replace(temporary, folder / name)
    finally:
        temporary.unlink(missing_ok=True)
