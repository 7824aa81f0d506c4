"""Fine-tuning: what of a chat is scored, chats that share a row, LoRA, the classifier, and runs that lose nothing."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minillama import data, finetune, world
from minillama.checkpoint import load, save
from minillama.checkpoint.load import find_checkpoint, open_checkpoint
from minillama.cli import main
from minillama.config import ModelConfig
from minillama.data import Batch
from minillama.finetune import (
    TARGETS,
    ChatBatches,
    Classifier,
    ClassifierTrainer,
    LoraLinear,
    LoraTrainer,
    Row,
    TaskBatches,
    add_lora,
    chat_row,
    chat_rows,
    label_batch,
    load_adapter,
    load_classifier,
    merge,
    pack,
    read_chats,
    renew,
    save_adapter,
    save_classifier,
    task_validation,
    unmerge,
)
from minillama.loss import IGNORE, cross_entropy
from minillama.model import Llama
from minillama.quantize import quantize
from minillama.tokenizer import BPETokenizer, SentencePieceTokenizer, Tokenizer
from minillama.trainer import Trainer, TrainSettings, batch_loss, checkpoints, mean_loss

TOY = Path(finetune.__file__).parents[1] / "data" / "toy"
CONFIG = ModelConfig(
    dim=48, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=10, ffn_dim=56,
    vocab_size=2048, max_seq_len=400, tie_embeddings=True,
)  # fmt: skip
SETTINGS = TrainSettings(steps=8, warmup=2, learning_rate=0.01, save_every=2, validate_every=4, optimizer="adamw")


def make_model(config: ModelConfig = CONFIG, seed: int = 1) -> Llama:
    """Large random weights, so that a fault moves every number."""
    torch.manual_seed(seed)
    model = Llama(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.uniform_(0.5, 1.5) if weight.dim() == 1 else weight.normal_(std=0.2 if "embed" in name else 0.25)
    return model


def make_lora(**options) -> Llama:
    model = add_lora(make_model(), **{"rank": 3, "alpha": 5, "targets": ["wq", "wk", "wo", "down"], **options})
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoraLinear):
                module.b.normal_(std=0.2)
    return model


def row_of(length: int, seed: int = 0) -> Row:
    tokens = torch.randint(2048, (length + 1,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    return Row(tokens[:-1], tokens[1:].masked_fill(torch.arange(length) < length // 2, IGNORE))


def talk(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


# ---------------------------------------------------------------------------------------------------------------------
# Chats.


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    toy = SentencePieceTokenizer(TOY / "tokenizer.model")
    smollm2 = open_checkpoint(find_checkpoint("smollm2")).tokenizer
    assert isinstance(smollm2, BPETokenizer)
    marks = {"<|im_start|>": "<|start_header_id|>", "<|im_end|>": "<|eot_id|>", "<repo_name>": "<|end_header_id|>"}
    fields = {**smollm2._fields, "tokenizer.ggml.pre": "llama-bpe", "tokenizer.chat_template": ""}
    fields["tokenizer.ggml.tokens"] = [marks.get(token, token) for token in fields["tokenizer.ggml.tokens"]]
    llama2 = SentencePieceTokenizer(TOY / "tokenizer.model", template="{{ bos_token + '[INST] ' }}<<SYS>>")
    return {"chatml": toy, "smollm2": smollm2, "llama3": BPETokenizer(fields), "llama2": llama2}


kinds_of_chat = pytest.mark.parametrize("kind", ["chatml", "smollm2", "llama3", "llama2"])
TALKS = [
    talk("Where is the kite?", "under the tree"),
    talk("Hi.", "Hello, Tom.", "Why?", "because", "Say it in Chinese.", "风筝在树下。", system="Be short."),
]


@kinds_of_chat
@pytest.mark.parametrize("messages", TALKS, ids=["one turn", "three turns"])
def test_scored_is_what_the_assistant_says_after_the_very_prompt_that_it_is_given(kind, messages, tokenizers):
    tokenizer = tokenizers[kind]
    inputs, targets = (part.tolist() for part in chat_row(tokenizer, messages))
    whole = [*inputs, targets[-1]]
    assert whole == tokenizer.chat(messages, reply=False)[: len(whole)]
    scored = set()
    for n, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = tokenizer.chat(messages[:n])
            assert whole[: len(prompt)] == prompt
            end = next(i for i in range(len(prompt), len(whole)) if targets[i - 1] in tokenizer.stop_ids)
            scored |= set(range(len(prompt) - 1, end))
            answer = targets[len(prompt) - 1 : end]
            assert answer == whole[len(prompt) : end + 1]  # from the answer's first token to the end of turn
            assert tokenizer.decode(answer, start=False).strip() == message["content"]
    assert {i for i, target in enumerate(targets) if target != IGNORE} == scored
    assert max(scored) == len(targets) - 1


def test_the_default_system_message_is_in_the_row_as_in_the_prompt(tokenizers):
    text = tokenizers["smollm2"].decode(chat_row(tokenizers["smollm2"], talk("Hi.", "Hello.")).inputs, control=True)
    assert text.startswith("<|im_start|>system\nYou are") and text.endswith("<|im_start|>assistant\nHello.")


def test_an_answer_that_melts_into_the_prompt_is_refused(tokenizers):
    with pytest.raises(ValueError, match=r"message 2 is '\\n\\n\\nHello', whose beginning the tokenizer joins"):
        chat_row(tokenizers["smollm2"], talk("Hi.", "\n\n\nHello"))


def test_a_chat_without_an_answer_is_refused(tokenizers):
    with pytest.raises(ValueError, match="the last message is from the user, expected one from the assistant"):
        chat_row(tokenizers["chatml"], talk("Hi."))


def test_a_chat_longer_than_the_context_is_named_not_cut(tokenizers, tmp_path):
    (path := tmp_path / "chats.jsonl").write_text(
        "".join(json.dumps({"messages": talk(question, "Yes.")}) + "\n" for question in ("Is it?", "Is it so? " * 40))
    )
    rows = [chat_row(tokenizers["chatml"], chat.messages) for chat in read_chats(path)]
    long = len(rows[1].inputs)
    assert len(chat_rows(path, tokenizers["chatml"], long)) == 2
    with pytest.raises(ValueError, match=rf"chats.jsonl, line 2: the chat has \d+ tokens, expected at most {long - 1}"):
        chat_rows(path, tokenizers["chatml"], long - 1)


def lines(tmp_path: Path, *rows: bytes | str | list) -> Path:
    path = tmp_path / "chats.jsonl"
    as_bytes = (
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps({"messages": row})).encode()
        for row in rows
    )
    path.write_bytes(b"".join(row + b"\n" for row in as_bytes))
    return path


def test_chats_come_one_at_a_time_with_the_numbers_of_their_lines(tmp_path):
    other = json.dumps({"messages": TALKS[1], "source": "elsewhere"})
    path = lines(tmp_path, b"\xef\xbb\xbf" + json.dumps({"messages": TALKS[0]}).encode(), "", " \t", other, "no JSON")
    chats = read_chats(path)
    assert next(chats) == (1, TALKS[0]) and next(chats) == (4, TALKS[1])
    with pytest.raises(ValueError, match="chats.jsonl, line 5 is not JSON: Expecting value at column 1"):
        next(chats)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("[1, 2]", r"expected \{\"messages\": \[...\]\} .*, got \[1, 2\]"),
        ('{"text": "a"}', r"got \{'text': 'a'\}"),
        ('{"messages": []}', "at least one message"),
        ([{"role": "user"}], "message 1 is .*expected"),
        ([*TALKS[0], "x"], "message 3 is 'x', expected"),
        ([{"role": "user", "content": "a", "name": "b"}], "message 1 is .*'name'"),
        ([{"role": "tool", "content": "a"}], "message 1 has the role 'tool', expected system or user or assistant"),
        ([{"role": ["user"], "content": "a"}], r"message 1 has the role \['user'\]"),
        (
            [*TALKS[0], {"role": "system", "content": "a"}],
            "message 3 has the role 'system', expected user or assistant",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 1 has the content .*, expected text"),
        (
            [*TALKS[0], {"role": "user", "content": "a"}],
            "the last message is from the user, expected one from the assist",
        ),
        ('{"messages": [{"role": "assistant", "content": "\\ud800"}]}', "surrogates not allowed"),
        (b'{"messages": "\xff"}', "is not UTF-8: byte 14 is 0xff"),
        ("[" * 100_000, "recursion"),
        ('{"messages": ' + "1" * 10_000 + "}", ""),
    ],
)
def test_a_bad_line_is_named_with_what_is_wrong(row, message, tmp_path):
    with pytest.raises(ValueError, match=rf"chats.jsonl, line 2.*{message}.*\.$"):
        list(read_chats(lines(tmp_path, TALKS[0], row, TALKS[0])))


def test_a_line_without_end_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_LINE_BYTES", 100)
    with pytest.raises(ValueError, match="line 2: it has more than 100 bytes"):
        list(read_chats(lines(tmp_path, "", "x" * 200)))


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["user", "assistant", "system"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["messages", "role", "content", "x"]), inner, max_size=3)
    ),
)


@given(
    st.lists(
        st.binary(max_size=30)
        | anything.map(lambda value: json.dumps(value).encode())
        | st.lists(st.text(max_size=9), min_size=2, max_size=4).map(
            lambda texts: json.dumps({"messages": talk(*texts[: len(texts) // 2 * 2])}).encode()
        ),
        max_size=4,
    )
)
@example([b"\x00", b""])
@example([b'{"messages": NaN}'])
def test_any_file_is_chats_or_one_sentence_that_names_a_line(tmp_path_factory, rows):
    path = lines(tmp_path_factory.getbasetemp(), *rows)
    try:
        chats = list(read_chats(path))
    except ValueError as error:
        assert "chats.jsonl, line " in str(error)
    else:
        assert all(chat.messages[-1]["role"] == "assistant" for chat in chats)
        assert all(type(message["content"]) is str for chat in chats for message in chat.messages)


def test_a_file_without_chats_is_refused(tokenizers, tmp_path):
    with pytest.raises(ValueError, match="has no chats"):
        chat_rows(lines(tmp_path, "", ""), tokenizers["chatml"], 99)


# ---------------------------------------------------------------------------------------------------------------------
# Rows that share a place.


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20))
def test_each_row_lies_whole_in_one_place_and_nothing_is_padding_that_need_not_be(lengths):
    rows = [row_of(length, seed) for seed, length in enumerate(lengths)]
    batch = pack(rows, pad_id=3)
    assert batch.inputs.shape[1] == max(lengths)
    segments = batch.segments if batch.segments is not None else torch.zeros_like(batch.inputs)
    found = []
    for inputs, targets, numbers in zip(batch.inputs, batch.targets, segments, strict=True):
        for number in range(int(numbers.max()) + 1):
            here = numbers == number
            length = len(rows[0].inputs) if batch.segments is None and len(rows) == 1 else int(here.sum())
            found.append((tuple(inputs[here][:length].tolist()), tuple(targets[here][:length].tolist())))
    if batch.segments is not None:
        assert sorted(found) == sorted((tuple(i.tolist()), tuple(t.tolist())) for i, t in rows)
        assert (batch.targets[segments < 0] == IGNORE).all() and (batch.inputs[segments < 0] == 3).all()
    else:
        assert len(batch.inputs) == len(rows)
    free = [int(places) for places in (batch.inputs.shape[1] - (segments >= 0).sum(1))]
    assert batch.segments is None or sum(sorted(free)[:-1]) <= len(free) * max(lengths) / 2 + 1
    assert batch.scored == sum(int((row.targets != IGNORE).sum()) for row in rows)


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "readable"])
def test_packed_rows_have_the_loss_and_the_gradients_of_the_rows_one_by_one(fast):
    model, rows = make_model(), [row_of(length, length) for length in (53, 20, 17, 15, 31, 9)]
    for block in model.blocks:
        block.attention.fast = fast
    batch = pack(rows, 0)
    assert len(batch.inputs) == 3 and batch.segments is not None
    batch_loss(model, batch).backward()
    packed = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    total = 0.0
    for inputs, targets in rows:
        loss = cross_entropy(model(inputs[None].long()), targets[None].long())
        part = loss * int((targets != IGNORE).sum()) / batch.scored
        part.backward()
        total += part.item()
    assert batch_loss(model, batch).item() == pytest.approx(total, rel=1e-6)
    for name, weight in model.named_parameters():
        assert (packed[name] - weight.grad).abs().max() <= 2e-5 * weight.grad.abs().max(), name


def in_8_bits(model: Llama) -> Llama:
    return quantize(model, "int8")


@pytest.mark.parametrize("kind", [lambda m: m, in_8_bits, lambda m: torch.compile(m, backend="eager")])
@torch.no_grad()
def test_no_chat_of_a_row_sees_another_and_each_begins_at_position_0(kind):
    config = ModelConfig.from_dict({**CONFIG.to_dict(), "head_dim": 16, "n_kv_heads": 2, "ffn_dim": 64, "dim": 64})
    model = kind(make_model(config))
    segments = torch.tensor([[0] * 9 + [1] * 14 + [-1] * 3])
    tokens = torch.randint(2048, (1, 26), generator=torch.Generator().manual_seed(5))
    other = torch.where(segments == 0, (tokens + 7) % 2048, tokens)
    packed = model(tokens, segments=segments)
    assert torch.equal(packed[:, 9:23], model(other, segments=segments)[:, 9:23])
    assert not torch.equal(packed[:, :9], model(other, segments=segments)[:, :9])
    tolerance = 0.02 if kind is in_8_bits else 1e-5
    assert (packed[:, 9:23] - model(tokens[:, 9:23])).abs().max() <= tolerance * packed.abs().max()
    assert packed.isfinite().all()


def test_every_round_has_each_chat_once_in_another_order():
    rows = [row_of(3 + i, i) for i in range(11)]
    batches = ChatBatches(rows, 0, batch_size=4, seed=7)
    rounds = [[pack_key(batches(3 * n + i)) for i in range(3)] for n in range(2)]
    for batch_of_rounds in rounds:
        assert sorted(sum(batch_of_rounds, [])) == sorted(int(row.inputs.sum()) for row in rows)
    assert rounds[0] != rounds[1]
    again = ChatBatches(rows, 0, batch_size=4, seed=7)
    assert torch.equal(again(4).inputs, batches(4).inputs)
    assert pack_key(ChatBatches(rows, 0, 4, seed=8)(0)) != rounds[0][0]


def pack_key(batch: Batch) -> list[int]:
    """The sum of each chat's tokens."""
    segments = batch.segments if batch.segments is not None else torch.zeros_like(batch.inputs)
    return [
        int(inputs[numbers == n].sum())
        for inputs, numbers in zip(batch.inputs, segments, strict=True)
        for n in range(int(numbers.max()) + 1)
    ]


