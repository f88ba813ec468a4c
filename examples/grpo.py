"""GRPO: a reward for the model's own completions. python examples/grpo.py"""

import random

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import rasa_ext.peft

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"

rows = [
    {"prompt": [{"role": "user", "content": f"What is {i} plus {j}?"}]}
    for i in range(2, 12)
    for j in range(2, 12)
]
random.seed(0)
random.shuffle(rows)


def in_figures(completions, **_):
    """Return the share of digits in every completion."""
    texts = [completion[0]["content"] for completion in completions]
    return [sum(map(str.isdigit, text)) / max(len(text), 1) for text in texts]


trainer = GRPOTrainer(
    AutoModelForCausalLM.from_pretrained(NAME),
    reward_funcs=in_figures,
    args=GRPOConfig(
        "grpo",
        learning_rate=3e-3,
        max_steps=4,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=16,
        num_generations=8,
        num_generations_eval=4,
        max_completion_length=12,
        gradient_checkpointing=False,  # True saves memory
        bf16=False,  # True on a GPU
        report_to="none",
    ),
    train_dataset=Dataset.from_list(rows[:-4]),
    eval_dataset=Dataset.from_list(rows[-4:]),
    processing_class=AutoTokenizer.from_pretrained(NAME),
    peft_config=rasa_ext.peft.RasaConfig(r=8, task_type="CAUSAL_LM"),
)
before = trainer.evaluate()["eval_reward"]
trainer.train()
print(f"held-out reward: {before:.2f} -> {trainer.evaluate()['eval_reward']:.2f}")
trainer.save_model("grpo")
