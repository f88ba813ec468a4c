"""A mixture of experts, whose expert weights share pools. python examples/experts.py

First run examples/orders.py, which writes the data.
"""

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

import rasa_ext

NAME = "allenai/OLMoE-1B-7B-0924-Instruct"

rows = load_dataset("json", data_files={"train": "train.jsonl", "test": "test.jsonl"})
set_seed(0)  # of the adapter
model = AutoModelForCausalLM.from_pretrained(NAME)
rasa_ext.patch_model(model, rank=4, k=1, experts="shared")  # one pool for all experts
trainer = SFTTrainer(
    model,
    args=SFTConfig(
        "experts",
        learning_rate=3e-3,
        max_steps=20,
        per_device_train_batch_size=4,
        bf16=False,  # True on a GPU
        report_to="none",
    ),
    train_dataset=rows["train"],
    eval_dataset=rows["test"],
    processing_class=AutoTokenizer.from_pretrained(NAME),
)
before = trainer.evaluate()["eval_loss"]
trainer.train()
print(f"held-out loss: {before:.3f} -> {trainer.evaluate()['eval_loss']:.3f}")
trainer.save_model("experts")
