"""Teach sentence embeddings what counts as similar. python examples/embeddings.py

pip install sentence-transformers
"""

import random

from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.losses import MultipleNegativesRankingLoss
from transformers import set_seed

import rasa_ext

NAME = "sentence-transformers/all-MiniLM-L6-v2"
COUNTS = ["two", "three", "four", "five", "six", "seven", "eight", "nine"]
THINGS = ["pens", "books", "apples", "cups", "tickets", "balls", "plants", "hats", "keys", "shoes"]

set_seed(0)  # of the pairs, and of the adapter
random.shuffle(THINGS)


def pairs(things, number):
    """Return pairs of texts that have the number, and nothing else, in common."""
    made = []
    for _ in range(number):
        count, (one, other) = random.choice(COUNTS), random.sample(things, 2)
        made.append({"anchor": f"{count} {one}", "positive": f"We need {count} {other}."})
    return made


train = pairs(THINGS[:6], 256)  # the test has the other things
model = SentenceTransformer(NAME)
rasa_ext.patch_model(model[0].model, rank=8, k=1)


def right():
    """Return how often the nearest text, but for the same words, has the same number."""
    held_out = [(count, thing) for count in COUNTS for thing in THINGS[6:]]
    questions = model.encode([f"{count} {thing}" for count, thing in held_out])
    texts = model.encode([f"We need {count} {thing}." for count, thing in held_out])
    nearest = model.similarity(questions, texts).fill_diagonal_(-1).argmax(1).tolist()
    same = [held_out[i][0] == count for i, (count, _) in zip(nearest, held_out, strict=True)]
    return sum(same) / len(same)


before = right()
trainer = SentenceTransformerTrainer(
    model,
    SentenceTransformerTrainingArguments(
        "embeddings",
        learning_rate=1e-3,
        max_steps=16,
        per_device_train_batch_size=16,
        batch_sampler="no_duplicates",
        report_to="none",
    ),
    train_dataset=Dataset.from_list(train),
    loss=MultipleNegativesRankingLoss(model),
)
trainer.train()
print(f"nearest text has the number: {before:.0%} -> {right():.0%}")
rasa_ext.save_adapter(model[0].model, "embeddings")  # load it: load_adapter(model[0].model, ...)
