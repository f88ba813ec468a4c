"""Classify images with ViT. python examples/vision.py"""

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

processor = AutoImageProcessor.from_pretrained(NAME)
model = AutoModelForImageClassification.from_pretrained(NAME, num_labels=len(COLOURS))
rasa_ext.patch_model(model, rank=8, k=1, modules_to_save=["classifier"])
rows = []
for label, colour in enumerate(COLOURS.values()):
    pixels = processor(Image.new("RGB", (64, 64), colour), return_tensors="pt")["pixel_values"]
    rows.append({"pixel_values": pixels[0], "labels": torch.tensor(label)})
arguments = TrainingArguments(
    "vision",
    learning_rate=3e-3,
    max_steps=8,
    per_device_train_batch_size=3,
    report_to="none",
)
trainer = Trainer(model, arguments, train_dataset=rows)
trainer.train()
trainer.save_model("vision")  # the adapter and the head
