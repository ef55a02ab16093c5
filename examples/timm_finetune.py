"""Fine-tune a timm model on a folder of images, one subfolder a class: python examples/timm_finetune.py photos/

Layers come from the model's own group_matcher. Images are read by torchvision where it is installed, else by Pillow.
"""

import argparse
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from freezeout_ext import FreezeOut

try:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2
except ImportError:
    v2 = None


class PillowFolder(Dataset):
    """folder/class/image -> (float [3, size, size] in -1..1, class index), resized, flipped at random."""

    def __init__(self, folder: Path, size: int) -> None:
        self.classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
        self.size = size
        self.samples = [(p, i) for i, name in enumerate(self.classes) for p in sorted((folder / name).iterdir())]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, target = self.samples[index]
        with Image.open(path) as image:
            image = image.convert("RGB").resize((self.size, self.size))
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(self.size, self.size, 3)
        pixels = pixels.permute(2, 0, 1).float() / 127.5 - 1
        return pixels.flip(2) if torch.rand(()) < 0.5 else pixels, target


def image_folder(folder: Path, size: int) -> Dataset:
    if v2 is None:
        return PillowFolder(folder, size)
    steps = [v2.RandomResizedCrop(size, scale=(0.5, 1)), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    return ImageFolder(folder, v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.5])]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--pretrained", action="store_true")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = image_folder(args.folder, args.size)
    loader = DataLoader(data, batch_size=16, shuffle=True)
    model = timm.create_model(args.model, pretrained=args.pretrained, num_classes=len(data.classes)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    freezeout = FreezeOut(model, optimizer, total_steps=args.epochs * len(loader), t_0=0.6)
    print(freezeout.layers)
    model.train()
    for epoch in range(args.epochs):
        for inputs, targets in loader:
            loss = F.cross_entropy(model(inputs.to(device)), targets.to(device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            freezeout.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, {freezeout.num_frozen} of {len(freezeout.layers)} frozen")


if __name__ == "__main__":
    main()
