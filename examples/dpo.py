"""DPO: prefer one answer to another. python examples/dpo.py"""

import random

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import rasa_ext.peft

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def turn(role, text):
    """Return a conversation of one turn, to which TRL applies the model's chat template."""
    return [{"role": role, "content": text}]


pairs = [
    {
        "prompt": turn("user", f"What is {i} plus {j}?"),
        "chosen": turn("assistant", f"{i} plus {j} is {i + j}."),
        "rejected": turn("assistant", f"{i} + {j} = {i + j}"),
    }
    for i in range(2, 12)
    for j in range(2, 12)
]
random.seed(0)
random.shuffle(pairs)
trainer = DPOTrainer(
    AutoModelForCausalLM.from_pretrained(NAME),  # the reference is this model without the adapter
    args=DPOConfig(
        "dpo",
        learning_rate=1e-3,
        max_steps=3,
        per_device_train_batch_size=4,
        gradient_checkpointing=False,  # True saves memory
        bf16=False,  # True on a GPU
        report_to="none",
    ),
    train_dataset=Dataset.from_list(pairs[:-4]),
    eval_dataset=Dataset.from_list(pairs[-4:]),
    processing_class=AutoTokenizer.from_pretrained(NAME),
    peft_config=rasa_ext.peft.RasaConfig(r=8, task_type="CAUSAL_LM"),
)


def preference():
    """Return by how many nats the held-out chosen answers are likelier than the rejected ones."""
    told = trainer.evaluate()
    return told["eval_logps/chosen"] - told["eval_logps/rejected"]


before = preference()
trainer.train()
print(f"chosen above rejected, nats: {before:.1f} -> {preference():.1f}")
trainer.save_model("dpo")
