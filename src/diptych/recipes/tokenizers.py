"""Tokenizers of local folders."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A folder's tokenizer. What transformers warns of when it meets a model type of ours in config.json is not said:
    the tokenizer's class is its own file's."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    finally:
        logging.set_verbosity(before)