@pytest.mark.parametrize("kinds", [["mood"], ["question", "translation"]], ids="+".join)
def test_tasks_are_the_worlds_with_their_answers_and_new_at_every_step(kinds, tokenizers):
    tokenizer = tokenizers["chatml"]
    batches = TaskBatches(tokenizer, kinds, batch_size=6, steps=30, seed=3)
    seen, excerpts, found = [], [], set()
    for step in [*range(4), *range(20, 28)]:
        batch = batches(step)
        assert torch.equal(batch.inputs, TaskBatches(tokenizer, kinds, 6, 30, 3)(step).inputs)
        segments = batch.segments if batch.segments is not None else torch.zeros_like(batch.inputs)
        for inputs, numbers in zip(batch.inputs, segments, strict=True):
            for n in range(int(numbers.max()) + 1):
                text = tokenizer.decode(inputs[numbers == n].tolist(), control=True).split("<pad>")[0]
                turns = re.split(r"(?:<\|im_end\|>\n)?<\|im_start\|>(?:user|assistant)\n", text)[1:]
                told, turns[0] = turns[0].split("\n")
                asked = dict(zip(turns[::2], turns[1::2], strict=True))
                try:
                    story = world.read(told)  # refuses what is held out
                except world.Fault:
                    excerpts.append((told, asked))
                    continue
                (kind,) = {task.kind for task in world.tasks(story) if task.prompt == f"{told}\n{turns[0]}"}
                right = [task for task in world.tasks(story) if task.kind == kind]
                assert asked == {task.prompt.split("\n")[1]: f" {task.answer}" for task in right}
                found.add(kind)
                seen.append(story.text)
    assert (
        found == set(kinds)
        and len(set(seen)) == len(seen)
        and len(seen) + len(excerpts) == (72 if kinds == ["mood"] else 48)
    )
    if kinds == ["mood"]:
        assert not excerpts
    else:
        assert 24 < len(excerpts) < 46 and len({told for told, _ in excerpts}) > 20
        for told, asked in excerpts:
            for question, answer in asked.items():
                assert question == "Say it in Chinese." or answer.strip().removeprefix("because ") in told


