"""A byte-fallback BPE tokenizer in the format of mmBERT's (Gemma 2), trained on the sample corpus.

In: a number of ids. Out: a Hugging Face directory with tokenizer.json and tokenizer_config.json. The format is the real one:
`<pad> <eos> <bos> <unk> <mask>` first, reserved and white-space tokens, 256 byte pieces, spaces as U+2581, text that is not cut
into words, and a merge for every way to join two pieces to a third.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SAMPLES = Path(__file__).resolve().parent.parent / "samples" / "cc100"
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
NUM_RESERVED, LONGEST_RUN = 99, 31
SPACE = "▁"


def make_byte_fallback_tokenizer(directory: Path, num_ids: int, languages: tuple[str, ...] = ()) -> Path:
    """Train on the samples of these languages (default: all) and write the files. Fewer ids than asked if text runs out."""
    reserved = [*SPECIAL, *(f"<unused{n}>" for n in range(NUM_RESERVED))]
    runs = [SPACE * n for n in range(2, LONGEST_RUN + 1)]
    first = [*reserved, *runs, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = [piece for piece in _trained(num_ids - len(first), languages) if piece not in first]
    vocab = {piece: number for number, piece in enumerate([*first, *pieces][:num_ids])}
    model = models.BPE(vocab, _merges(vocab, [*runs, *pieces]), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", pair="<bos> $A <eos> $B <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in reserved])
    tokenizer.add_tokens([AddedToken(run, normalized=False) for run in runs])
    tokenizer.enable_padding(pad_id=0, pad_token="<pad>")
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {
        "pad": "<pad>",
        "eos": "<eos>",
        "sep": "<eos>",
        "bos": "<bos>",
        "cls": "<bos>",
        "unk": "<unk>",
        "mask": "<mask>",
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 8192,
        **{f"{name}_token": token for name, token in names.items()},
        "added_tokens_decoder": {
            str(number): {"content": token.content, "special": token.special, "normalized": token.normalized}
            for number, token in tokenizer.get_added_tokens_decoder().items()
        },
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
    return directory


def _trained(num_pieces: int, languages: tuple[str, ...]) -> list[str]:
    """Pieces in the order in which merges made them, then single characters, as SentencePiece orders them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE)
    trainer = trainers.BpeTrainer(vocab_size=num_pieces, min_frequency=1, show_progress=False, max_token_length=32)
    tokenizer.train_from_iterator(_lines(languages), trainer)
    ordered = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return sorted((piece for piece, _ in ordered), key=lambda piece: len(piece) == 1)  # stable


def _lines(languages: tuple[str, ...]) -> Iterator[str]:
    for path in sorted(SAMPLES.glob("*.txt.xz")):
        if not languages or path.name.removesuffix(".txt.xz") in languages:
            with lzma.open(path, "rt", encoding="utf-8") as text:
                yield from (line.strip() for line in text)


def _merges(vocab: dict[str, int], pieces: list[str]) -> list[tuple[str, str]]:
    """Every pair of pieces that together are a piece; those of earlier pieces come first."""
    found = []
    for piece in pieces:
        if piece in vocab:
            pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
            found += sorted(
                (pair for pair in pairs if pair[0] in vocab and pair[1] in vocab),
                key=lambda pair: [vocab[part] for part in pair],
            )
    return found
