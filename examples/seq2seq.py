"""T5: encoder and decoder have separate pools. python examples/seq2seq.py"""

import itertools
import random

from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)

import rasa_ext

NAME = "google-t5/t5-small"
WORDS = ["one", "two", "red", "green", "up", "down"]

set_seed(0)  # of the adapter, and of the order of rows
tokenizer = AutoTokenizer.from_pretrained(NAME)
model = AutoModelForSeq2SeqLM.from_pretrained(NAME)
rasa_ext.patch_model(model, rank=8, k=1)
rows = [
    tokenizer(" ".join(words), text_target=" ".join(reversed(words)))
    for words in itertools.permutations(WORDS, 3)
]
random.shuffle(rows)
arguments = Seq2SeqTrainingArguments(
    "seq2seq",
    learning_rate=3e-3,
    max_steps=20,
    per_device_train_batch_size=8,
    report_to="none",
)
trainer = Seq2SeqTrainer(
    model,
    arguments,
    train_dataset=rows[:-24],
    eval_dataset=rows[-24:],
    data_collator=DataCollatorForSeq2Seq(tokenizer, model),
)
before = trainer.evaluate()["eval_loss"]
trainer.train()
print(f"held-out loss: {before:.3f} -> {trainer.evaluate()['eval_loss']:.3f}")
trainer.save_model("seq2seq")