def test_chats_of_like_length_share_a_batch(tokenizers):
    batches = TaskBatches(tokenizers["chatml"], ["mood"], 4, 48)
    first = [batches(step) for step in range(TaskBatches.GROUP)]
    lengths = [(batch.inputs != tokenizers["chatml"].pad_id).sum(1) for batch in first]
    ranges = sorted((int(length.min()), int(length.max())) for length in lengths)
    assert all(high <= low for (_, high), (low, _) in zip(ranges, ranges[1:], strict=False))
    assert [int(length.min()) for length in lengths] != sorted(int(length.min()) for length in lengths)


def test_kinds_that_the_world_does_not_have_are_refused(tokenizers):
    for kinds in (["joke"], "mood", []):
        with pytest.raises(ValueError, match="expected a list of some of mood, question"):
            TaskBatches(tokenizers["chatml"], kinds, 4, 9)


def test_validation_tasks_have_a_floor_but_for_stories(tokenizers):
    validation = task_validation(tokenizers["chatml"], ["mood"], 10, seed=0, batch_size=4)
    assert validation.floor == 0 and sum(len(pack_key(batch)) for batch in validation.batches) == 10
    assert task_validation(tokenizers["chatml"], ["mood", "story"], 3, seed=0).floor is None


def test_renewed_blocks_are_those_of_a_new_model_and_the_rest_stays():
    model, before = make_model(), make_model()
    state = torch.get_rng_state()
    renewed = renew(model, 1, seed=4)
    assert renewed is model and torch.equal(torch.get_rng_state(), state)
    for (name, now), was in zip(model.named_parameters(), before.parameters(), strict=True):
        last = name.startswith(f"blocks.{CONFIG.n_layers - 1}.")
        assert torch.equal(now, was) != (last or name == "embedding.weight"), name
        if last and name.endswith(("wo.weight", "down.weight")):
            assert not now.any()
    shaken = (model.embedding.weight - before.embedding.weight).norm(dim=1) / before.embedding.weight.norm(dim=1).mean()
    assert 0.38 < shaken.mean() < 0.42
    other = renew(make_model(), 1, seed=5)
    assert not torch.equal(other.blocks[-1].attention.wq.weight, model.blocks[-1].attention.wq.weight)
    for blocks in (0, CONFIG.n_layers + 1):
        with pytest.raises(ValueError, match=f"{blocks} blocks are to be new, expected 1 to {CONFIG.n_layers}"):
            renew(make_model(), blocks)


