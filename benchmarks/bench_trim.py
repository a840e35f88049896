"""A student of mmBERT-small's shape, cut to the vocabulary of some languages: parameters, and hidden states of covered text.

    python benchmarks/bench_trim.py [--quick] [--json FILE] [--languages en,de,ru] [--work DIR]

Trains a byte-fallback BPE tokenizer in mmBERT's format on the sample corpus, makes a ModernBERT of 22 layers x 384 with random
weights and one embedding per id, and runs `trim-vocab` and `trim` as a user would. Then it encodes the sample text
with AutoTokenizer before and after. Exit code 1: an id or a hidden state of a covered line differs.
"""

from __future__ import annotations

import lzma
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
from transformers import AutoTokenizer, ModernBertConfig, ModernBertModel

from benchmarks.byte_fallback_tokenizer import SAMPLES, make_byte_fallback_tokenizer
from benchmarks.measure import arguments, publish
from data_prep.__main__ import main as data_prep
from data_prep.json_files import read_json_object
from pipeline.distillation.models.vocabulary import read_vocabulary
from pipeline.evaluation.encoder import load_encoder
from pipeline.export.trim import trim

IDS, QUICK_IDS = 256_000, 8_000
LINES = 12  # covered ones of each language, whose hidden states are compared
MAX_TOKENS = 128


def make_student(directory: Path, tokenizer: Path, quick: bool) -> Path:
    """A ModernBERT with random weights and the tokenizer's files in one directory."""
    for file in tokenizer.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)),
        hidden_size=384,
        intermediate_size=1152,
        num_hidden_layers=2 if quick else 22,
        num_attention_heads=6,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        cls_token_id=2,
        sep_token_id=1,
    )
    ModernBertModel(config).save_pretrained(directory)
    return directory


@torch.inference_mode()
def compare(before: Path, after: Path) -> tuple[dict[str, int], float]:
    """Encode the lines of all sample languages with both models; also of languages that were not asked for some are covered.

    Returns:
        numbers of lines, of lines whose pieces are all kept, and of those with other ids; the greatest difference of a hidden
        state of a covered line
    """
    old, new = load_encoder(str(before)), load_encoder(str(after))
    vocabulary = read_vocabulary(after)
    kept = set(vocabulary.old_ids_V.tolist())
    found, greatest = {"lines": 0, "covered": 0, "other ids": 0}, 0.0
    for path in sorted(SAMPLES.glob("*.txt.xz")):
        with lzma.open(path, "rt", encoding="utf-8") as text:
            lines = [line.strip() for line in text if line.strip()]
        pairs = zip(*(encoder.tokenizer(lines)["input_ids"] for encoder in (old, new)), strict=True)
        covered = [(old_ids, new_ids) for old_ids, new_ids in pairs if kept.issuperset(old_ids)]
        found["lines"] += len(lines)
        found["covered"] += len(covered)
        for number, (old_ids, new_ids) in enumerate(covered):
            if vocabulary.old_ids_V[torch.tensor(new_ids)].tolist() != old_ids:
                found["other ids"] += 1
            elif number < LINES:
                one, other = (
                    encoder.model(torch.tensor([ids[:MAX_TOKENS]]).to(encoder.device)).last_hidden_state
                    for encoder, ids in ((old, old_ids), (new, new_ids))
                )
                greatest = max(greatest, float((one - other).abs().max()))
    return found, greatest


def measure(work: Path, languages: list[str], quick: bool) -> dict[str, Any]:
    """Make, cut and compare in the directory `work`. Returns the figures."""
    tokenizer = make_byte_fallback_tokenizer(work / "tokenizer", QUICK_IDS if quick else IDS)
    student, vocabulary, small = work / "student", work / "vocabulary", work / "small"
    student.mkdir(exist_ok=True)
    make_student(student, tokenizer, quick)
    texts = [str(SAMPLES / f"{language}.txt.xz") for language in languages]
    words = ["trim-vocab", "--tokenizer", str(student), "--input", *texts, "--output", str(vocabulary)]
    if data_prep(words) != 0:
        raise SystemExit(1)
    report = trim(student, read_vocabulary(vocabulary), small)
    lines, greatest = compare(student, small)
    merges = [len(read_json_object(place / "tokenizer.json")["model"]["merges"]) for place in (student, small)]
    return {
        "languages": languages,
        "ids": report["pieces"],
        "merges": merges,
        "parameters": report["parameters"],
        "embedding_parameters": [384 * ids for ids in report["pieces"]],
        "lines": lines,
        "hidden_state_difference": greatest,
    }


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--languages", default="en,de,es,ru", help="languages of the sample corpus to keep")
    parser.add_argument("--work", type=Path, help="where to make the files (default: a temporary directory)")
    options = parser.parse_args()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        figures = measure(work, options.languages.split(","), options.quick)
    rows = [
        [key, *(f"{value:,}" for value in figures[key])]
        for key in ("ids", "merges", "parameters", "embedding_parameters")
    ]
    publish("A cut vocabulary (byte-fallback BPE)", ["", "before", "after"], rows, figures, options.json)
    lines, greatest = figures["lines"], figures["hidden_state_difference"]
    print(
        f"{lines['covered']} of {lines['lines']} lines are covered; {lines['other ids']} of them have other ids; hidden states "
        f"of the first {LINES} covered lines of each language are {greatest} apart"
    )
    return 1 if lines["other ids"] or greatest or not lines["covered"] else 0


if __name__ == "__main__":
    sys.exit(main())
