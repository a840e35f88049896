"""Small tokenizers of other kinds than XLM-R's, as Hugging Face directories."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

WORDS = ["the quick brown fox jumps over the lazy dog", "ein zweiter satz steht hier", "third line of text"] * 20


def word_piece(directory: Path) -> Path:
    """BERT's kind: [CLS] ... [SEP], with other ids than 0 and 2."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(WORDS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special))
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return save(tokenizer, directory, "BertTokenizer", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]")


def byte_bpe(directory: Path) -> Path:
    """RoBERTa's kind: <s> ... </s>, merges over bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(WORDS, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return save(tokenizer, directory, "RobertaTokenizer", bos_token="<s>", eos_token="</s>")


def save(tokenizer: Tokenizer, directory: Path, tokenizer_class: str, **tokens: str) -> Path:
    directory.mkdir()
    tokenizer.enable_truncation(4)  # shards must ignore the lengths that a file sets
    pad = "<pad>" if tokenizer.token_to_id("<pad>") else "[PAD]"
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(pad) or 0, pad_token=pad)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "made_for": tokenizer_class, **tokens}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory
