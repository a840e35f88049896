"""Models of every architecture cut to a vocabulary of a `tokenizer.json`: equal hidden states, special ids that follow."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from pipeline.__main__ import main
from pipeline.config import load_recipe
from pipeline.distillation.models.vocabulary import Vocabulary, cut_embedding, read_vocabulary
from pipeline.errors import UserError
from pipeline.export.trim import trim
from pipeline.planning.meta_models import build_encoders
from tests.tiny_encoders import CONFIGS, tiny_encoder
from tests.unit.data_prep.trim_tokenizers import KINDS, NUM_LINES, cut_to, sample_lines, write_text

SPARE_ROWS = 37  # of the embedding, which belong to no piece, as in mDeBERTa
# A layout of special ids, and an architecture whose real models have it.
PAIRS = {
    "ModernBERT": "modernbert",
    "BERT": "bert",
    "mDeBERTa": "deberta-v2",
    "RoBERTa": "roberta",
    "mmBERT": "modernbert",
}


class Made:
    """Tokenizers, and vocabularies cut from them, each made once."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.text = directory, write_text(directory / "text")

    def tokenizer(self, kind: str) -> Path:
        full = self.directory / kind
        return full if full.exists() else KINDS[kind](full)

    def vocabulary(self, kind: str) -> Vocabulary:
        small = self.directory / f"{kind} small"
        return read_vocabulary(small if small.exists() else cut_to(self.tokenizer(kind), self.text, small))

    def model(self, kind: str, model_type: str) -> PreTrainedModel:
        """A random model with the special ids of the tokenizer, and rows to spare."""
        ids = AutoTokenizer.from_pretrained(self.tokenizer(kind))
        special = {f"{name}_token_id": getattr(ids, f"{name}_token_id") for name in ("pad", "bos", "eos", "cls", "sep")}
        return tiny_encoder(model_type, vocab_size=len(ids) + SPARE_ROWS, **special)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"))


@torch.inference_mode()
def states(model: PreTrainedModel, rows_BL: torch.Tensor, padding: int) -> torch.Tensor:
    return model(input_ids=rows_BL, attention_mask=(rows_BL != padding).long()).last_hidden_state


@pytest.mark.parametrize(
    ("kind", "model_type"),
    [("RoBERTa", name) for name in CONFIGS] + [("ModernBERT", name) for name in ("bert", "electra", "distilbert", "modernbert")]
    + [("mDeBERTa", "deberta-v2"), ("BERT", "bert"), ("mmBERT", "modernbert")],
)  # fmt: skip
def test_hidden_states_are_equal_and_special_ids_follow(kind: str, model_type: str, made: Made) -> None:
    kept, model = made.vocabulary(kind), made.model(kind, model_type)
    padding = model.config.pad_token_id
    new_padding = kept.old_ids_V.tolist().index(padding)
    before = {key: value for key, value in model.config.to_dict().items() if key.endswith("_token_id")}
    new_BL = torch.randint(len(kept), (3, 20), generator=torch.Generator().manual_seed(0))
    new_BL[1, 12:] = new_padding
    full = states(model, kept.old_ids_V[new_BL], padding)
    dtype, width = model.dtype, model.get_input_embeddings().embedding_dim
    cut_embedding(model, kept)
    assert torch.equal(states(model, new_BL, new_padding), full)
    embedding = model.get_input_embeddings()
    assert (embedding.num_embeddings, embedding.embedding_dim) == (len(kept), width)
    assert embedding.padding_idx in (None, new_padding)
    assert model.config.vocab_size == len(kept)
    assert model.dtype == dtype
    for key, old in before.items():
        new = getattr(model.config, key)
        assert new is None if old is None else kept.old_ids_V[new] == old


