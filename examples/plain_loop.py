"""FreezeOut in a plain training loop, on scikit-learn's 8x8 digits: python examples/plain_loop.py

Prints what froze, when, and the accuracy. Add --accelerate to let Hugging Face Accelerate place and wrap the model
(also under `accelerate launch` or `torchrun` with several processes).
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from freezeout_ext import FreezeOut, FusedSGD
from freezeout_ext.integrations.distributed import DDPFollower
from freezeout_ext.models import build_model


def digits() -> tuple[TensorDataset, TensorDataset]:
    images, labels = load_digits(return_X_y=True)
    inputs = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16 - 0.5
    targets = torch.tensor(labels)
    return TensorDataset(inputs[:1400], targets[:1400]), TensorDataset(inputs[1400:], targets[1400:])


def main() -> float:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--t_0", type=float, default=0.5)
    parser.add_argument("--accelerate", action="store_true")
    args = parser.parse_args()

    torch.manual_seed(0)
    train_set, test_set = digits()
    loader = DataLoader(train_set, batch_size=50, shuffle=True, drop_last=True)
    model = net = build_model("wrn-10-1", num_classes=10, in_channels=1, image_size=8)
    optimizer = FusedSGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)

    backward = torch.Tensor.backward
    processes = 1
    if args.accelerate:
        from accelerate import Accelerator

        accelerator = Accelerator()
        backward, processes = accelerator.backward, accelerator.num_processes
    # Of the bare model and optimizer: before Accelerate wraps them.
    freezeout = FreezeOut(model, optimizer, total_steps=args.epochs * (len(loader) // processes), t_0=args.t_0)
    freezeout.register_transition_hook(lambda _, t: print(f"step {t.step}: froze {', '.join(t.layers)}"))
    if args.accelerate:
        net, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        accelerator.register_for_checkpointing(freezeout)
    if processes > 1:
        DDPFollower(freezeout, net)

    for _ in range(args.epochs):
        net.train()
        for inputs, targets in loader:
            loss = F.cross_entropy(net(inputs), targets)
            backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            freezeout.step()

    model.eval()
    inputs, targets = (tensor.to(next(model.parameters()).device) for tensor in test_set.tensors)
    with torch.no_grad():
        accuracy = (model(inputs).argmax(1) == targets).float().mean().item()
    print(f"{freezeout}\ntest accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
