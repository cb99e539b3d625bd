"""Text: prompts worked by hand over a tokenizer of bytes, laws over five kinds of tokenizer, parity with chat templates."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from refrag.errors import InputError
from refrag.text import Chunk, ChunkedText, Passage, Prompt, PromptBuilder, Turn

BOS, EOS, PAD, HEADER, END_HEADER, EOT = 256, 257, 258, 259, 260, 261
CONTROL = ["<s>", "</s>", "<pad>", "<|start|>", "<|end|>", "<|eot_id|>"]

LLAMA_3_LIKE = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}<|end|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
WITHOUT_BOS = LLAMA_3_LIKE.removeprefix("{{ bos_token }}")
REFUSES_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}"
    "<|start|>{{ m['role'] }}\n{{ m['content'] }}<|eot_id|>{% endfor %}"
)
DROPS_SYSTEM = "{{ bos_token }}{% for m in messages %}{% if m['role'] != 'system' %}<|start|>{{ m['content'] }}<|eot_id|>{% endif %}{% endfor %}"
SYSTEM_IN_LAST_TURN = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}<|start|>{% if loop.last %}{{ system }}{% endif %}{{ m['content'] }}<|eot_id|>{% endfor %}"
)

SENTENCES = [
    "The lighthouse of Marrow Bay was built in 1873 by Ada Quill.",
    "Straße, naïve café, Ελληνικά, русский текст, 日本語のテキスト。",
    "<s> </s> <pad> <|start|> <|end|> <|eot_id|> <think> [x] and <|eot_id|>",
]
TEXTS = {
    "plain": "The lighthouse of Marrow Bay was built in 1873 by Ada Quill. It burned twice.",
    "accents": "café, naïve, Straße, cafe\u0301 with a combining accent",
    "emoji": "family 👨‍👩‍👧‍👦 flag 🇳🇱 thumbs 👍🏽 done 🎉🎉",
    "right to left": "مرحبا بالعالم، שלום עולם and \u202bmixed\u202c",
    "cjk": "日本語のテキスト。漢字かな交じり文",
    "whitespace": "  two leading,\ttab,\n\nnewlines,   and trailing  \n",
    "added word": "the QUAX-9 and QUAX-9s",
    "zero width": "a\u200bb\u00a0c\ufeffd",
}


def byte_tokenizer(chat_template: str | None = None, *, adds_bos: bool = False, think: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer whose ids are the UTF-8 bytes of the text; control tokens from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's byte alphabet
    other = (byte for byte in range(256) if byte not in printable)
    vocab = {chr(byte): byte for byte in printable} | {chr(256 + number): byte for number, byte in enumerate(other)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(CONTROL)
    if think:
        backend.add_tokens([AddedToken("<think>", special=False)])
    byte_level = processors.ByteLevel(trim_offsets=True)
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    backend.post_processor = processors.Sequence([byte_level, template]) if adds_bos else byte_level
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = chat_template
    return tokenizer


def _byte_level(*, ignore_merges: bool) -> Tokenizer:
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    # split at spaces only: "<|eot_id|>" stays one word, and the vocabulary holds it
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(SENTENCES * 3, trainers.BpeTrainer(vocab_size=420, special_tokens=CONTROL, initial_alphabet=alphabet, show_progress=False))
    return backend


def _sentencepiece_bpe() -> Tokenizer:
    """Llama-2's kind: no pre-tokenizer, byte fallback, and merges that would spell a control token."""
    pieces = ["<unk>", *CONTROL, *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz.,<>/|_", "<s", "</", "</s", "th", "▁th"]
    merges = [("<", "s"), ("<s", ">"), ("<", "/"), ("</", "s"), ("</s", ">"), ("t", "h"), ("▁", "th")]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["<unk>", *CONTROL])
    return backend


