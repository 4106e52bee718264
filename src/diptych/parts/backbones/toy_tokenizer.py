"""A small byte-level tokenizer with InternVL's special tokens, trained on a handful of texts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from diptych.core.errors import UserError
from diptych.parts.backbones.chat import CHATML

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
"""Ids 0 to 5, in this order; the first pads, the third ends a turn, the last is an image slot."""

_ROLES = ("user", "assistant", "system")
_SPACE = "\u0120"
"""How a leading space looks in the byte-level alphabet."""


def train_tokenizer(texts: Iterable[str], vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """A deterministic byte-level BPE tokenizer of at most `vocab_size` tokens; any text can be written with it.

    Words are split as GPT-2 splits them, a leading space included. After the special tokens, all 256 bytes and the
    role names, the vocabulary takes whole words by frequency, then their forms with or without a leading space, and
    what is left goes to the usual BPE merges. Whole words do not pass through merges (`ignore_merges`, as in Llama 3),
    so a frequent word costs one entry instead of one for each of its stems.

    The ChatML template is part of the saved files.

    Raises:
        UserError: `vocab_size` has no room for bytes, special tokens and role names.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = [*SPECIAL, *alphabet, *_ROLES]
    if vocab_size < len(base):
        raise UserError(f"vocab_size {vocab_size}: at least {len(base)} are needed for bytes and special tokens")

    corpus = list(texts)
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    counts = Counter(word for text in corpus for word, _ in split.pre_tokenize_str(text))
    vocabulary = {token: number for number, token in enumerate(base)}
    for word in _candidates(counts):
        if len(vocabulary) == vocab_size:
            break
        vocabulary.setdefault(word, len(vocabulary))
    merges = _merges(corpus, split, alphabet, vocabulary, vocab_size)

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        extra_special_tokens={
            "start_of_turn_token": SPECIAL[1],
            "start_image_token": SPECIAL[3],
            "end_image_token": SPECIAL[4],
            "context_image_token": SPECIAL[5],
        },
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHATML
    return wrapped


def _candidates(counts: Counter[str]) -> list[str]:
    """Words by frequency, ties by spelling; then the same words with their leading space removed or added."""
    words = sorted(counts, key=lambda word: (-counts[word], word))
    turned = [word[1:] if word.startswith(_SPACE) else _SPACE + word for word in words]
    return [word for word in (*words, *turned) if len(word) > 1]


def _merges(
    corpus: list[str],
    split: pre_tokenizers.ByteLevel,
    alphabet: list[str],
    vocabulary: dict[str, int],
    vocab_size: int,
) -> list[tuple[str, str]]:
    """BPE merges in the order they are learned; their results are added to `vocabulary` while there is room."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = split
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator(corpus, trainer)
    learned: list[tuple[str, str]] = []
    for first, second in json.loads(learner.to_str())["model"]["merges"]:
        if first not in vocabulary or second not in vocabulary:
            continue
        if first + second not in vocabulary:
            if len(vocabulary) == vocab_size:
                continue
            vocabulary[first + second] = len(vocabulary)
        learned.append((first, second))
    return learned
