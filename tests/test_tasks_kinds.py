"""Tasks of four kinds: each makes data, model, loss and metric, learns, and is judged as a plain computation does."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from freezeout_ext.batch import call
from freezeout_ext.tasks import DeviceData, Metric, Task, batches, mean_iou, mean_of, rmse, uniform


def flipped(inputs, seeds):
    return torch.where((uniform(seeds, 1) < 0.5).view(-1, 1, 1, 1), inputs.flip(3), inputs)


def classification():
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(3, (60,), generator=generator)
    images = torch.rand(60, 1, 8, 8, generator=generator) + labels.view(-1, 1, 1, 1)
    return Task(
        make_model=lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)),
        train=DeviceData(images[:40], labels[:40], augment=flipped),
        evaluation=DeviceData(images[40:], labels[40:]),
        batch_size=8,
    )


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU())
        self.middle = nn.Sequential(
            nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Upsample(scale_factor=2)
        )
        self.head = nn.Conv2d(24, 3, 1)

    def forward(self, x):
        x = self.down(x)
        return self.head(torch.cat([x, self.middle(x)], 1))


class Squares(Dataset):
    """Noise with a square whose pixels, by its brightness, are of class 1 or 2; the border does not count."""

    def __init__(self, count, augmented):
        self.count, self.augmented = count, augmented

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        image = torch.rand(1, 12, 12, generator=torch.Generator().manual_seed(i))
        mask = torch.zeros(12, 12, dtype=torch.long)
        mask[2 + i % 5 : 6 + i % 5, 3:8] = 1 + i % 2
        image += mask
        mask[0] = -100
        return (image.flip(2), mask.flip(1)) if self.augmented and torch.rand(()) < 0.5 else (image, mask)


def segmentation():
    return Task(
        make_model=UNet, train=Squares(30, True), evaluation=Squares(13, False), batch_size=6, metric=mean_iou(3)
    )


class Sentences(Dataset):
    """Token lists of different length, of class 1 where the first token is above 10."""

    def __init__(self, start, count):
        self.start, self.count = start, count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(self.start + i)
        length = int(torch.randint(3, 9, (1,), generator=generator))
        tokens = torch.randint(1, 20, (length,), generator=generator)
        return {"input_ids": tokens, "labels": int(tokens[0] > 10)}


def padded(samples):
    tokens = nn.utils.rnn.pad_sequence([sample["input_ids"] for sample in samples], batch_first=True)
    labels = torch.tensor([sample["labels"] for sample in samples])
    return {"input_ids": tokens, "attention_mask": (tokens > 0).long(), "labels": labels}


def text():
    transformers = pytest.importorskip("transformers", reason="pip install freezeout_ext[transformers]")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    return Task(
        make_model=lambda: transformers.BertForSequenceClassification(config),
        train=Sentences(0, 64),
        evaluation=Sentences(1000, 30),
        collate=padded,
        batch_size=8,
    )


def regression():
    x = torch.linspace(-1, 1, 70)[torch.randperm(70, generator=torch.Generator().manual_seed(0))][:, None]
    return Task(
        make_model=lambda: nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)),
        train=TensorDataset(x[:50], 2 * x[:50] + 1),
        evaluation=TensorDataset(x[50:], 2 * x[50:] + 1),
        criterion=F.mse_loss,
        metric=rmse("mm"),
        batch_size=10,
    )


KINDS = [classification, segmentation, text, regression]


def whole(task, model):
    """Outputs and targets of the evaluation, sample by sample, without any loader."""
    found = []
    for i in range(len(task.evaluation)):
        sample = task.evaluation[i]
        if isinstance(sample, dict):
            inputs = {"input_ids": sample["input_ids"][None], "attention_mask": torch.ones(1, len(sample["input_ids"]))}
            outputs, target = call(model, inputs).logits, torch.tensor(sample["labels"])
        else:
            outputs, target = model(sample[0][None]), sample[1]
        found.append((outputs[0], target))
    return [torch.stack(values) for values in zip(*found, strict=True)]


def plain_metric(task, outputs, targets):
    if task.criterion is F.mse_loss:
        return (outputs - targets).square().mean().sqrt()
    found, counted = outputs.argmax(1), targets != -100
    if task.metric.name == "accuracy":
        return (found == targets).double().mean()
    scores = [
        ((found == k) & (targets == k) & counted).sum() / (((found == k) | (targets == k)) & counted).sum()
        for k in range(3)
    ]
    return torch.stack(scores).double().mean()


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_fits_together_learns_and_is_judged_as_by_a_plain_computation(kind):
    task = kind()
    state = torch.get_rng_state()
    task.check()
    assert torch.equal(torch.get_rng_state(), state)

    model = task.make_model()
    optimizer = task.optimizer(model.parameters())
    optimizer.param_groups[0]["lr"] = 0.01
    options = {"collate": task.collate}
    before = task.evaluate(model, batches(task.evaluation, 7, **options))
    for epoch in range(12):
        model.train()
        for batch in batches(task.train, task.batch_size, shuffle=True, drop_last=True, epoch=epoch, **options):
            loss, _ = task.loss(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    after = task.evaluate(model, batches(task.evaluation, 7, **options))
    assert after[0] < 0.7 * before[0]
    assert (after[1] > before[1]) == task.higher_is_better

    with torch.no_grad():
        outputs, targets = whole(task, model)
    # Sums in float64 of float32 outputs, computed in batches of another size: a few float32 roundings.
    assert after[1] == pytest.approx(float(plain_metric(task, outputs, targets)), rel=1e-5)
    if task.metric.name != "mean IoU":  # there the loss is a mean over pixels that count, equally many in each batch
        assert after[0] == pytest.approx(float(task.criterion(outputs, targets)), rel=1e-5)
    sizes = [task.evaluate(model, batches(task.evaluation, n, **options))[1] for n in (1, 5, 30)]
    assert sizes == pytest.approx([after[1]] * 3, rel=1e-5)


def flat(found):
    return [leaf for batch in found for leaf in torch.utils._pytree.tree_leaves(batch)]


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_a_function_of_seed_and_epoch(kind):
    task = kind()

    def epoch(**options):
        options = {"shuffle": True, "drop_last": True, "seed": 3, "epoch": 2, "collate": task.collate} | options
        return list(batches(task.train, 8, **options))

    reference = epoch()
    assert len(reference) == len(task.train) // 8
    torch.manual_seed(5)  # nothing hangs on the caller's generator, and it is left as it was
    state = torch.get_rng_state()
    assert all(map(torch.equal, flat(epoch()), flat(reference)))
    assert torch.equal(torch.get_rng_state(), state)
    for other in ({"seed": 4}, {"epoch": 3}):
        assert not all(
            a.shape == b.shape and torch.equal(a, b) for a, b in zip(flat(epoch(**other)), flat(reference), strict=True)
        )
    if kind is segmentation:
        assert all(map(torch.equal, flat(epoch(workers=2)), flat(reference)))


def test_a_metric_of_ones_own_is_weighed_by_samples():
    task = regression()
    distance = mean_of("distance", F.l1_loss, higher_is_better=False, unit="mm")
    task = Task(
        **{name: getattr(task, name) for name in ("make_model", "train", "evaluation", "criterion")}, metric=distance
    )
    model = task.make_model()
    outputs, targets = whole(task, model)
    expected = float((outputs - targets).abs().mean().detach())
    assert task.evaluate(model, batches(task.evaluation, 7))[1] == pytest.approx(expected, rel=1e-6)
    assert (task.metric_name, task.higher_is_better, task.metric.text(0.5)) == ("distance", False, "0.5 mm")


def test_a_metric_that_two_samples_leave_undefined_is_no_fault():
    recall = Metric("recall", lambda outputs, targets: torch.stack([(targets == 1).sum() * 0, (targets == 1).sum()]))
    data = TensorDataset(torch.randn(6, 4), torch.tensor([0, 0, 0, 1, 1, 1]))
    task = Task(make_model=lambda: nn.Linear(4, 2), train=data, evaluation=data, metric=recall)
    task.check()
    assert task.evaluate(task.make_model(), batches(data, 2))[1] == 0
