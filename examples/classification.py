"""Classify texts with an adapter and a new head trained in full.

python examples/classification.py
"""

from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

import rasa_ext

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
TEXTS = ["A joy to watch.", "I left after an hour.", "The best of the year.", "Dull."]
LABELS = [1, 0, 1, 0]

tokenizer = AutoTokenizer.from_pretrained(NAME)
model = AutoModelForSequenceClassification.from_pretrained(NAME, num_labels=2)
model.config.pad_token_id = tokenizer.pad_token_id
rasa_ext.patch_model(model, rank=8, k=1, modules_to_save=["score"])
rows = [{**tokenizer(text), "labels": label} for text, label in zip(TEXTS, LABELS, strict=True)]
arguments = TrainingArguments(
    "classification",
    learning_rate=3e-3,
    max_steps=8,
    per_device_train_batch_size=4,
    report_to="none",
)
collator = DataCollatorWithPadding(tokenizer)
trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator)
trainer.train()
trainer.save_model("classification")  # the adapter and the head
