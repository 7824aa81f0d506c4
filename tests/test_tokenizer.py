"""Tokenizers: any text comes back, no text becomes a control token, bad files and values get one clear error."""

import functools
import json
import random
import re
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

import minillama.tokenizer as module
from minillama.tokenizer import (
    BPETokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    tokenizer_from_gguf,
)

TEXTS = [
    "Once upon a time there was a little cat named Tom. Tom had 123 red balls.\n\nThe balls were red, not blue.",
    "从前有一只小猫。它叫汤姆。汤姆有一个红色的球。",
    "user\nassistant\nsystem\nWhere is the ball? It isn't here, it's under the bed; they've looked 45 times.",
    "    def cat(name):\n        return 'Tom' if name is None else name\n",
] * 3
# What has gone wrong in some tokenizer: white space of all kinds, digits, look-alikes of control tokens, joined emoji
TRAPS = " |  |   |\n|\n\n|\t|\r\n|\0|\x0b|\x1c|\x85|\xa0|\u2028|\u3000|\u200b|\ufeff|▁|▁▁|Tom| Tom|Ġ|Ċ".split("|")
TRAPS += "<s> </s> <unk> <pad> <|im_start|> <|im_end|> <|eot_id|> <0x41> 12 1234567 ٣ ½ １ 's 'LL I'm".split()
TRAPS += "_ # 你好 e\u0301 é ﬁ ⁇ \ufffd 🙂 👍🏽 🇳🇱 👩‍👩‍👧".split()
any_text = st.lists(st.sampled_from(TRAPS) | st.text(max_size=6), max_size=12).map("".join)