# ---------------------------------------------------------------------------------------------------------------------
# LoRA. Against peft: see parity/test_lora.py.


@torch.no_grad()
def test_the_formula_of_the_paper():
    model = make_lora()
    layer, x = model.blocks[1].attention.wq, torch.randn(2, 7, CONFIG.dim)
    expected = x @ layer.weight.T + 5 / 3 * ((x @ layer.a.T) @ layer.b.T)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x @ layer.merged().T, expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_begins_as_nothing_and_only_it_is_trained():
    tokens = torch.arange(20)[None]
    before = make_model()(tokens)
    model = add_lora(make_model(), 4, 8, ["wv", "gate"])
    after = model(tokens)
    assert torch.equal(before, after)
    after.square().sum().backward()
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {
        f"blocks.{i}.{place}.{part}"
        for i in range(2)
        for place in ("attention.wv", "feedforward.gate")
        for part in "ab"
    }
    assert {name for name, weight in model.named_parameters() if weight.grad is not None} == trained
    sizes = {name: tuple(weight.shape) for name, weight in model.named_parameters() if name in trained}
    assert sizes["blocks.0.attention.wv.a"] == (4, 48) and sizes["blocks.0.feedforward.gate.b"] == (56, 4)
    assert all(weight.std() > 0.05 for name, weight in model.named_parameters() if name.endswith(".a"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_merged_it_gives_the_same_and_unmerged_the_very_bits(dtype):
    model, tokens = make_lora(), torch.arange(20)[None]
    for weight in model.parameters():
        if not weight.requires_grad:
            weight.data = weight.data.to(dtype)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    logits = model(tokens)
    merged = merge(model)(tokens)
    tolerance = 1e-5 if dtype is torch.float32 else 0.1
    assert (merged - logits).abs().max() <= tolerance * logits.abs().max()
    assert model.state_dict().keys() == make_model().state_dict().keys()
    assert torch.equal(unmerge(model)(tokens), logits)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert {n for n, w in model.named_parameters() if w.requires_grad} == {n for n in before if n[-2:] in (".a", ".b")}


@torch.no_grad()
def test_a_model_with_an_adapter_beside_its_weights_is_not_saved_as_if_it_had_none(tmp_path):
    with pytest.raises(ValueError, match=r"blocks.0.attention.wq.a\).*merge it first, or write it with save_adapter"):
        save(make_lora(), None, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_classifier_in_bf16_takes_the_mean_in_fp32():
    exact = Classifier(make_model(), 3)
    tokens = torch.arange(780).view(2, 390)
    with torch.no_grad():
        mean = exact.bfloat16().model.hidden(tokens).double().mean(1)
        expected = exact.head(mean.bfloat16())
        assert torch.equal(exact(tokens), expected)
        assert torch.equal(exact(tokens, torch.zeros_like(tokens)), expected)


def test_a_merged_model_is_saved_as_a_whole_one(tmp_path):
    model, tokens = merge(make_lora()), torch.arange(20)[None]
    save(model, None, tmp_path / "whole")
    assert torch.equal(load(tmp_path / "whole")[0](tokens), model(tokens))


def test_what_cannot_be_adapted_is_refused(tmp_path):
    for options, message in (
        ({"rank": 0}, "rank is 0"),
        ({"rank": 2.0}, "rank is 2.0"),
        ({"alpha": -1}, "alpha -1"),
        ({"alpha": float("inf")}, "alpha inf"),
        ({"targets": ["q_proj"]}, r"targets are \['q_proj'\], expected .* wq, wk, wv, wo, gate, up, down"),
        ({"targets": "wq"}, "targets are 'wq'"),
        ({"targets": []}, "targets are"),
    ):
        with pytest.raises(ValueError, match=message):
            add_lora(make_model(), **{"rank": 2, "alpha": 4, **options})
    with pytest.raises(ValueError, match="in 8 or 4 bits"):
        add_lora(quantize(make_model(), "int8"), 2, 4)
    with pytest.raises(ValueError, match="has an adapter, and can have one"):
        add_lora(make_lora(), 2, 4)
    with pytest.raises(ValueError, match="has an adapter, and can have one"):
        add_lora(merge(make_lora()), 2, 4)
    with pytest.raises(ValueError, match="no adapter, or a merged one"):
        merge(make_model())
    with pytest.raises(ValueError, match="merge comes first"):
        unmerge(make_lora())
    with pytest.raises(ValueError, match="no adapter, or a merged one"):
        save_adapter(merge(make_lora()), tmp_path / "x")
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(ValueError, match="not an empty folder"):
        save_adapter(make_lora(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    save_adapter(make_lora(targets=list(TARGETS)), folder := tmp_path_factory.mktemp("adapter") / "a")
    return folder


@torch.no_grad()
def test_an_adapter_comes_back_to_the_bit(adapter):
    model, tokens = load_adapter(make_model(), adapter), torch.arange(30)[None]
    expected = make_lora(targets=list(TARGETS))
    assert torch.equal(model(tokens), expected(tokens))
    layer = model.blocks[0].attention.wq
    layer.a.zero_()
    assert load_adapter(model, adapter).blocks[0].attention.wq is layer  # an optimizer holds on to these parameters
    assert torch.equal(model(tokens), expected(tokens))


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w | {FIRST: torch.zeros(3, 47)},
            r"q_proj.lora_A.weight has the shape \(3, 47\), expected \(3, 48\)",
        ),
        (lambda w: w | {FIRST: torch.zeros(3)}, r"has the shape \(3,\), expected \(3, 48\)"),
        (lambda w: w | {FIRST: torch.zeros(3, 48, dtype=torch.int64)}, "is I64, expected F32, BF16 or F16"),
        (lambda w: {k: v for k, v in w.items() if k != FIRST}, "lacks .*q_proj.lora_A.weight .1 tensors of 28"),
        (lambda w: w | {"base_model.model.lm_head.weight": torch.zeros(2)}, "has the tensor 'base_model.model.lm_head"),
    ],
)
def test_an_adapter_whose_tensors_do_not_fit_is_refused_and_the_model_stays_as_it_was(
    change, message, adapter, tmp_path
):
    shutil.copytree(adapter, folder := tmp_path / "a")
    save_file(change(load_file(adapter / finetune.ADAPTER)), folder / finetune.ADAPTER)
    model = make_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_adapter(model, folder)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": True}, "r is True"),
        ({"r": None}, "r is None"),
        ({"r": 10**9}, r"has the shape \(3, 48\), expected \(1000000000, 48\)"),
        ({"lora_alpha": "5"}, "lora_alpha '5'"),
        ({"lora_alpha": float("nan")}, "lora_alpha nan"),
        ({"target_modules": "q_proj|v_proj"}, "target_modules is 'q_proj|v_proj'"),
        ({"target_modules": [["q_proj"]]}, "target_modules is"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', expected 'LORA'"),
        ({"use_dora": True}, "use_dora = True"),
        ({"of_next_year": {"x": 1}}, "of_next_year = "),
    ],
)
def test_an_adapters_settings_that_do_not_fit_are_refused_by_name(change, message, adapter, tmp_path):
    shutil.copytree(adapter, folder := tmp_path / "a")
    settings = json.loads((adapter / finetune.ADAPTER_CONFIG).read_text())
    (folder / finetune.ADAPTER_CONFIG).write_text(json.dumps(settings | change))
    with pytest.raises(ValueError, match=message):
        load_adapter(make_model(), folder)


def test_a_damaged_or_pickled_adapter_is_refused(adapter, tmp_path):
    shutil.copytree(adapter, folder := tmp_path / "a")
    data = (folder / finetune.ADAPTER).read_bytes()
    for cut in (0, 7, 200, len(data) - 1):
        (folder / finetune.ADAPTER).write_bytes(data[:cut])
        with pytest.raises(ValueError, match="cannot read .*adapter_model.safetensors"):
            load_adapter(make_model(), folder)
    (folder / finetune.ADAPTER).unlink()
    torch.save(load_file(adapter / finetune.ADAPTER), folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="cannot read .*adapter_model.safetensors"):
        load_adapter(make_model(), folder)
    (folder / finetune.ADAPTER_CONFIG).write_text("[")
    with pytest.raises(ValueError, match="adapter_config.json is damaged"):
        load_adapter(make_model(), folder)


def test_an_adapter_for_other_sizes_than_the_models_is_refused(adapter):
    with pytest.raises(ValueError, match="rank 3 and alpha 5 .*has another already"):
        load_adapter(make_lora(rank=2, targets=list(TARGETS)), adapter)
    with pytest.raises(ValueError, match="in 8 or 4 bits"):
        load_adapter(quantize(make_model(), "int8"), adapter)


# ---------------------------------------------------------------------------------------------------------------------
# The classifier.


@torch.no_grad()
def test_the_mean_is_over_real_tokens_only():
    classifier = Classifier(make_model(), 5)
    texts = [torch.randint(2048, (length,), generator=torch.Generator().manual_seed(length)) for length in (4, 19, 11)]
    alone = torch.stack([classifier.model.hidden(text[None])[0].mean(0) for text in texts]) @ classifier.head.weight.T
    batch = label_batch([text.tolist() for text in texts], [0, 4, 2], pad_id=3)
    together = classifier(batch.inputs, batch.segments)
    assert batch.inputs.shape == (3, 19) and together.shape == (3, 5)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    other = torch.where(batch.segments < 0, 77, batch.inputs)
    assert torch.equal(classifier(other, batch.segments), together)
    torch.testing.assert_close(classifier(texts[1][None]), alone[1:2], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_texts_that_share_a_row_are_pooled_each_by_itself():
    classifier = Classifier(make_model(), 3)
    texts = [torch.randint(2048, (length,), generator=torch.Generator().manual_seed(length)) for length in (4, 6, 11)]
    tokens = torch.stack([torch.cat([*texts[:2], torch.tensor([3])]), texts[2]])
    segments = torch.tensor([[0] * 4 + [1] * 6 + [-1], [0] * 11])
    expected = torch.cat([classifier(text[None]) for text in texts])
    torch.testing.assert_close(classifier(tokens, segments), expected, rtol=1e-5, atol=1e-5)


def labelled(step: int) -> Batch:
    """Texts of one repeated token: below 1000 class 0, above it class 1."""
    rng = random.Random(step)
    tokens = [rng.randrange(2048) for _ in range(8)]
    return label_batch([[token] * rng.randint(1, 5) for token in tokens], [int(token > 1000) for token in tokens], 3)


def make_classifier() -> Classifier:
    torch.manual_seed(2)
    return Classifier(Llama(CONFIG), 2)


def test_a_classifier_learns_and_comes_back_and_a_stopped_run_ends_as_a_whole_one(tmp_path):
    def run(folder: Path, stop: int | None = None) -> ClassifierTrainer:
        trainer = ClassifierTrainer(make_classifier(), None, labelled, SETTINGS, folder, on_step=stop_at(stop))
        trainer.run()
        return trainer

    whole = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "stopped", stop=5)
    resumed = run(tmp_path / "stopped")
    assert_same_run(whole, resumed)
    loaded, tokenizer = load_classifier(checkpoints(tmp_path / "stopped")[-1])
    batch = labelled(99)
    with torch.no_grad():
        assert tokenizer is None and torch.equal(loaded(batch.inputs, batch.segments),
                                                 whole.model(batch.inputs, batch.segments))  # fmt: skip
    with pytest.raises(ValueError, match="holds a classifier with 2 classes .* not 3"):
        ClassifierTrainer(Classifier(Llama(CONFIG), 3), None, labelled, SETTINGS, tmp_path / "whole").run()


def test_what_cannot_be_a_classifier_is_refused(tmp_path):
    with pytest.raises(ValueError, match="n_classes is 1, expected"):
        Classifier(make_model(), 1)
    with pytest.raises(ValueError, match="in 8 or 4 bits"):
        Classifier(quantize(make_model(), "int8"), 2)
    save_classifier(make_classifier(), None, folder := tmp_path / "c")
    with pytest.raises(ValueError, match="not an empty folder"):
        save_classifier(make_classifier(), None, folder)
    save_file({"head.weight": torch.zeros(2, 47)}, folder / finetune.HEAD)
    with pytest.raises(ValueError, match=r"head.weight has the shape \(2, 47\), expected \(None, 48\)"):
        load_classifier(folder)
    (folder / finetune.HEAD).unlink()
    with pytest.raises(ValueError, match="cannot read .*classifier.safetensors"):
        load_classifier(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Runs.


class Killed(Exception):
    pass


def stop_at(step: int | None):
    def on_step(record: dict) -> None:
        if record["step"] == step:
            raise Killed

    return on_step


def assert_same_run(one: Trainer, other: Trainer) -> None:
    (weights, records), (other_weights, other_records) = (
        (t.model.state_dict(), [{k: v for k, v in r.items() if k != "seconds"} for r in t.records])
        for t in (one, other)
    )
    assert records == other_records and len(records) == SETTINGS.steps
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_lora_run_that_was_stopped_ends_with_the_bits_of_one_that_was_not(precision, tokenizers, tmp_path):
    settings = TrainSettings(**{**vars(SETTINGS), "precision": precision})

    def run(folder: Path, stop: int | None = None) -> LoraTrainer:
        torch.manual_seed(4)
        model = add_lora(make_model(), 4, 8, ["wq", "wv", "down"])
        tasks = TaskBatches(tokenizers["chatml"], ["mood"], 2, 9)
        batches = [tasks(0), tasks(1)]
        validation = task_validation(tokenizers["chatml"], ["mood"], 3, seed=0)
        trainer = LoraTrainer(
            model, None, lambda step: batches[step % 2], settings, folder, validation, on_step=stop_at(stop)
        )
        trainer.run()
        return trainer

    whole = run(tmp_path / "whole")
    for stop in (3, 7):  # in the middle between two checkpoints
        with pytest.raises(Killed):
            run(tmp_path / "stopped", stop)
    resumed = run(tmp_path / "stopped")
    assert_same_run(whole, resumed)
    base = make_model().state_dict()
    assert all(torch.equal(weight, whole.model.state_dict()[name]) for name, weight in base.items())
    assert {path.name for path in checkpoints(tmp_path / "whole")[-1].iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "trainer.pt",
    }  # fmt: skip
    assert whole.records[-1]["loss"] < whole.records[0]["loss"]


def test_no_logits_are_made_of_what_is_not_scored(monkeypatch):
    model, batch = make_model(), pack([row_of(20), row_of(30, 1)], 0)
    batch = Batch(batch.inputs, batch.targets.index_fill(1, torch.arange(18), IGNORE), batch.segments)
    expected = cross_entropy(model(batch.inputs), batch.targets)
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    scores, seen = model.scores, []
    monkeypatch.setattr(model, "scores", lambda x: (seen.append(x.shape), scores(x))[1])
    loss = batch_loss(model, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for got, want in zip(torch.autograd.grad(loss, list(model.parameters())), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert seen == [(batch.scored, CONFIG.dim)] and 0 < batch.scored < 0.5 * batch.targets.numel()


def test_the_whole_model_learns_tasks_by_the_same_trainer(tokenizers, tmp_path):
    torch.manual_seed(0)
    tokenizer = tokenizers["chatml"]
    trainer = Trainer(Llama(CONFIG), tokenizer, TaskBatches(tokenizer, ["mood"], 4, SETTINGS.steps), SETTINGS, tmp_path)
    trainer.run()
    validation = task_validation(tokenizer, ["mood"], 8, seed=0)
    assert mean_loss(trainer.model, validation.batches) < 7.3 < mean_loss(Llama(CONFIG), validation.batches)


# ---------------------------------------------------------------------------------------------------------------------
# The command.


@pytest.fixture
def cli(capsys, tmp_path, monkeypatch, tokenizers):
    """`minillama` in this process, in a folder with a small checkpoint and a file of 21 chats."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minillama.cli.finetune.VALIDATION_TASKS", 4)
    save(make_model(), tokenizers["chatml"], "small")
    Path("chats.jsonl").write_text(
        "".join(json.dumps({"messages": talk(f"Say {i}.", f"{i}.")}) + "\n" for i in range(21))
    )

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(list(arguments))
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return run


FEW = ("--steps", "2", "--batch-size", "3", "--precision", "float32", "--device", "cpu")


def test_a_whole_model_is_taught_by_a_file_and_chat_opens_it(cli, monkeypatch):
    code, out, err = cli("finetune", "--checkpoint", "small", "--data", "chats.jsonl", *FEW)
    assert code == 0 and "19 chats to learn from; the last 2 are held out" in err
    assert "Validation loss: " in out and "minillama chat --checkpoint runs/small-chats/step-2" in out
    model, tokenizer = load("runs/small-chats/step-2")
    assert tokenizer is not None and not torch.equal(model.embedding.weight, make_model().embedding.weight)
    for option, value, message in (("--seed", "1", "seed 0, not 1"), ("--renew", "1", "renew None, not 1")):
        code, _, err = cli("finetune", "--checkpoint", "small", "--data", "chats.jsonl", *FEW, option, value)
        assert code == 2 and f"holds a run with {message}" in err


def test_an_adapter_is_taught_by_tasks_and_used_with_its_model(cli):
    code, out, err = cli(
        "finetune", "--checkpoint", "small", "--task", "mood", "--lora", "2", "--targets", "wq,up", *FEW
    )
    assert code == 0 and "minillama chat --checkpoint small --adapter runs/small-mood-lora/step-2" in out
    note = json.loads(Path("runs/small-mood-lora/run.json").read_text())
    assert (note["lora"], note["alpha"], note["targets"]) == (2, 4, "wq,up") and note["data"].startswith("mood ")
    folder = Path("runs/small-mood-lora/step-2")
    weights = load_file(folder / finetune.ADAPTER)
    weights = {name: 3 * torch.randn_like(weight) for name, weight in weights.items()}
    save_file(weights, folder / finetune.ADAPTER)
    generate = ("generate", "Once", "--checkpoint", "small", "--seed", "0", "--max-new-tokens", "20")
    (_, plain, _), (code, adapted, _) = cli(*generate), cli(*generate, "--adapter", str(folder))
    assert code == 0 and plain != adapted


def test_the_toy_learns_one_task_by_its_recipe_but_for_what_is_given(cli, monkeypatch):
    monkeypatch.setitem(finetune.RECIPES, "mood", finetune.Recipe(3, 2, 1e-2, 1))
    calm = ("finetune", "--task", "mood", "--precision", "float32", "--device", "cpu")

    def run_of(*options):
        assert cli(*calm, *options, "--out", "run")[0] == 0
        note, last = json.loads(Path("run/run.json").read_text()), max(Path("run").glob("step-*")).name
        shutil.rmtree("run")
        return note["batch_size"], note["renew"], last

    assert run_of() == (2, 1, "step-3")
    assert run_of("--steps", "1", "--renew", "0", "--batch-size", "4") == (4, None, "step-1")
    assert run_of("--steps", "1", "--lora", "2") == (16, None, "step-1")
    assert run_of("--steps", "1", "--task", "summary", "--renew", "0")[0] == finetune.RECIPES["summary"].batch_size


def test_the_same_command_goes_on_and_other_options_are_one_sentence(cli):
    command = ["finetune", "--checkpoint", "small", "--data", "chats.jsonl", "--lora", "2", *FEW]
    assert cli(*command)[0] == 0 and cli(*command)[0] == 0
    for options, message in (
        (["--alpha", "3"], "holds a run with alpha 4, not 3"),
        (
            ["--task", "mood"],
            "--data is chats.jsonl and --task is mood, but a run learns from one of them: leave the other out",
        ),
        (["--targets", "q"], "targets are"),
        (["--data", "none.jsonl"], "No such file"),
    ):
        code, _, err = cli(*command, *options)
        assert code == 2 and message in err and err.count("\n") <= 2, err
    for options, message in (
        (["--task", "joke"], "--task is 'joke', expected all or one of mood, question"),
        (["--task", "mood", "--alpha", "3"], "--alpha is 3.0, but there is no --lora"),
        (["--renew", "1", "--lora", "2"], "--renew is 1 and --lora is 2, but LoRA keeps all weights"),
        (["--renew", "3"], "3 blocks are to be new, expected 1 to 2"),
    ):
        code, _, err = cli("finetune", "--checkpoint", "small", *FEW, *options)
        assert code == 2 and message in err, err
    Path("one.jsonl").write_text(json.dumps({"messages": talk("a", "b")}))
    code, _, err = cli("finetune", "--checkpoint", "small", "--data", "one.jsonl", *FEW)
    assert code == 2 and "one.jsonl has 1 chat, expected 2 at least" in err
