"""Sentence vectors with transformers: which of these sentences mean the same?

python examples/with_transformers.py [runs/quickstart/student]
"""

import sys

import torch
from transformers import AutoModel, AutoTokenizer, logging

SENTENCES = [
    "The shop is closed today.",
    "Der Laden ist heute geschlossen.",
    "Завтра будет дождь.",
    "It will rain tomorrow.",
]

logging.set_verbosity_error()  # a student has no pooler; transformers would report that its class has one
directory = sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart/student"
tokenizer = AutoTokenizer.from_pretrained(directory)
model = AutoModel.from_pretrained(directory).eval()

batch = tokenizer(SENTENCES, padding=True, truncation=True, return_tensors="pt")
with torch.inference_mode():
    hidden_BLD = model(**batch).last_hidden_state
mask_BL1 = batch["attention_mask"].unsqueeze(-1)
vectors_BD = (hidden_BLD * mask_BL1).sum(dim=1) / mask_BL1.sum(dim=1)  # mean over real tokens
vectors_BD = torch.nn.functional.normalize(vectors_BD, dim=-1)

similarity = vectors_BD @ vectors_BD.T - 2 * torch.eye(len(SENTENCES))  # not itself
for sentence, nearest in zip(SENTENCES, similarity.argmax(dim=1).tolist(), strict=True):
    print(f"{sentence}  ->  {SENTENCES[nearest]}")
