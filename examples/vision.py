"""Classify images with ViT. python examples/vision.py"""

import random

import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
)

import rasa_ext

NAME = "google/vit-base-patch16-224-in21k"
COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}

random.seed(0)
processor = AutoImageProcessor.from_pretrained(NAME)


def example(label):
    """Return an image of random size of one colour's shade, on a grey ground."""
    side = random.randint(32, 96)
    image = Image.new("RGB", (side, side), 3 * (random.randint(60, 200),))
    shade = tuple(value + random.randint(-30, 30) for value in list(COLOURS.values())[label])
    corner = random.randint(0, side // 2), random.randint(0, side // 2)
    image.paste(shade, (*corner, corner[0] + side // 2, corner[1] + side // 2))
    pixels = processor(image, return_tensors="pt")["pixel_values"][0]
    return {"pixel_values": pixels, "labels": torch.tensor(label)}


rows = [example(i % len(COLOURS)) for i in range(192)]
random.shuffle(rows)
torch.manual_seed(0)  # of the head
model = AutoModelForImageClassification.from_pretrained(NAME, num_labels=len(COLOURS))
rasa_ext.patch_model(model, rank=8, k=1, modules_to_save=["classifier"])
arguments = TrainingArguments(
    "vision",
    learning_rate=3e-3,
    max_steps=60,
    per_device_train_batch_size=8,
    report_to="none",
)
trainer = Trainer(
    model,
    arguments,
    train_dataset=rows[:-24],
    eval_dataset=rows[-24:],
    compute_metrics=lambda told: {"right": (told.predictions.argmax(1) == told.label_ids).mean()},
)
before = trainer.evaluate()["eval_right"]
trainer.train()
print(f"right of held-out images: {before:.0%} -> {trainer.evaluate()['eval_right']:.0%}")
trainer.save_model("vision")  # the adapter and the head
