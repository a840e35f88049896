"""The same with sentence-transformers; export with `--sentence-transformers` first, install `sentence-transformers`.

python examples/with_sentence_transformers.py [runs/quickstart/student]
"""

import sys

import numpy as np
from sentence_transformers import SentenceTransformer
from transformers import logging

SENTENCES = [
    "The shop is closed today.",
    "Der Laden ist heute geschlossen.",
    "Завтра будет дождь.",
    "It will rain tomorrow.",
]

logging.set_verbosity_error()  # a student has no pooler; transformers would report that its class has one
model = SentenceTransformer(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart/student")
vectors_BD = model.encode(SENTENCES)  # unit length

similarity = vectors_BD @ vectors_BD.T - 2 * np.eye(len(SENTENCES))  # not itself
for sentence, nearest in zip(SENTENCES, similarity.argmax(axis=1), strict=True):
    print(f"{sentence}  ->  {SENTENCES[nearest]}")