@pytest.mark.parametrize("kind", PAIRS)
def test_a_cut_model_reads_text_as_before(kind: str, made: Made, tmp_path: Path) -> None:
    """The real command on a directory; then both directories as their users load them."""
    source, output = tmp_path / "source", tmp_path / "output"
    made.model(kind, PAIRS[kind]).save_pretrained(source)
    shutil.copytree(made.tokenizer(kind), source, dirs_exist_ok=True)
    kept = made.vocabulary(kind)
    main(["trim", str(source), "--vocabulary", str(kept.directory), "--output", str(output)])
    models = [AutoModel.from_pretrained(directory).eval() for directory in (source, output)]
    assert models[1].config.vocab_size == len(kept) < models[0].config.vocab_size
    assert models[1].num_parameters() < models[0].num_parameters()
    tokenizers = [AutoTokenizer.from_pretrained(directory) for directory in (source, output)]
    lines = [line[:100] for line in sample_lines("ru")[:NUM_LINES:30] + sample_lines("en")[:NUM_LINES:30]]
    with torch.inference_mode():
        for line in lines:
            rows = [tokenizer(line, return_tensors="pt", truncation=True, max_length=64) for tokenizer in tokenizers]
            if kind == "BERT" and tokenizers[0].unk_token_id in rows[0]["input_ids"]:
                continue
            assert torch.equal(kept.old_ids_V[rows[1]["input_ids"]], rows[0]["input_ids"])
            assert torch.equal(*(model(**row).last_hidden_state for model, row in zip(models, rows, strict=True)))
    about = json.loads((output / "vocabulary.json").read_text())
    assert about["old_ids"] == kept.old_ids_V.tolist()
    assert f"{len(kept):,} of {about['source_vocab_size']:,} pieces" in (output / "README.md").read_text()


def test_the_plan_of_a_teacher_whose_padding_id_is_beyond_the_cut_vocabulary(
    tiny_recipe: Path, made: Made, tmp_path: Path
) -> None:
    made.model("ModernBERT", "modernbert").save_pretrained(tmp_path / "teacher")
    kept = made.vocabulary("ModernBERT")
    sets = [f"teacher={tmp_path / 'teacher'}", "student={layers: 2, hidden: 24, heads: 4, ffn: 48, dropout: 0.0}"]
    full, small = (load_recipe(tiny_recipe, [*sets, *more]) for more in ([], [f"vocabulary={kept.directory}"]))
    rows = len(AutoTokenizer.from_pretrained(made.tokenizer("ModernBERT"))) + SPARE_ROWS
    saved = build_encoders(full).student_parameters - build_encoders(small).student_parameters
    assert saved == (rows - len(kept)) * 24


# -- wrong input


def test_a_special_id_whose_piece_is_not_kept(made: Made) -> None:
    kept = made.vocabulary("RoBERTa")
    dropped = next(number for number in range(300, kept.source_vocab_size) if number not in kept.old_ids_V)
    model = made.model("RoBERTa", "bert")
    model.config.bos_token_id = dropped
    with pytest.raises(
        UserError, match=f"`bos_token_id` of the model's config is id {dropped}, whose piece .* does not keep"
    ):
        cut_embedding(model, kept)
    model.config.bos_token_id = kept.source_vocab_size + 5  # no piece has it before, nor after
    cut_embedding(model, kept)
    assert model.config.bos_token_id == kept.source_vocab_size + 5


def test_a_padding_id_that_would_move_positions(made: Made) -> None:
    kept, model = made.vocabulary("ModernBERT"), made.model("ModernBERT", "bert")
    padding = model.config.pad_token_id
    model = tiny_encoder(
        "roberta", vocab_size=model.config.vocab_size, pad_token_id=padding, max_position_embeddings=padding + 80
    )
    with pytest.raises(UserError, match="counts positions from its padding id"):
        cut_embedding(model, kept)
    assert model.get_input_embeddings().num_embeddings > len(kept)


def test_a_model_of_another_tokenizer(made: Made, tmp_path: Path) -> None:
    source = tmp_path / "source"
    made.model("RoBERTa", "roberta").save_pretrained(source)
    shutil.copytree(made.tokenizer("RoBERTa"), source, dirs_exist_ok=True)
    with pytest.raises(UserError, match="cut from another tokenizer"):
        trim(source, made.vocabulary("BERT"), tmp_path / "small")
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer_file": "../tokenizer.json"}, "tokenizer_file"),
        ({"special_ids": None}, "corrupt"),
        ({"special_ids": [9999]}, "drops special ids"),
        ({"old_ids": [-1, *range(8)], "vocab_size": 9, "special_ids": []}, "outside of 0 to"),
        ({"old_ids": [], "vocab_size": 0, "special_ids": []}, "outside of 0 to"),
    ],
)
def test_a_corrupt_map(changes: dict, message: str, made: Made, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(made.vocabulary("BERT").directory, tmp_path / "copy"))
    path = copy / "vocabulary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=message):
        read_vocabulary(copy)
