"""T5: encoder and decoder have separate pools. python examples/seq2seq.py"""

from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

import rasa_ext

NAME = "google-t5/t5-small"
PAIRS = [("one two three", "three two one"), ("red green", "green red"), ("up down", "down up")]

tokenizer = AutoTokenizer.from_pretrained(NAME)
model = AutoModelForSeq2SeqLM.from_pretrained(NAME)
rasa_ext.patch_model(model, rank=8, k=1)
rows = [tokenizer(source, text_target=target) for source, target in PAIRS]
arguments = Seq2SeqTrainingArguments(
    "seq2seq",
    learning_rate=3e-3,
    max_steps=8,
    per_device_train_batch_size=3,
    report_to="none",
)
collator = DataCollatorForSeq2Seq(tokenizer, model)
trainer = Seq2SeqTrainer(model, arguments, train_dataset=rows, data_collator=collator)
trainer.train()
trainer.save_model("seq2seq")
