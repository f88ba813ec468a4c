"""DPO: prefer one answer to another. python examples/dpo.py"""

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import rasa_ext.peft

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PAIRS = [
    {"prompt": f"What is {i} plus {i}?", "chosen": f" {i + i}", "rejected": " I do not know."}
    for i in range(16)
]

trainer = DPOTrainer(
    AutoModelForCausalLM.from_pretrained(NAME),  # the reference is this model without the adapter
    args=DPOConfig(
        "dpo",
        learning_rate=1e-4,
        max_steps=4,
        per_device_train_batch_size=4,
        bf16=False,  # True on a GPU
        report_to="none",
    ),
    train_dataset=Dataset.from_list(PAIRS),
    processing_class=AutoTokenizer.from_pretrained(NAME),
    peft_config=rasa_ext.peft.RasaConfig(r=8, task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model("dpo")
