"""Tasks: what is trained, apart from how its layers freeze.

A task is a user's own file, or a built-in one by its options.
A `Task` is a frozen dataclass. These calls are all that a trainer needs:

    task = load_task("my_task.py")                   # or "my_task.py:name"; checks it with two samples
    task = built_in("cifar10", "wrn-16-2", data_dir="data", device="cuda")

    model = task.make_model()                        # draws from torch's generator
    optimizer = task.optimizer(model.parameters())   # the task's own, or AdamW
    found = batches(task.train, batch_size, shuffle=True, seed=seed, epoch=epoch, collate=task.collate,
                    workers=task.workers)
    for inputs, targets in found:                    # tensors, or dicts, tuples and lists of tensors
        loss, outputs = task.loss(model, (inputs, targets))   # criterion(call(model, inputs), targets)
    loss, metric = task.evaluate(model, batches(task.evaluation, batch_size, ...))

Order and augmentation are functions of (seed, epoch) alone. The number of workers and earlier draws change nothing.
So a run can be resumed at any epoch.
`freezeout_ext.batch` has `size` (samples in a batch), `to` (onto a device) and `part`.

Data is a map-style dataset, or a dataset that makes its batches itself on the device.
Datasets of the second kind are `DeviceData`, such as the built-in sets.
A feature cache reads its views by `dataset[i]` with seeded generators from the first kind.
From the second kind a feature cache reads them by `batch(samples, seeds)` and `targets(samples)`.
"""

from .batches import batches
from .built_in import DATA, built_in
from .device_data import DeviceData, uniform
from .metrics import Metric, accuracy, mean_absolute_error, mean_iou, mean_of, rmse
from .places import TaskFault
from .task import Task, cross_entropy
from .user_file import faults_of, load_task

__all__ = [
    "DATA",
    "DeviceData",
    "Metric",
    "Task",
    "TaskFault",
    "accuracy",
    "batches",
    "built_in",
    "cross_entropy",
    "faults_of",
    "load_task",
    "mean_absolute_error",
    "mean_iou",
    "mean_of",
    "rmse",
    "uniform",
]
