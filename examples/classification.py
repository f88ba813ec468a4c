"""Classify texts with an adapter and a new head trained in full.

python examples/classification.py
"""

import random

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

import rasa_ext

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
WORDS = {
    1: "wonderful moving brilliant charming superb delightful funny gripping excellent lovely",
    0: "awful boring stupid tedious dreadful painful bland confusing terrible dull",
}
THINGS = ["film", "plot", "cast", "music", "ending", "script", "camera", "story", "pace", "hero"]

random.seed(0)
parts = {"train": [], "test": []}
tokenizer = AutoTokenizer.from_pretrained(NAME)
for label, words in WORDS.items():
    for i, word in enumerate(words.split()):
        for thing in THINGS:
            for negation in (0, 1):  # a head alone learns it less well
                text = f"The {thing} was {negation * 'not '}{word}."
                row = {**tokenizer(text), "labels": abs(label - negation)}
                parts["test" if i >= 7 else "train"].append(row)  # the test has other words
random.shuffle(parts["train"])

torch.manual_seed(0)  # of the head
model = AutoModelForSequenceClassification.from_pretrained(NAME, num_labels=2)
model.config.pad_token_id = tokenizer.pad_token_id
rasa_ext.patch_model(model, rank=8, k=1, modules_to_save=["score"])
arguments = TrainingArguments(
    "classification",
    learning_rate=2e-3,
    max_steps=16,
    per_device_train_batch_size=8,
    report_to="none",
)
trainer = Trainer(
    model,
    arguments,
    train_dataset=parts["train"],
    eval_dataset=parts["test"],
    data_collator=DataCollatorWithPadding(tokenizer),
    compute_metrics=lambda told: {"right": (told.predictions.argmax(1) == told.label_ids).mean()},
)
before = trainer.evaluate()["eval_right"]
trainer.train()
print(f"right of held-out words: {before:.0%} -> {trainer.evaluate()['eval_right']:.0%}")
trainer.save_model("classification")  # the adapter and the head