def bpe_fields(pre: str) -> dict:
    """A small byte-level vocabulary, trained here, in the form of a GGUF file's metadata. Control tokens come first and
    last, so that the ids of the others are shifted."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        TEXTS, tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=sorted(alphabet), show_progress=False)
    )
    vocabulary = trained.get_vocab()
    merges = json.loads(trained.to_str())["model"]["merges"]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(vocabulary, key=vocabulary.get), "<|eot_id|>"]
    types = [3, 3, 3, *(1 for _ in vocabulary), 3]
    return {
        "general.name": "small",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
    }


TOY = SentencePieceTokenizer.train(TEXTS, vocab_size=400)
FIELDS = {pre: bpe_fields(pre) for pre in ("smollm", "llama-bpe")}
SMALL = {pre: BPETokenizer(fields) for pre, fields in FIELDS.items()}
BOTH_KINDS = pytest.mark.parametrize("tokenizer", [TOY, *SMALL.values()], ids=["sentencepiece", *SMALL])


@functools.cache
def control_ids(tokenizer: Tokenizer) -> set[int]:
    return {
        i
        for i in range(tokenizer.vocab_size)
        if tokenizer.decode([i], start=False) == "" and tokenizer.decode([i], control=True) != ""
    }


def id_of(tokenizer: Tokenizer, name: str) -> int:
    (found,) = (i for i in control_ids(tokenizer) if tokenizer.piece(i) == name)
    return found


# --- text to ids and back


@BOTH_KINDS
@given(text=any_text)
def test_any_text_comes_back_unchanged(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == text


@BOTH_KINDS
@given(text=any_text)
def test_text_never_becomes_a_control_token(tokenizer, text):
    assert control_ids(tokenizer).isdisjoint(tokenizer.encode(text))


@BOTH_KINDS
@example("<|im_start|> Tom")
@example("<|eot_id|><s> Tom<s>Tom")
@given(any_text)
def test_with_control_the_text_of_control_tokens_becomes_those_tokens(tokenizer, text):
    ids = tokenizer.encode(text, control=True)
    names = sorted((tokenizer.piece(i) for i in control_ids(tokenizer)), key=len, reverse=True)
    assert tokenizer.decode(ids, control=True) == text
    expected = re.findall("|".join(map(re.escape, names)), text)
    assert [tokenizer.piece(i) for i in ids if i in control_ids(tokenizer)] == expected


def test_of_two_control_tokens_the_longer_one_is_meant():
    more = {
        "tokenizer.ggml.tokens": [*FIELDS["smollm"]["tokenizer.ggml.tokens"], "<|im_end|>!"],
        "tokenizer.ggml.token_type": [*FIELDS["smollm"]["tokenizer.ggml.token_type"], 3],
    }
    tokenizer = BPETokenizer(FIELDS["smollm"] | more)
    assert tokenizer.encode("<|im_end|>!", control=True) == [tokenizer.vocab_size - 1]


@BOTH_KINDS
def test_bos_and_eos_only_when_asked_for(tokenizer):
    ids = tokenizer.encode("the ball")
    assert tokenizer.encode("the ball", bos=True) == [tokenizer.bos_id, *ids]
    assert tokenizer.encode("the ball", eos=True) == [*ids, tokenizer.eos_id]
    assert tokenizer.encode("", bos=True, eos=True) == [tokenizer.bos_id, tokenizer.eos_id]
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""


@BOTH_KINDS
@given(data=st.data())
def test_any_ids_decode_and_the_stream_says_the_same(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    for options in ({}, {"control": True}, {"start": False}):
        pieces = list(tokenizer.decode_stream(iter(ids), **options))
        assert "".join(pieces) == tokenizer.decode(ids, **options)
        assert "" not in pieces
    assert "".join(map(tokenizer.piece, ids)).isprintable()


@given(st.binary(max_size=12))
def test_bytes_that_are_not_utf8_become_replacement_characters(data):
    byte_ids = [next(i for i in range(TOY.vocab_size) if TOY._tokens[i] == f"<0x{b:02X}>") for b in data]
    assert TOY.decode(byte_ids, start=False) == data.decode("utf-8", errors="replace")


@BOTH_KINDS
def test_the_stream_holds_back_half_a_character_and_nothing_else(tokenizer):
    text = "a 🙂 b"
    ids = iter(tokenizer.encode(text))
    seen, taken = "", []

    def feed():
        for i in ids:
            taken.append(i)
            yield i

    for piece in tokenizer.decode_stream(feed()):
        seen += piece
        assert "\ufffd" not in piece
        assert tokenizer.decode(taken).replace("\ufffd", "") == seen
    assert seen == text


@BOTH_KINDS
def test_a_continuation_keeps_its_first_space(tokenizer):
    text = "Once upon a time there was"
    ids = tokenizer.encode(text)
    for cut in range(1, len(ids)):
        assert tokenizer.decode(ids[:cut]) + tokenizer.decode(ids[cut:], start=False) == text


@BOTH_KINDS
@pytest.mark.parametrize("unit", ["a", " ", "1", "\n", "猫", "🙂", "▁"])
def test_long_runs_take_no_long_time(tokenizer, unit):
    text = unit * 50_000  # quadratic work would take minutes
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_pieces_are_readable():
    assert [TOY.piece(i) for i in TOY.encode("Tom\n \té")] == ["▁Tom", "\\n", "▁", "\\t", "\\xc3", "\\xa9"]
    assert TOY.piece(TOY.eos_id) == "</s>"
    small = SMALL["smollm"]
    assert [small.piece(i) for i in small.encode(" the\té")] == ["▁the", "\\t", "\\xc3", "\\xa9"]
    assert small.piece(small.bos_id) == "<|im_start|>"


# --- values that cannot be encoded or decoded


@BOTH_KINDS
def test_what_is_not_text_is_refused(tokenizer):
    for value in (None, 3, b"bytes", ["a"]):
        with pytest.raises(ValueError, match=f"text must be a str, got {type(value).__name__}"):
            tokenizer.encode(value)
    with pytest.raises(ValueError, match=r"'\\ud83d' at position 2"):
        tokenizer.encode("a \ud83d b")


@BOTH_KINDS
def test_ids_outside_the_vocabulary_are_refused(tokenizer):
    size = tokenizer.vocab_size
    for bad in (-1, size, 10**30):
        for use in (tokenizer.decode, lambda ids: tokenizer.piece(ids[0])):
            with pytest.raises(ValueError, match=f"token id {bad} is outside the vocabulary of {size} tokens"):
                use([bad])
    for bad in (1.0, "1", None):
        with pytest.raises(ValueError, match="must be an integer"):
            tokenizer.decode([bad])


def test_integers_of_other_libraries_are_ids():
    torch = pytest.importorskip("torch")
    ids = TOY.encode("the ball", bos=True)
    assert TOY.decode(torch.tensor(ids)) == "the ball"
    assert TOY.decode(torch.tensor(ids).numpy()) == "the ball"


def test_bos_is_refused_where_there_is_none():
    fields = {name: value for name, value in FIELDS["smollm"].items() if "bos" not in name}
    tokenizer = BPETokenizer(fields)
    assert tokenizer.bos_id is None and not tokenizer.add_bos
    with pytest.raises(ValueError, match="no BOS token"):
        tokenizer.encode("a", bos=True)


def test_a_character_that_the_vocabulary_cannot_write_is_refused_not_lost():
    fields = FIELDS["smollm"]
    tokens = ["<|missing|>" if token == "Ć" else token for token in fields["tokenizer.ggml.tokens"]]  # byte 6
    tokenizer = BPETokenizer(fields | {"tokenizer.ggml.tokens": tokens})
    with pytest.raises(ValueError, match=r"'\\x06' at position 2, which this vocabulary cannot write"):
        tokenizer.encode("a \x06 b")
    assert tokenizer.decode(tokenizer.encode("a b")) == "a b"


# --- chat


@BOTH_KINDS
@given(contents=st.lists(any_text, min_size=1, max_size=3))
def test_a_chat_is_chatml_whatever_the_messages_say(tokenizer, contents):
    messages = [
        {"role": role, "content": content}
        for role, content in zip(["system", "user", "assistant"], contents, strict=False)
    ]
    ids = tokenizer.chat(messages)
    rendered = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    assert tokenizer.decode(ids, control=True) == rendered + "<|im_start|>assistant\n"
    assert tokenizer.decode(tokenizer.chat(messages, reply=False), control=True) == rendered
    im_start, im_end = id_of(tokenizer, "<|im_start|>"), id_of(tokenizer, "<|im_end|>")
    assert [i for i in ids if i in control_ids(tokenizer)] == [im_start, im_end] * len(messages) + [im_start]


@BOTH_KINDS
def test_a_chat_is_what_its_rendered_text_encodes_to(tokenizer):
    messages = [{"role": "user", "content": "Where is the ball?"}, {"role": "assistant", "content": " Here.\n"}]
    rendered = (
        "<|im_start|>user\nWhere is the ball?<|im_end|>\n<|im_start|>assistant\n Here.\n<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert tokenizer.chat(messages) == tokenizer.encode(rendered, control=True)


def test_a_default_system_message_comes_first_unless_there_is_one():
    template = "{{ '<|im_start|>system\nYou are kind<|im_end|>\n' }}{% for m in messages %}…{% endfor %}"
    tokenizer = BPETokenizer(FIELDS["smollm"] | {"tokenizer.chat_template": template})
    user, system = {"role": "user", "content": "Hi"}, {"role": "system", "content": "Be brief"}
    assert tokenizer.system == "You are kind"
    assert tokenizer.chat([user]) == tokenizer.chat([{"role": "system", "content": "You are kind"}, user])
    assert "kind" not in tokenizer.decode(tokenizer.chat([system, user]))
    assert TOY.system is None and SMALL["smollm"].system is None
    tokenizer.system = None
    assert tokenizer.decode(tokenizer.chat([user])) == "user\nHi\nassistant\n"


@BOTH_KINDS
def test_messages_that_are_none_are_refused(tokenizer):
    with pytest.raises(ValueError, match="unknown role 'tool': expected one of system, user, assistant"):
        tokenizer.chat([{"role": "tool", "content": "x"}])
    with pytest.raises(ValueError, match="at least one message"):
        tokenizer.chat([])
    for bad in ("hello", {"role": "user"}, {"role": "user", "content": "x", "name": "Tom"}):
        with pytest.raises(ValueError, match="a message must be"):
            tokenizer.chat([bad])
    with pytest.raises(ValueError, match="text must be a str, got NoneType"):
        tokenizer.chat([{"role": "user", "content": None}])


def test_chat_needs_chatml_tokens():
    tokens = [token.replace("im_", "header_") for token in FIELDS["smollm"]["tokenizer.ggml.tokens"]]
    tokenizer = BPETokenizer(FIELDS["smollm"] | {"tokenizer.ggml.tokens": tokens})
    with pytest.raises(ValueError, match="lacks the control tokens"):
        tokenizer.chat([{"role": "user", "content": "x"}])


def test_generation_stops_at_eos_and_at_the_end_of_a_turn():
    assert TOY.stop_ids == {TOY.eos_id, id_of(TOY, "<|im_end|>")}
    small = SMALL["smollm"]
    assert (
        small.stop_ids
        == {0, 2, small.vocab_size - 1}
        == {small.eos_id, *map(lambda n: id_of(small, n), ("<|im_end|>", "<|eot_id|>"))}
    )


# --- training


def test_training_is_deterministic_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    again = SentencePieceTokenizer.train((text for text in TEXTS), vocab_size=400)
    assert again._model == TOY._model
    assert list(tmp_path.iterdir()) == []


def test_the_trained_vocabulary_is_of_llamas_kind():
    assert TOY.vocab_size == 400
    assert [TOY.piece(i) for i in range(6)] == ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
    assert (TOY.bos_id, TOY.eos_id, TOY.pad_id, TOY.add_bos) == (1, 2, 3, True)
    assert control_ids(TOY) == set(range(6))
    for text in ("123", "45"):
        assert [TOY.piece(i) for i in TOY.encode(text)] == ["▁", *text]  # digits one by one
    assert [TOY.piece(i) for i in TOY.encode("Tom\n\nTom")] == ["▁Tom", "\\n", "\\n", "Tom"]
    characters = set("".join(TEXTS)) - set(" ")
    one_token = {TOY.decode([i], start=False) for i in range(TOY.vocab_size)}
    assert characters <= one_token  # no character of the corpus falls apart into bytes


def test_no_long_text_is_left_out_of_training():
    text = "".join(random.Random(0).choices("abcdefgh ", k=20_000)) + "猫"
    assert any(token == "猫" for token in SentencePieceTokenizer.train([text], vocab_size=300)._tokens)


def test_vocabulary_sizes_that_do_not_fit_the_texts_are_refused():
    with pytest.raises(ValueError, match=r"vocab_size=280 is not possible: too small .* alone are \d+ tokens"):
        SentencePieceTokenizer.train(TEXTS, vocab_size=280)
    with pytest.raises(ValueError, match=r"vocab_size=9000 is not possible: too large .* pairs for \d+ tokens at most"):
        SentencePieceTokenizer.train(TEXTS, vocab_size=9000)
    for size in (0, -5):
        with pytest.raises(ValueError, match=f"vocab_size={size} is not possible"):
            SentencePieceTokenizer.train(TEXTS, vocab_size=size)


def test_texts_that_teach_nothing_are_refused():
    for texts in ([], [""], ["\n", "\r\n"]):
        with pytest.raises(ValueError, match="no text to learn"):
            SentencePieceTokenizer.train(texts, vocab_size=300)
    with pytest.raises(ValueError, match="put it into a list"):
        SentencePieceTokenizer.train("one text", vocab_size=300)
    with pytest.raises(ValueError, match="text must be a str, got int"):
        SentencePieceTokenizer.train([3], vocab_size=300)
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        SentencePieceTokenizer.train(["\ud800"], vocab_size=300)


# --- byte-level BPE from metadata


def test_smollm_cuts_digits_and_llama_takes_three_at_a_time():
    tokens = [*FIELDS["smollm"]["tokenizer.ggml.tokens"], "78", "789", "7890"]
    merges = [*FIELDS["smollm"]["tokenizer.ggml.merges"], "7 8", "78 9", "789 0"]
    more = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [*FIELDS["smollm"]["tokenizer.ggml.token_type"], 1, 1, 1],
    }
    pieces = {
        pre: [t.piece(i) for i in t.encode("x 7890")]
        for pre, t in ((pre, BPETokenizer(FIELDS[pre] | more)) for pre in FIELDS)
    }
    assert pieces == {"smollm": ["x", "▁", "7", "8", "9", "0"], "llama-bpe": ["x", "▁", "789", "0"]}


def test_llama_takes_a_word_that_is_a_token_whole_and_smollm_builds_it_from_merges():
    more = {
        "tokenizer.ggml.tokens": [*FIELDS["smollm"]["tokenizer.ggml.tokens"], "qzqz"],
        "tokenizer.ggml.token_type": [*FIELDS["smollm"]["tokenizer.ggml.token_type"], 1],
    }
    assert len(BPETokenizer(FIELDS["llama-bpe"] | more).encode("qzqz")) == 1
    assert len(BPETokenizer(FIELDS["smollm"] | more).encode("qzqz")) == 4


@pytest.mark.parametrize("kind", [3, 5])
def test_a_control_token_that_looks_like_a_word_is_still_out_of_reach(kind):
    more = {
        "tokenizer.ggml.tokens": [*FIELDS["smollm"]["tokenizer.ggml.tokens"], "STOP"],
        "tokenizer.ggml.token_type": [*FIELDS["smollm"]["tokenizer.ggml.token_type"], kind],
    }
    tokenizer = BPETokenizer(FIELDS["llama-bpe"] | more)
    assert tokenizer.vocab_size - 1 not in tokenizer.encode("STOP")
    assert tokenizer.encode("STOP", control=True) == [tokenizer.vocab_size - 1]


def test_user_defined_tokens_are_found_in_any_text():
    more = {
        "tokenizer.ggml.tokens": [*FIELDS["smollm"]["tokenizer.ggml.tokens"], "<tool> é"],
        "tokenizer.ggml.token_type": [*FIELDS["smollm"]["tokenizer.ggml.token_type"], 4],
    }
    tokenizer = BPETokenizer(FIELDS["smollm"] | more)
    assert tokenizer.encode("<tool> é") == [tokenizer.vocab_size - 1]
    assert tokenizer.decode(tokenizer.encode("a<tool> é b")) == "a<tool> é b"


def test_whether_prompts_begin_with_bos_follows_the_file_then_the_family():
    for pre, default in (("smollm", False), ("llama-bpe", True)):
        silent = {name: value for name, value in FIELDS[pre].items() if "add_bos" not in name}
        assert BPETokenizer(silent).add_bos is default
        for said in (True, False):
            assert BPETokenizer(silent | {"tokenizer.ggml.add_bos_token": said}).add_bos is said


GOOD = FIELDS["smollm"]
TOKENS, TYPES, MERGES = (GOOD[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type", "merges"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "qwen2"}, "unknown pre-tokenizer 'qwen2': expected one of smollm, llama-bpe"),
        ({"pre": None}, "unknown pre-tokenizer None"),
        ({"pre": ["smollm"]}, r"tokenizer.ggml.pre must be of type str, got \['smollm'\]"),
        ({"model": "t5"}, "tokenizer.ggml.model is 't5', expected 'llama' or 'gpt2'"),
        ({"tokens": None}, "tokenizer.ggml.tokens must be a list of str, got None"),
        ({"tokens": [*TOKENS[:-1], 7]}, "tokenizer.ggml.tokens must be a list of str"),
        ({"tokens": TOKENS[:-1]}, f"there are {len(TOKENS) - 1} tokens but {len(TOKENS)} token types"),
        ({"tokens": [*TOKENS[:-1], "a"]}, "the vocabulary has 'a' 2 times"),
        ({"tokens": [*TOKENS[:-1], ""]}, "none may be empty"),
        ({"tokens": [*TOKENS[:-1], "\ud800"]}, "half of a surrogate pair"),
        ({"tokens": [*TOKENS[:-1], "猫"], "token_type": [*TYPES[:-1], 1]}, "the normal token '猫' is not spelled"),
        ({"token_type": None}, "tokenizer.ggml.token_type must be a list of int, got None"),
        ({"token_type": [*TYPES[:-1], 6]}, "has type 6; byte-level BPE has types 1 to 5"),
        ({"token_type": [*TYPES[:-1], True]}, "tokenizer.ggml.token_type must be a list of int"),
        ({"merges": [*MERGES, "a"]}, "the merge 'a ' must be two tokens"),
        ({"merges": [*MERGES, "q qz"]}, "the merge 'q qz' must be two tokens that make a third"),
        ({"merges": [*MERGES, "t h e"]}, "the merge 't h e'"),
        ({"merges": [*MERGES, "<|im_ end|>"]}, "must be two tokens"),
        ({"eos_token_id": None}, "names no EOS token"),
        ({"eos_token_id": len(TOKENS)}, f"eos_token_id is {len(TOKENS)}, but there are {len(TOKENS)} tokens"),
        ({"bos_token_id": -1}, "bos_token_id is -1"),
        ({"padding_token_id": "0"}, "padding_token_id must be of type int, got '0'"),
        ({"add_bos_token": 1}, "add_bos_token must be of type bool, got 1"),
        ({"add_space_prefix": True}, "add_space_prefix is true"),
    ],
)
def test_metadata_that_does_not_fit_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        tokenizer_from_gguf(GOOD | {f"tokenizer.ggml.{name}": value for name, value in changes.items()})


# --- SentencePiece from metadata


def sentencepiece_fields() -> dict:
    raw = sentencepiece.SentencePieceProcessor()
    raw.LoadFromSerializedProto(TOY._model)
    ids = range(raw.GetPieceSize())
    kind = [2 if raw.IsUnknown(i) else 3 if raw.IsControl(i) else 6 if raw.IsByte(i) else 1 for i in ids]
    kind[6] = 4  # the line break
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [raw.IdToPiece(i) for i in ids],
        "tokenizer.ggml.scores": [raw.GetScore(i) for i in ids],
        "tokenizer.ggml.token_type": kind,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 3,
        "tokenizer.ggml.add_bos_token": True,
    }


LLAMA_FIELDS = sentencepiece_fields()
FROM_GGUF = tokenizer_from_gguf(LLAMA_FIELDS)


@given(text=any_text)
def test_a_sentencepiece_vocabulary_in_a_gguf_file_is_the_same_tokenizer(text):
    for options in ({}, {"bos": True, "eos": True, "control": True}):
        assert FROM_GGUF.encode(text, **options) == TOY.encode(text, **options)
    assert FROM_GGUF.decode(FROM_GGUF.encode(text)) == text


def test_a_sentencepiece_vocabulary_in_a_gguf_file_keeps_its_control_tokens():
    for name in ("vocab_size", "bos_id", "eos_id", "pad_id", "stop_ids", "add_bos"):
        assert getattr(FROM_GGUF, name) == getattr(TOY, name)
    names = ["[unk]", "[bos]", "[eos]", "[pad]", *LLAMA_FIELDS["tokenizer.ggml.tokens"][4:]]
    renamed = tokenizer_from_gguf(LLAMA_FIELDS | {"tokenizer.ggml.tokens": names})
    assert (renamed.bos_id, renamed.eos_id, renamed.pad_id) == (1, 2, 3)
    without = tokenizer_from_gguf(LLAMA_FIELDS | {"tokenizer.ggml.add_space_prefix": False})
    assert [without.piece(i) for i in without.encode("Tom")] == ["Tom"]
    assert without.decode(without.encode(" Tom")) == " Tom"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None}, "tokenizer.ggml.scores must be a list of float, got None"),
        ({"scores": [0.0]}, "there are 400 tokens, 400 token types and 1 scores"),
        ({"scores": [1e300] * 400}, "scores 1e38 at most"),
        ({"token_type": [0] * 400}, "token types must be 1 to 6"),
        ({"token_type": [1] * 400}, "is damaged"),
        ({"tokens": ["\ud800"] * 400}, "half of a surrogate pair"),
        ({"tokens": ["a"] * 400}, "is damaged"),
        ({"add_bos_token": False}, "add_bos_token is false"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces is 1, not 0"),
        ({"eos_token_id": 400}, "eos_token_id is 400, but there are 400 tokens"),
    ],
)
def test_sentencepiece_metadata_that_does_not_fit_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        tokenizer_from_gguf(LLAMA_FIELDS | {f"tokenizer.ggml.{name}": value for name, value in changes.items()})


# --- files


@BOTH_KINDS
def test_a_saved_tokenizer_loads_as_the_same_one(tokenizer, tmp_path):
    folder = tmp_path / "new" / "checkpoint"
    tokenizer.save(folder)
    loaded = load_tokenizer(folder)
    assert type(loaded) is type(tokenizer)
    for name in ("vocab_size", "bos_id", "eos_id", "pad_id", "stop_ids", "add_bos", "system"):
        assert getattr(loaded, name) == getattr(tokenizer, name)
    text = "".join(TRAPS + TEXTS)
    assert loaded.encode(text) == tokenizer.encode(text)
    assert [loaded.piece(i) for i in range(loaded.vocab_size)] == [tokenizer.piece(i) for i in range(loaded.vocab_size)]
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    loaded.save(folder)  # over itself
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == written
    assert written.keys() <= {"tokenizer.model", "tokenizer.json"}


def test_the_default_system_message_is_saved(tmp_path):
    template = "<|im_start|>system\\nYou are kind<|im_end|>"
    BPETokenizer(FIELDS["smollm"] | {"tokenizer.chat_template": template}).save(tmp_path)
    assert load_tokenizer(tmp_path).system == "You are kind"


def test_a_model_is_read_from_a_path_or_from_bytes(tmp_path):
    TOY.save(tmp_path)
    path = tmp_path / "tokenizer.model"
    for model in (path, str(path), path.read_bytes()):
        assert SentencePieceTokenizer(model).encode("Tom") == TOY.encode("Tom")


@BOTH_KINDS
def test_a_save_that_fails_leaves_the_old_file_and_no_other(tokenizer, tmp_path, monkeypatch):
    tokenizer.save(tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"the old file")

    def fail(*paths):
        raise OSError("disk full")

    monkeypatch.setattr(module.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        tokenizer.save(tmp_path)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"the old file"]


def test_two_tokenizers_do_not_share_a_folder(tmp_path):
    TOY.save(tmp_path / "a")
    with pytest.raises(ValueError, match="already has a tokenizer.model"):
        SMALL["smollm"].save(tmp_path / "a")
    SMALL["smollm"].save(tmp_path / "b")
    with pytest.raises(ValueError, match="already has a tokenizer.json"):
        TOY.save(tmp_path / "b")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match=r"has no tokenizer: expected tokenizer.model .* or tokenizer.json"):
            load_tokenizer(folder)
    for name in ("tokenizer.model", "tokenizer.json"):
        folder = tmp_path / name.replace(".", "_")
        (folder / name).mkdir(parents=True)
        with pytest.raises(ValueError, match="cannot read"):
            load_tokenizer(folder)
    with pytest.raises(ValueError, match="cannot read .*missing.model"):
        SentencePieceTokenizer(tmp_path / "missing.model")


def test_a_file_too_large_for_a_tokenizer_is_not_read(tmp_path, monkeypatch):
    TOY.save(tmp_path)
    size = (tmp_path / "tokenizer.model").stat().st_size
    monkeypatch.setattr(module, "MAX_FILE_BYTES", size - 1)
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("it was read"))
    with pytest.raises(ValueError, match=f"has {size} bytes"):
        load_tokenizer(tmp_path)


def use(tokenizer: Tokenizer) -> None:
    """A damaged file that still loads must work without a crash. What it encodes to is anybody's guess."""
    for text in ("Once upon a time, 123", "从前 🙂\n\t▁", "<s>\0"):
        try:
            tokenizer.decode(tokenizer.encode(text, eos=True, control=True))
        except ValueError as error:
            assert "cannot write" in str(error)