def _unigram() -> Tokenizer:
    """T5's kind: the control tokens are pieces of the vocabulary, with the best score of all."""
    letters = sorted(set("".join([*SENTENCES, *TEXTS.values()])) - {" "})
    pieces = [("<unk>", 0.0), *((token, 0.0) for token in CONTROL), ("▁", -2.0), *((letter, -5.0) for letter in letters), ("▁The", -3.0), ("light", -4.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.normalizer, backend.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<unk>", *CONTROL])
    return backend


def _words(model: models.Model, trainer: trainers.Trainer, normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if normalizer:
        backend.normalizer = normalizer
    backend.train_from_iterator(SENTENCES, trainer)
    return backend


WITH_UNKNOWN = {"special_tokens": ["<unk>", *CONTROL], "show_progress": False}
KINDS = {
    "byte-level BPE": lambda: _byte_level(ignore_merges=False),
    "byte-level BPE, ignore_merges": lambda: _byte_level(ignore_merges=True),
    "sentencepiece BPE": _sentencepiece_bpe,
    "Unigram": _unigram,
    "WordPiece": lambda: _words(models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer(vocab_size=300, **WITH_UNKNOWN), normalizers.BertNormalizer()),
    "WordLevel": lambda: _words(models.WordLevel(unk_token="<unk>"), trainers.WordLevelTrainer(**WITH_UNKNOWN)),
}


@pytest.fixture(scope="module", params=KINDS)
def any_tokenizer(request) -> PreTrainedTokenizerFast:
    unknown = {} if request.param.startswith("byte-level") else {"unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=KINDS[request.param](), bos_token="<s>", eos_token="</s>", pad_token="<pad>", **unknown)
    return tokenizer if tokenizer.add_tokens(["QUAX-9"]) else pytest.fail("the word was not added")


def ids(text: str) -> tuple[int, ...]:
    return tuple(text.encode())


def builder(chunk_size: int = 4, chat_template: str | None = None, **options: bool) -> PromptBuilder:
    return PromptBuilder(byte_tokenizer(chat_template, **options), chunk_size=chunk_size)


def shown(prompt: Prompt) -> list[str]:
    """The pieces as text; chunks in double brackets; control tokens as themselves."""

    def spell(token_ids: tuple[int, ...]) -> str:
        return "".join(chr(number) if number < 256 else [*CONTROL, "<think>"][number - 256] for number in token_ids)

    return [f"⟦{spell(piece.token_ids)}⟧" if isinstance(piece, Chunk) else spell(piece) for piece in prompt.pieces]


# --- worked by hand -------------------------------------------------------------------------------------------------


def test_byte_tokenizer_is_what_the_hand_work_assumes():
    tokenizer, text = byte_tokenizer(), "".join(map(chr, range(128))) + "é🎉"
    assert tokenizer(text, add_special_tokens=False).input_ids == list(text.encode())
    assert tokenizer.convert_tokens_to_ids(CONTROL) == [BOS, EOS, PAD, HEADER, END_HEADER, EOT]


def test_plain_prompt_piece_by_piece():
    prompt = builder().build("Who?", [Passage("a", "abcdefghij", "T"), Passage("b", "xyz")], system="Be kind")
    assert prompt.pieces == (
        (BOS, 66, 101, 32, 107, 105, 110, 100, 10, 10),
        (91, 49, 93, 32, 84, 10),
        Chunk(0, 0, 0, 4, (97, 98, 99, 100)),
        Chunk(1, 0, 4, 8, (101, 102, 103, 104)),
        Chunk(2, 0, 8, 10, (105, 106)),
        (10,),
        (91, 50, 93, 32),
        Chunk(3, 1, 0, 3, (120, 121, 122)),
        (10,),
        ids("Question: Who?\nAnswer:"),
    )
    assert prompt.chunks == tuple(piece for piece in prompt.pieces if isinstance(piece, Chunk))
    assert bytes(prompt.token_ids()[1:]) == b"Be kind\n\n[1] T\nabcdefghij\n[2] xyz\nQuestion: Who?\nAnswer:"
    assert prompt.num_context_overhead == 6 + 1 + 4 + 1
    assert prompt.num_context_tokens == 12 + 10 + 3
    assert prompt.chunk_texts() == ["abcd", "efgh", "ij", "xyz"]
    assert [passage.id for passage in prompt.passages] == ["a", "b"]


def test_prompt_without_passages_or_system():
    prompt = builder().build("Who?")
    assert prompt.pieces == ((BOS,), ids("Question: Who?\nAnswer:"))
    assert (prompt.chunks, prompt.num_context_tokens) == ((), 0)


def test_passages_after_the_question():
    prompt = builder().build("Who?", ["abcde"], passages_first=False)
    assert shown(prompt) == ["<s>", "Question: Who?\n", "[1] ", "⟦abcd⟧", "⟦e⟧", "\n", "Answer:"]


def test_history_is_compressed_too_and_numbering_runs_on():
    history = [Turn("user", "Q1", (Passage("p", "12345", "One"),)), Turn("assistant", "A1", (Passage("q", "67"),))]
    prompt = builder().build("Q2", ["89"], history=history, system="S")
    assert shown(prompt) == [
        *("<s>S\n\n", "[1] One\n", "⟦1234⟧", "⟦5⟧", "\n", "Question: Q1\n", "[2] ", "⟦67⟧", "\n", "Answer: A1\n"),
        *("[3] ", "⟦89⟧", "\n", "Question: Q2\nAnswer:"),
    ]
    assert [(chunk.index, chunk.passage) for chunk in prompt.chunks] == [(0, 0), (1, 0), (2, 1), (3, 2)]
    assert [passage.id for passage in prompt.passages] == ["p", "q", "3"]
    assert prompt.num_context_overhead == len("[1] One\n") + len("[2] ") + len("[3] ") + 3


def test_chat_prompt_piece_by_piece():
    history = [Turn("user", "Hi", ["12345"]), Turn("assistant", "Ho")]
    prompt = builder(chat_template=LLAMA_3_LIKE).build("Who?", [Passage("q", "abcde", "T")], system="S", history=history)
    assert shown(prompt) == [
        *("<s><|start|>system<|end|>\n\n", "S"),
        *("<|eot_id|><|start|>user<|end|>\n\n", "[1] ", "⟦1234⟧", "⟦5⟧", "\n", "Hi"),
        *("<|eot_id|><|start|>assistant<|end|>\n\n", "Ho"),
        *("<|eot_id|><|start|>user<|end|>\n\n", "[2] T\n", "⟦abcd⟧", "⟦e⟧", "\n", "Who?"),
        "<|eot_id|><|start|>assistant<|end|>\n\n",
    ]
    assert prompt.num_context_overhead == 4 + 1 + 6 + 1


def test_chat_prompt_with_the_passages_after_the_question():
    maker = builder(chat_template=LLAMA_3_LIKE)
    assert shown(maker.build("Who?", ["abcde"], passages_first=False))[1:-1] == ["Who?\n", "[1] ", "⟦abcd⟧", "⟦e⟧", "\n"]
    assert shown(maker.build("Who?", passages_first=False))[1:-1] == ["Who?"]


@pytest.mark.parametrize(
    ("text", "chunk_size", "spans", "chunk_texts"),
    [
        ("", 4, (), []),
        (" \n\t ", 4, (), []),
        ("a", 4, ((0, 1),), ["a"]),
        ("abcd", 4, ((0, 4),), ["abcd"]),
        ("abcde", 4, ((0, 4), (4, 5)), ["abcd", "e"]),
        ("abc", 1, ((0, 1), (1, 2), (2, 3)), ["a", "b", "c"]),
        (" a b ", 4, ((0, 4), (4, 5)), [" a b", " "]),
        ("abcé", 4, ((0, 4), (3, 4)), ["abcé", "é"]),  # é is two bytes: one in each chunk, the character in both
        ("a🎉b", 2, ((0, 2), (1, 2), (1, 3)), ["a🎉", "🎉", "🎉b"]),
        ("🎉🎉", 3, ((0, 1), (0, 2), (1, 2)), ["🎉", "🎉🎉", "🎉"]),
    ],
)
def test_chunks_and_their_characters(text, chunk_size, spans, chunk_texts):
    chunker = builder(chunk_size)
    chunked = chunker.chunk(text)
    assert chunked == ChunkedText(ids(text) if spans else (), chunk_size, spans)
    assert chunker.chunk_texts(chunked, text) == chunk_texts


def test_passages_without_text_are_numbered_and_have_no_chunk():
    prompt = builder().build("Q", ["", "  \n", "ab"])
    assert shown(prompt)[1:-1] == ["[1] ", "\n", "[2] ", "\n", "[3] ", "⟦ab⟧", "\n"]
    assert len(prompt.passages) == 3


def test_passages_of_one_and_of_a_hundred_thousand_tokens():
    assert builder(16).build("Q", ["x"]).chunks == (Chunk(0, 0, 0, 1, (120,)),)
    text = "".join(random.Random(0).choices("abcdefgh .\n", k=100_000))
    prompt = builder(16).build("Q", [text])
    assert (len(prompt.chunks), "".join(prompt.chunk_texts())) == (6_250, text)
    assert prompt.num_context_tokens == 100_000 + 4 + 1
    assert bytes(prompt.token_ids()[1:]).decode() == f"[1] {text}\nQuestion: Q\nAnswer:"


# --- laws over tokenizers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [1, 3, 16])
@pytest.mark.parametrize("name", TEXTS)
def test_chunks_cover_the_text(any_tokenizer, name, chunk_size):
    text, chunker = TEXTS[name], PromptBuilder(any_tokenizer, chunk_size=chunk_size)
    chunked = chunker.chunk(text)
    assert list(chunked.token_ids) == chunker.encode(text)
    assert len(chunked.spans) == -(-len(chunked.token_ids) // chunk_size) > 0
    starts, ends = zip(*chunked.spans, strict=True)
    assert (starts[0], ends[-1]) == (0, len(text)) and all(start <= end for start, end in chunked.spans)
    assert (sorted(starts), sorted(ends)) == (list(starts), list(ends))
    assert all(start in (end, end - 1) for start, end in zip(starts[1:], ends, strict=False)), "at most one character is shared"


@pytest.mark.parametrize("name", TEXTS)
def test_harmless_text_has_the_ids_of_the_plain_tokenizer(any_tokenizer, name):
    assert PromptBuilder(any_tokenizer, chunk_size=4).encode(TEXTS[name]) == any_tokenizer(TEXTS[name], add_special_tokens=False).input_ids


@pytest.mark.parametrize("text", ["{}", "end {} of", "{}{}", " {} ", "x{}y", "{}\n{}"])
def test_no_text_becomes_a_control_token(any_tokenizer, text):
    chunker = PromptBuilder(any_tokenizer, chunk_size=4)
    control = set(any_tokenizer.convert_tokens_to_ids(CONTROL))
    for token in CONTROL:
        hostile = text.replace("{}", token)
        assert control & set(any_tokenizer(hostile, add_special_tokens=False).input_ids), "the plain tokenizer would be fooled"
        prompt = chunker.build(hostile, [{"text": hostile, "title": hostile}], system=hostile, history=[Turn("user", hostile)])
        assert control.isdisjoint(prompt.token_ids()[1:]) and prompt.token_ids()[0] == any_tokenizer.bos_token_id
        assert control.isdisjoint(chunker.encode(hostile)) and chunker.encode(hostile)


@pytest.mark.parametrize("kind", ["byte-level BPE", "byte-level BPE, ignore_merges", "sentencepiece BPE"])
def test_control_words_stay_readable(kind):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=KINDS[kind](), bos_token="<s>")
    text = "stop </s> <|eot_id|> now<s>"
    assert tokenizer.decode(PromptBuilder(tokenizer, chunk_size=4).encode(text)) == text


def test_added_markup_stays_text_and_added_words_stay_words():
    tokenizer = byte_tokenizer(think=True)
    tokenizer.add_tokens([AddedToken("COVID-19", special=False), AddedToken("[INST]", special=False), AddedToken("é", special=False)])
    word = tokenizer.convert_tokens_to_ids("COVID-19")
    chunker = PromptBuilder(tokenizer, chunk_size=4)
    assert chunker.encode("<think>a</think>[INST]") == list(b"<think>a</think>[INST]")
    assert chunker.encode("a COVID-19 b") == [97, 32, word, 32, 98]


def test_control_token_of_one_character_is_not_lost():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["!", "€"]})
    assert PromptBuilder(tokenizer, chunk_size=4).encode("hi! €") == list("hi! €".encode())


def test_settings_of_the_tokenizer_neither_matter_nor_change():
    tokenizer = byte_tokenizer(adds_bos=True)
    tokenizer.backend_tokenizer.enable_truncation(max_length=3)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    before = tokenizer.backend_tokenizer.to_str()
    prompt = PromptBuilder(tokenizer, chunk_size=4).build("</s>?", ["abcdef"])
    assert shown(prompt) == ["<s>", "[1] ", "⟦abcd⟧", "⟦ef⟧", "\n", "Question: </s>?\nAnswer:"]
    assert tokenizer.backend_tokenizer.to_str() == before
    assert tokenizer("</s>").input_ids[1] == EOS


def test_eight_threads_agree_with_one():
    shared = builder(chat_template=LLAMA_3_LIKE, think=True)
    rng, words = random.Random(1), [*CONTROL, "<think>", "town", "é", "🎉", " ", "\n", "river"]
    questions = ["".join(rng.choices(words, k=12)) for _ in range(150)]

    def build(question: str) -> Prompt:
        own = shared.tokenizer(question, add_special_tokens=False).input_ids  # the shared tokenizer is in use meanwhile
        assert any(number >= BOS for number in own) == any(token in question for token in [*CONTROL, "<think>"])
        return shared.build(question, [question, {"text": question, "title": question}], system=question)

    alone = [build(question) for question in questions]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(build, questions))
    assert together == alone
    skeleton = [token for token in shared.build("", ["", ""], system="s").token_ids() if token >= BOS]
    assert all([token for token in prompt.token_ids() if token >= BOS] == skeleton for prompt in together)


def test_permuted_passages_are_permuted_pieces():
    passages = [Passage("a", "first text", "A"), Passage("b", "second", "B"), Passage("c", "third one here", "C")]

    def blocks(order: list[int]) -> dict[str, list[tuple[int, ...]]]:
        prompt = builder().build("Q", [passages[number] for number in order])
        return {prompt.passages[n].id: [c.token_ids for c in prompt.chunks if c.passage == n] for n in range(3)}

    assert blocks([2, 0, 1]) == blocks([0, 1, 2])
    texts = [bytes(builder().build("Q", [passages[n] for n in order]).token_ids()[1:]) for order in ([0, 1, 2], [2, 0, 1])]
    assert texts[1] == texts[0].replace(b"[1] A\nfirst text\n[2] B\nsecond\n[3] C\nthird one here", b"[1] C\nthird one here\n[2] A\nfirst text\n[3] B\nsecond")


def test_chunks_made_before_give_the_same_prompt():
    maker = builder()
    passages = [Passage("a", "first text é", "A"), Passage("b", " "), Passage("c", "third")]
    before = {passage.id: maker.chunk(passage.text) for passage in passages[:2]}
    assert maker.build("Q", passages, chunked=before) == maker.build("Q", passages)
    assert maker.chunk_batch([passage.text for passage in passages]) == [maker.chunk(passage.text) for passage in passages]


# --- chat templates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("template", [LLAMA_3_LIKE, SYSTEM_IN_LAST_TURN])
def test_chat_ids_equal_those_of_transformers(template, adds_bos):
    """Everything expanded, a prompt is what `apply_chat_template` gives for the same words."""
    maker = builder(chat_template=template, adds_bos=adds_bos)
    prompt = maker.build("Who?", [{"text": "a b c d", "title": "T"}], system="Be kind", history=[Turn("user", "Hi"), Turn("assistant", "Ho")])
    messages = [("system", "Be kind"), ("user", "Hi"), ("assistant", "Ho"), ("user", "[1] T\na b c d\nWho?")]
    conversation = [{"role": role, "content": content} for role, content in messages]
    expected = maker.tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    assert prompt.token_ids() == expected


@pytest.mark.parametrize(
    ("template", "adds_bos", "num_bos"),
    [(LLAMA_3_LIKE, True, 1), (LLAMA_3_LIKE, False, 1), (WITHOUT_BOS, True, 1), (WITHOUT_BOS, False, 0), (None, True, 1), (None, False, 1)],
)
def test_one_bos_and_it_comes_first(template, adds_bos, num_bos):
    token_ids = builder(chat_template=template, adds_bos=adds_bos).build("<s>", ["<s>"], system="<s>").token_ids()
    assert token_ids.count(BOS) == num_bos
    assert (token_ids[0] == BOS) == bool(num_bos)


@pytest.mark.parametrize("template", [REFUSES_SYSTEM, DROPS_SYSTEM])
def test_system_text_joins_the_first_user_turn_where_the_template_has_no_place_for_it(template):
    prompt = builder(chat_template=template).build("Who?", ["ab"], system="Be kind", history=[Turn("user", "Hi"), Turn("assistant", "Ho")])
    text = "".join(shown(prompt))
    assert (text.count("Be kind\n\nHi"), text.count("Be kind"), prompt.token_ids().count(BOS)) == (1, 1, 1)


def test_system_text_never_joins_an_assistant_turn():
    prompt = builder(chat_template=DROPS_SYSTEM).build("Who?", ["ab"], system="Be kind", history=[Turn("assistant", "Hello")])
    assert shown(prompt)[:5] == ["<s><|start|>", "Hello", "<|eot_id|><|start|>", "Be kind\n\n", "[1] "]


def test_template_does_not_strip_what_users_wrote():
    prompt = builder(chat_template=LLAMA_3_LIKE).build("  Who?\n", [" ab "], system=" S ")
    assert [shown(prompt)[piece] for piece in (1, 4, 6)] == [" S ", "⟦ ab ⟧", "  Who?\n"]


@pytest.mark.parametrize(
    ("template", "history", "reason"),
    [
        (REFUSES_SYSTEM, [Turn("user", "Hi")], r"refused the conversation \(Roles must alternate user/assistant\): let the history alternate"),
        ("{{ messages[-1]['content'] }}", [Turn("user", "Hi"), Turn("assistant", "Ho")], "must show every turn once, but dropped or repeated one"),
    ],
)
def test_conversation_that_a_template_cannot_hold_is_refused(template, history, reason):
    with pytest.raises(InputError, match=reason):
        builder(chat_template=template).build("Q", history=history, system="S")


# --- users' input ---------------------------------------------------------------------------------------------------


def test_passage_from_any():
    assert Passage.from_any("text", 3) == Passage("3", "text")
    passage = Passage.from_any({"text": "t", "id": 0, "title": None, "metadata": {"a": 1}, "url": "u"}, 3)
    assert passage == Passage("0", "t", "", {"a": 1, "url": "u"})
    assert Passage.from_any(passage, 9) is passage and hash(passage), "a passage can be a key"


@pytest.mark.parametrize(("value", "given"), [({"title": "T"}, "the keys title"), ({"text": 5}, "the keys text"), (7, "a int"), (None, "a NoneType")])
def test_passage_without_text_is_refused(value, given):
    with pytest.raises(InputError, match=f'Passage 2 must be a text or a mapping with a string under "text", was {given}: pass'):
        Passage.from_any(value, 2)


def test_builder_needs_a_chunk_size_and_a_fast_tokenizer():
    for chunk_size in (0, -1):
        with pytest.raises(InputError, match=f"chunk_size must be 1 or more, was {chunk_size}: try 16"):
            builder(chunk_size)
    for tokenizer, given in ((None, "was none"), (object(), "was a object")):
        with pytest.raises(InputError, match=f"needs a fast tokenizer .* {given}: save one"):
            PromptBuilder(tokenizer, chunk_size=4)


def test_foreign_roles_and_chunks_are_refused():
    with pytest.raises(InputError, match="must be 'user' or 'assistant', was 'system': pass system text as system="):
        Turn("system", "Be kind")
    passage = Passage("a", "abcdef")
    with pytest.raises(InputError, match="of passage 'a' must hold 4 tokens, were made with 8"):
        builder(4).build("Q", [passage], chunked={"a": builder(8).chunk("abcdef")})
    with pytest.raises(InputError, match=r"of passage 'a' must end with its text \(6 characters\), end at 3"):
        builder(4).build("Q", [passage], chunked={"a": builder(4).chunk("abc")})


def test_half_a_character_is_refused():
    with pytest.raises(InputError, match="must be valid Unicode, but one has half a character after 'Question: caf': check the encoding"):
        builder().build(b"caf\xe9".decode(errors="surrogateescape"), ["fine"])
