"""Continue the pre-training of a model, on plain text. python examples/pretraining.py"""

import random
from pydoc_data.topics import topics  # the text of Python's help(), which every Python has

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

import rasa_ext

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"

rows = [{"text": text} for _, text in sorted(topics.items())]
set_seed(0)  # of the order of texts, and of the adapter
random.shuffle(rows)
trainer = SFTTrainer(
    rasa_ext.patch_model(AutoModelForCausalLM.from_pretrained(NAME), rank=8, k=1),
    args=SFTConfig(
        "pretraining",
        learning_rate=3e-3,
        max_steps=6,
        per_device_train_batch_size=2,
        max_length=128,
        packing=True,  # joins texts, and splits long ones
        packing_strategy="wrapped",
        eval_packing=True,
        gradient_checkpointing=False,  # True saves memory
        bf16=False,  # True on a GPU
        report_to="none",
    ),
    train_dataset=Dataset.from_list(rows[:-1]),
    eval_dataset=Dataset.from_list(rows[-1:]),
    processing_class=AutoTokenizer.from_pretrained(NAME),
)
before = trainer.evaluate()["eval_loss"]
trainer.train()
print(f"held-out loss: {before:.3f} -> {trainer.evaluate()['eval_loss']:.3f}")
trainer.save_model("pretraining")
