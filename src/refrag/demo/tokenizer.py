"""The almanac's own tokenizers: byte-level BPE learned on the training world."""

from collections.abc import Iterator

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from .almanac import Kind, make_case

NUM_MERGES = 2000

_WORDS = r"\[\d+\]| ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}\[]+|\[|\n|\s+"
"""A number in brackets, a word, one or two digits, punctuation, white space: merges stay inside these."""


def _training_texts(num_cases: int) -> Iterator[str]:
    kinds: tuple[Kind, ...] = ("one-hop", "one-hop", "two-hop", "unanswerable")
    for i in range(num_cases):
        case = make_case(f"tokenizer-{i}", kind=kinds[i % 4])
        for number, passage in enumerate(case.passages, start=1):
            yield f"[{number}] {passage.title}\n"
            yield passage.text
        for question in case.questions:
            yield f"Question: {question.text}\nAnswer: {question.answer}"


def train_tokenizers(num_cases: int = 3000) -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    """The decoder's tokenizer, and the encoder's: the same tokens, wrapped in `<s> … </s>` as RoBERTa does."""
    core = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_WORDS), behavior="isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + 256 + NUM_MERGES, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator(_training_texts(num_cases), trainer)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    decoder_tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(core.to_str()), model_max_length=4096, **names)
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    encoder_tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=64, cls_token="<s>", sep_token="</s>", mask_token="<mask>", unk_token="<unk>", **names)
    return decoder_tokenizer, encoder_tokenizer
