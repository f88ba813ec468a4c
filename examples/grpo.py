"""GRPO: a reward for the model's own completions. python examples/grpo.py"""

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import rasa_ext.peft

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
ROWS = [{"prompt": f"What is {i} plus {i}?", "answer": str(i + i)} for i in range(16)]


def correct(completions, answer, **_):
    """Return 1 for a completion that contains the answer, else 0."""
    return [float(right in text) for text, right in zip(completions, answer, strict=True)]


trainer = GRPOTrainer(
    AutoModelForCausalLM.from_pretrained(NAME),
    reward_funcs=correct,
    args=GRPOConfig(
        "grpo",
        learning_rate=1e-4,
        max_steps=2,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=16,
        bf16=False,  # True on a GPU
        report_to="none",
    ),
    train_dataset=Dataset.from_list(ROWS),
    processing_class=AutoTokenizer.from_pretrained(NAME),
    peft_config=rasa_ext.peft.RasaConfig(r=8, task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model("grpo")