def test_a_sentencepiece_file_cut_anywhere_is_refused():
    for length in [*range(0, len(TOY._model), 7), *range(len(TOY._model) - 100, len(TOY._model))]:
        with pytest.raises(ValueError, match="damaged") as caught:
            SentencePieceTokenizer(TOY._model[:length])
        assert type(caught.value) is ValueError and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="damaged"):  # four bytes are announced; none may be taken from elsewhere
        SentencePieceTokenizer(TOY._model + bytes([15 << 3 | 2, 4]))
    with pytest.raises(ValueError, match="damaged"):  # nor from a template
        SentencePieceTokenizer(TOY._model + bytes([15 << 3 | 2, 4]), template="\0\0")


@settings(max_examples=400)
@given(
    edits=st.lists(
        st.tuples(st.integers(0, len(TOY._model) - 1), st.integers(0, 6), st.binary(max_size=8)), min_size=1, max_size=6
    )
)
def test_a_damaged_sentencepiece_file_is_refused_or_works(edits):
    data = TOY._model
    for at, removed, inserted in edits:
        data = data[:at] + inserted + data[at + removed :]
    try:
        tokenizer = SentencePieceTokenizer(data)
    except ValueError as error:
        assert type(error) is ValueError and str(error)
    else:
        use(tokenizer)


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_garbage_is_not_a_sentencepiece_file(data):
    with pytest.raises(ValueError, match="the SentencePiece model is damaged"):
        SentencePieceTokenizer(data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "unigram"}, "trainer_spec.model_type is 1, not 2"),
        ({"byte_fallback": False}, "trainer_spec.byte_fallback is 0, not 1"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalizer_spec.precompiled_charsmap is b'"),
        ({"remove_extra_whitespaces": True}, "normalizer_spec.remove_extra_whitespaces is 1, not 0"),
        ({"treat_whitespace_as_suffix": True}, "trainer_spec.treat_whitespace_as_suffix is 1, not 0"),
    ],
)
def test_sentencepiece_models_that_change_text_are_refused_by_name(options, message, tmp_path):
    settings = (
        dict(
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            vocab_size=400,
            remove_extra_whitespaces=False,
            minloglevel=2,
            hard_vocab_limit=False,
        )
        | options
    )
    with open(tmp_path / "other.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.Train(sentence_iterator=iter(TEXTS), model_writer=file, **settings)
    with pytest.raises(ValueError, match=message):
        SentencePieceTokenizer(tmp_path / "other.model")


def test_a_model_without_the_space_before_a_text_is_read_as_such(tmp_path):
    with open(tmp_path / "bare.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(TEXTS),
            model_writer=file,
            vocab_size=400,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            minloglevel=2,
        )
    tokenizer = SentencePieceTokenizer(tmp_path / "bare.model")
    assert tokenizer.decode(tokenizer.encode("Tom")[:1])[0] == "T"
    assert tokenizer.decode(tokenizer.encode(" Tom")) == " Tom"
    assert tokenizer.pad_id == tokenizer.eos_id  # it has no padding token


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
)
STORED = json.dumps({name: value for name, value in GOOD.items() if name.startswith("tokenizer.")})


@settings(max_examples=300)
@given(name=st.sampled_from(sorted(json.loads(STORED))), value=json_values, item=st.integers(0, 10**6))
def test_a_tokenizer_json_with_a_wrong_value_is_refused_or_works(name, value, item, tmp_path_factory):
    data = json.loads(STORED)
    if isinstance(data[name], list) and item % 2:
        data[name][item % len(data[name])] = value
    else:
        data[name] = value
    folder = tmp_path_factory.getbasetemp() / "wrong_value"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    try:
        tokenizer = load_tokenizer(folder)
    except ValueError as error:
        assert type(error) is ValueError and "tokenizer.json is damaged" in str(error)
    else:
        use(tokenizer)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"7",
        b'"x"',
        b"{}",
        b"\xff\xfe{}",
        b"[" * 200_000,
        STORED.encode()[:-1],
        b'{"model": {"type": "BPE"}, "added_tokens": []}',
        b"1" * 5000,
    ],
)
def test_a_tokenizer_json_that_is_none_is_refused(data, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(ValueError, match="tokenizer.json is damaged") as caught:
        load_tokenizer(tmp_path)
    assert type(caught.value) is ValueError and len(str(caught.value)) < 500
