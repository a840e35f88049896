"""Tokenizers of every kind whose vocabulary can be cut, in the layouts of real models, trained on a few sample lines."""

from __future__ import annotations

import json
import lzma
from functools import lru_cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from benchmarks.byte_fallback_tokenizer import make_byte_fallback_tokenizer
from data_prep.__main__ import main
from tests.conftest import SAMPLES

LANGUAGES = ("en", "de", "ru", "zh-Hans", "ar")
KEPT = ("en", "ru")
NUM_LINES, HELD_OUT = 150, 120  # of each language: to train on, and after them


@lru_cache
def sample_lines(language: str) -> list[str]:
    with lzma.open(SAMPLES / "cc100" / f"{language}.txt.xz", "rt", encoding="utf-8") as text:
        return [line.strip() for line in text if line.strip()][: NUM_LINES + HELD_OUT]


def training_lines() -> list[str]:
    return [line for language in LANGUAGES for line in sample_lines(language)[:NUM_LINES]]


def mmbert(directory: Path) -> Path:
    """BPE with byte fallback; several merges for one piece."""
    return make_byte_fallback_tokenizer(directory, 3000, LANGUAGES)


def modernbert(directory: Path) -> Path:
    """Byte-level BPE; special tokens are added behind the pieces, [PAD] among them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(training_lines(), trainer)
    tokenizer.add_tokens([AddedToken("|||IP_ADDRESS|||", normalized=False), AddedToken("    ", normalized=False)])
    tokenizer.add_special_tokens(["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"])
    ends = {name: tokenizer.token_to_id(f"[{name.upper()}]") for name in ("cls", "sep")}
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", ends["cls"]), ("[SEP]", ends["sep"])]
    )
    return save(tokenizer, directory, "PreTrainedTokenizerFast", bert_names())


def roberta(directory: Path) -> Path:
    """Byte-level BPE with its processor, special tokens among the pieces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_lines(), trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return save(tokenizer, directory, "RobertaTokenizer", {})


def bert(directory: Path) -> Path:
    """WordPiece in the order of mBERT: [PAD], reserved tokens, [UNK] [CLS] [SEP] [MASK], then pieces."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", *(f"[unused{n}]" for n in range(1, 10)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=2500, special_tokens=special, limit_alphabet=400, show_progress=False
    )
    tokenizer.train_from_iterator(training_lines(), trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 12), ("[CLS]", 11))
    return save(tokenizer, directory, "BertTokenizer", {"do_lower_case": False})


def mdeberta(directory: Path) -> Path:
    """Unigram with [PAD] [CLS] [SEP] [UNK] first and [MASK] behind the pieces."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁")
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    trainer = trainers.UnigramTrainer(
        vocab_size=1500,
        special_tokens=special,
        unk_token="[UNK]",
        show_progress=False,
        max_piece_length=6,
        n_sub_iterations=1,
    )
    tokenizer.train_from_iterator(training_lines()[::4], trainer)  # seconds with all of them
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(r"\s{2,}|[\n\r\t]"), " "), normalizers.NFC(), normalizers.Strip(False, True)]
    )
    tokenizer.decoder = decoders.Metaspace("▁")
    tokenizer.add_special_tokens([*special, "[MASK]"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    return save(tokenizer, directory, "DebertaV2Tokenizer", {**bert_names(), "unk_id": 3, "vocab_type": "spm"})


def cut_to(full: Path, text: Path, output: Path) -> Path:
    """Cut a tokenizer to the pieces of the text, with the real command."""
    words = ["trim-vocab", "--tokenizer", full, "--input", text, "--output", output, "--workers", 1]
    assert main([str(word) for word in words]) == 0
    return output


def write_text(directory: Path) -> Path:
    """One file for each language of `KEPT`: the lines that the tokenizers were trained on."""
    directory.mkdir()
    for language in KEPT:
        (directory / f"{language}.txt").write_text("\n".join(sample_lines(language)[:NUM_LINES]) + "\n")
    return directory


KINDS = {"mmBERT": mmbert, "ModernBERT": modernbert, "RoBERTa": roberta, "BERT": bert, "mDeBERTa": mdeberta}


def bert_names() -> dict[str, str]:
    return {f"{name}_token": f"[{name.upper()}]" for name in ("cls", "sep", "pad", "unk", "mask")}


def save(tokenizer: Tokenizer, directory: Path, tokenizer_class: str, settings: dict[str, object]) -> Path:
    directory.mkdir()
    pad = next(token for token in ("[PAD]", "<pad>") if tokenizer.token_to_id(token) is not None)
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(pad) or 0, pad_token=pad)
    tokenizer.save(str(directory / "tokenizer.json"))
    decoder = {
        str(number): {"content": token.content, "special": token.special, "normalized": token.normalized}
        for number, token in tokenizer.get_added_tokens_decoder().items()
    }
    content = {"tokenizer_class": tokenizer_class, **settings, "added_tokens_decoder": decoder}
    (directory / "tokenizer_config.json").write_text(json.dumps(content))
    return directory
