"""Trains the base model's tokenizer: byte-level BPE with GPT-2's split, whose merges are learned so that a word is cut alike everywhere.

A small model copies well only if what it copies has the same tokens where it is read and where it is written. In plain BPE ` name`,
`(name`, `_name` and `"name` are cut in four ways. Here merges are learned inside words, humps of camel case, single digits and runs of
one kind of punctuation, never across them, so every such place is cut alike. Only then, as the very last merges, the most frequent words
of prose get a form with the leading space, which keeps sentences short. Any reader of GPT-2's tokenizers (llama.cpp too) cuts the same.
"""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

PAD, BOS, IM_START, IM_END, END_OF_TEXT = SPECIAL = ("<|pad|>", "<|begin|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>")
VOCABULARY, SPACED_WORDS = 2048, 360
JSON_RUNS = r'"\},\{"|"\}\],"|":\[\{"|":"|","|":|\{"|"\}'
PIECES = rf"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\p{{N}}|{JSON_RUNS}|\.{{3}}|_+|=+|-+|\#+|\*+|>+| +|\n+|[\s\S]"

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] + '<|im_end|>' }}{% endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- message['content'] + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def learn_merges(texts: list[str], size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a BPE that never joins two of `PIECES`."""
    learner = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    learner.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, max_token_length=16)
    learner.train_from_iterator(texts, trainer)
    state = json.loads(learner.to_str())["model"]
    return state["vocab"], [tuple(pair) for pair in state["merges"]]


def assemble(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def frequent_spaced_words(tokenizer: Tokenizer, texts: Iterable[str], count: int) -> list[str]:
    """Words of one token that most often stand whole between a space and something that is not a letter."""
    found: Counter[str] = Counter()
    for encoding in tokenizer.encode_batch(list(texts)):
        tokens = encoding.tokens
        triples = zip(tokens, tokens[1:], tokens[2:], strict=False)
        found.update(word for before, word, after in triples if before == "Ġ" and not (after.isascii() and after[0].isalpha()))
    return [word for word, _ in found.most_common() if word.isascii() and word.isalpha()][:count]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    vocabulary, merges = learn_merges(texts, VOCABULARY - SPACED_WORDS)
    for word in frequent_spaced_words(assemble(vocabulary, merges), texts, SPACED_WORDS):
        vocabulary["Ġ" + word] = len(vocabulary)
        merges.append(("Ġ", word))
    return assemble(vocabulary, merges)


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Writes the files that `AutoTokenizer` reads, chat template included."""
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=IM_END,
        pad_token=PAD,
        additional_special_tokens=[IM_START, END_OF_TEXT],
        model_max_length=max_length,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)
