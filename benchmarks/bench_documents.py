"""What separate documents cost in the encoders and in the loss, relative to joined rows and to the exact work.

    python benchmarks/bench_documents.py [--tokenizer MODEL] [--families NAMES] [--document 64] [--quick] [--json FILE]

In: rows of 512 tokens of real text in 22 languages, and encoders of 4 x 384 with random weights. Out: ratios of CPU seconds of one
thread. The exact work of an encoder is that of joined rows without the products of attention for pairs of tokens of different
documents; that of the loss is the pairs' share of joined rows. `--document` replaces the documents by ones of so many tokens.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from benchmarks import measure  # noqa: E402
from benchmarks.bench_feed import cpu_seconds, make_shards  # noqa: E402
from pipeline.data.batches import BatchOptions, BatchSource  # noqa: E402
from pipeline.distillation.documents import Documents  # noqa: E402
from pipeline.distillation.flops import forward_flops  # noqa: E402
from pipeline.distillation.relations.loss import relation_kl  # noqa: E402
from pipeline.distillation.tap import TappedEncoder, tap  # noqa: E402

SEQ_LEN, WIDTH, LAYERS, HEADS = 512, 384, 4, 12
RELATION_HEADS = 48
DISENTANGLED = {
    **{
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 256,
        "norm_rel_ebd": "layer_norm",
    },
    **{"share_att_key": True, "position_biased_input": False, "type_vocab_size": 0},
}
FAMILIES = {"xlm-roberta": {}, "modernbert": {"intermediate_size": 576}, "mpnet": {}, "deberta-v2": DISENTANGLED}


def encoder(family: str, vocab_size: int) -> PreTrainedModel:
    shape = {
        **{
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "intermediate_size": 4 * WIDTH,
        },
        **{"vocab_size": vocab_size, "max_position_embeddings": SEQ_LEN + 2},
        **{"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2},
    }
    model = AutoModel.from_config(AutoConfig.for_model(family, **{**shape, **FAMILIES[family]}))
    model.get_input_embeddings().weight.requires_grad_(False)
    return model.eval()


def pairs_share(documents: Documents) -> float:
    """Pairs of tokens of one document, as a share of all pairs of a row."""
    rows = documents.lengths
    return sum(length**2 for row in rows for length in row) / sum(sum(row) ** 2 for row in rows)


def exact_share(tapped: TappedEncoder, pairs: float) -> float:
    """Products of an encoder with this share of the pairs, by those with all of them."""
    attention = SEQ_LEN * tapped.num_attention_layers * 4 * SEQ_LEN * WIDTH
    return 1 - (1 - pairs) * attention / forward_flops(tapped, SEQ_LEN)


def least_ratios(work: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The least time of each kind by the least time of `joined`; the kinds take turns."""
    rounds_of_all = [[cpu_seconds(do) for do in work.values()] for _ in range(rounds)]
    seconds = dict(zip(work, map(min, zip(*rounds_of_all, strict=True)), strict=True))
    return {name: least / seconds["joined"] for name, least in seconds.items() if name != "joined"}


def cost_of_encoder(
    family: str, rows_BL: torch.Tensor, documents: Documents, vocab_size: int, rounds: int
) -> list[float]:
    """[exact work by joined, separate by exact work, one mask by exact work], forward and backward."""
    tapped = tap(encoder(family, vocab_size), LAYERS)
    joined = torch.ones_like(rows_BL) if family == "deberta-v2" else None

    def step(mask: torch.Tensor | Documents | None, by_document: bool = True) -> None:
        tapped.attends_by_document = by_document
        tapped.zero_grad()
        sum(x_BLD.sum() for x_BLD in tapped(rows_BL, mask)).backward()

    work = {"joined": lambda: step(joined), "separate": lambda: step(documents), "mask": lambda: step(documents, False)}
    exact = exact_share(tapped, pairs_share(documents))
    return [exact, *(ratio / exact for ratio in least_ratios(work, rounds).values())]


def cost_of_loss(documents: Documents, rounds: int) -> list[float]:
    """[exact work by joined, separate by exact work]."""
    teacher_BLD, student_BLD = (torch.randn(len(documents.lengths), SEQ_LEN, WIDTH) for _ in range(2))

    def step(**segments: list[list[int]]) -> None:
        relation_kl(teacher_BLD, student_BLD.requires_grad_(), RELATION_HEADS, backend="chunked", **segments)

    exact = pairs_share(documents)
    ratios = least_ratios({"joined": step, "separate": lambda: step(segments=documents.lengths)}, rounds)
    return [exact, ratios["separate"] / exact]


def main() -> None:
    parser = measure.arguments(__doc__)
    parser.add_argument(
        "--tokenizer", type=Path, default=REPO / "artifacts/teacher/sentencepiece.bpe.model", help="SentencePiece model"
    )
    parser.add_argument("--families", default=",".join(FAMILIES), help="comma-separated, of: %(default)s")
    parser.add_argument("--document", type=int, metavar="N", help="length of documents, instead of the text's own")
    options = parser.parse_args()
    families = options.families.split(",")
    if unknown := set(families) - set(FAMILIES):
        parser.error(f"--families: {', '.join(sorted(unknown))} is none of {', '.join(FAMILIES)}")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    num_rows, rounds = (4, 2) if options.quick else (8, 3)
    with tempfile.TemporaryDirectory() as directory:
        shards = make_shards(Path(directory), options.tokenizer)
        source = BatchSource(shards, BatchOptions(SEQ_LEN, 0.3, 0, heldout_rows=1, documents="separate"))
        rows_BL, segments_BS = source.training_batch(np.arange(num_rows))
        vocab_size = shards.vocab_size
    if options.document:
        number, rest = divmod(SEQ_LEN, options.document)
        segments_BS = torch.tensor([[options.document] * number + [rest]]).expand(num_rows, -1)
    documents = Documents(segments_BS, restart_positions=True)
    costs = {name: cost_of_encoder(name, rows_BL, documents, vocab_size, rounds) for name in families}
    loss = cost_of_loss(documents, rounds)
    rows = [[name, *of_encoder] for name, of_encoder in costs.items()] + [["loss", *loss, "-"]]
    header = ["", "exact work / joined", "separate / exact work", "one mask / exact work"]
    figures = {
        "pairs_share": pairs_share(documents),
        "exact_over_joined": {str(row[0]): row[1] for row in rows},
        "separate_over_exact": {str(row[0]): row[2] for row in rows},
        "mask_over_exact": {name: of_encoder[2] for name, of_encoder in costs.items()},
    }
    measure.publish("Separate documents: encoders and loss", header, rows, figures, options.json)


if __name__ == "__main__":
    main()
