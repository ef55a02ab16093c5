"""Training a task: once, planned, or compared with full training.

from freezeout_ext.training import compare, plan, train

print(plan(task))
summary = compare(task, "runs/mine", seeds=3, start_frozen="blocks.5", cache="device")
"""

from .api import compare, plan, train

__all__ = ["compare", "plan", "train"]
