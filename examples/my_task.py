"""A task: fine-tune a small net on a folder of images, one subfolder a class: freezeout compare examples/my_task.py

PHOTOS names the folder. Of each class a fifth is kept for the evaluation; docs/tasks.md explains every part.
"""

import os
from pathlib import Path

import torch

from freezeout_ext.models import build_model
from freezeout_ext.tasks import Task
from freezeout_ext.tasks.image_folder import ImageFiles

root = Path(os.environ.get("PHOTOS", "photos"))
classes = sorted(path.name for path in root.iterdir() if path.is_dir())
files = [(path, label) for label, name in enumerate(classes) for path in sorted((root / name).glob("*.jpg"))]


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)


task = Task(
    make_model=lambda: build_model("resnet-18-x0.25", num_classes=len(classes)),
    make_optimizer=adamw,
    train=ImageFiles([file for i, file in enumerate(files) if i % 5], size=64, augmented=True),
    evaluation=ImageFiles(files[::5], size=64, augmented=False),
    epochs=10,
    batch_size=32,
    workers=2,
)
