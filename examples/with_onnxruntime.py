"""The same without torch: onnxruntime and the int8 file; export with `--onnx` first, install `onnxruntime`.

python examples/with_onnxruntime.py [runs/quickstart/student]
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

SENTENCES = [
    "The shop is closed today.",
    "Der Laden ist heute geschlossen.",
    "Завтра будет дождь.",
    "It will rain tomorrow.",
]

directory = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart/student")
tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
padding = next(token for token in ("<pad>", "[PAD]") if tokenizer.token_to_id(token) is not None)
tokenizer.enable_padding(pad_id=tokenizer.token_to_id(padding), pad_token=padding)
tokenizer.enable_truncation(max_length=128)
session = onnxruntime.InferenceSession(str(directory / "onnx" / "model_int8.onnx"), providers=["CPUExecutionProvider"])

encodings = tokenizer.encode_batch(SENTENCES)
mask_BL = np.array([encoding.attention_mask for encoding in encodings], dtype=np.int64)
input_ids_BL = np.array([encoding.ids for encoding in encodings], dtype=np.int64)
(hidden_BLD,) = session.run(["last_hidden_state"], {"input_ids": input_ids_BL, "attention_mask": mask_BL})
vectors_BD = (hidden_BLD * mask_BL[..., None]).sum(axis=1) / mask_BL.sum(axis=1, keepdims=True)
vectors_BD /= np.linalg.norm(vectors_BD, axis=-1, keepdims=True)

similarity = vectors_BD @ vectors_BD.T - 2 * np.eye(len(SENTENCES))  # not itself
for sentence, nearest in zip(SENTENCES, similarity.argmax(axis=1), strict=True):
    print(f"{sentence}  ->  {SENTENCES[nearest]}")
