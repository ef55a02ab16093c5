"""DeviceData, the built-in sets and `uniform`: every draw follows from its seed alone, in whatever batch it comes."""

import pytest
import torch

from freezeout_ext.tasks import DeviceData, Task, batches, built_in, uniform


def noisy(inputs, seeds):
    return inputs + uniform(seeds, 1).view(-1, 1)


def make(n=23, **options):
    return DeviceData(torch.arange(n).float()[:, None], torch.arange(n), **options)


def test_batches_hold_each_sample_once_with_its_target():
    data = make(augment=lambda inputs, seeds: -inputs, prepare=lambda inputs: inputs / 2)
    found = list(batches(data, 5, shuffle=True, seed=1))
    assert [len(targets) for _, targets in found] == [5, 5, 5, 5, 3]
    targets = torch.cat([targets for _, targets in found])
    assert sorted(targets.tolist()) == list(range(23)) and targets.tolist() != list(range(23))
    assert torch.equal(torch.cat([inputs for inputs, _ in found]), -targets[:, None] / 2)
    assert [len(targets) for _, targets in batches(data, 5, drop_last=True)] == [5, 5, 5, 5]
    assert torch.equal(torch.cat([targets for _, targets in batches(data, 7)]), torch.arange(23))


def test_draws_depend_on_seed_epoch_and_sample_but_not_on_batches():
    data = make(augment=noisy)

    def noise(size=5, **options):
        found = list(batches(data, size, **options))
        inputs, targets = (torch.cat(parts) for parts in zip(*found, strict=True))
        return (inputs[:, 0] - targets)[targets.argsort()]

    first = noise(shuffle=True, seed=1, epoch=2)
    assert len(first.unique()) == 23
    assert torch.equal(first, noise(7, shuffle=True, seed=1, epoch=2))
    assert torch.equal(first, noise(seed=1, epoch=2))
    for other in ({"seed": 2, "epoch": 2}, {"seed": 1, "epoch": 3}):
        assert (first != noise(shuffle=True, **other)).all()


def test_a_batch_of_samples_and_seeds_is_the_same_one_by_one():
    data = make(augment=noisy)
    samples, seeds = torch.tensor([3, 3, 22, 0]), torch.tensor([5, 2**63 - 1, 5, 0])
    whole = data.batch(samples, seeds)
    assert torch.equal(whole, torch.cat([data.batch(samples[i : i + 1], seeds[i : i + 1]) for i in range(4)]))
    assert whole[0] != whole[1] and data.targets(samples).tolist() == [3, 3, 22, 0]


def test_as_a_map_style_dataset_it_draws_from_torchs_generator():
    data = make(augment=noisy)
    torch.manual_seed(4)
    first, again = data[2], data[2]
    torch.manual_seed(4)
    assert torch.equal(data[2][0], first[0]) and not torch.equal(again[0], first[0])
    assert data[-1][1] == 22 and len(list(data)) == 23
    with pytest.raises(IndexError):
        data[23]


def test_what_is_refused():
    with pytest.raises(ValueError, match="targets must be as many as inputs, 3, got 2"):
        DeviceData(torch.zeros(3, 1), torch.zeros(2))
    with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
        batches(make(), 0)


def test_uniform_is_uniform_and_independent():
    n = 40_000
    # Neighbouring seeds, high bits alone, and random ones.
    for seeds in (torch.arange(n), torch.arange(n) << 40, torch.randint(2**63 - 1, (n,))):
        u = uniform(seeds, 3)
        assert u.dtype == torch.float32 and u.min() >= 0 and u.max() < 1
        # A bin of 32 holds 1,250 with sd 35: five of them. A correlation has sd 1 / 200.
        for j in range(3):
            assert ((u[:, j] * 32).long().bincount(minlength=32) - 1250).abs().max() < 175
        assert (torch.corrcoef(u.T) - torch.eye(3)).abs().max() < 0.025
        assert torch.corrcoef(torch.stack([u[:-1, 0], u[1:, 0]]))[0, 1].abs() < 0.025
    assert torch.equal(uniform(seeds, 3)[:, :2], uniform(seeds, 2))


def test_digits_is_a_task_like_any_other():
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    task = built_in("digits", "wrn-10-1", val_fraction=0.1)
    assert isinstance(task, Task) and list(task.datasets()) == ["train", "evaluation", "validation"]
    assert task.notes[0].startswith("digits: 1,212 train + 135 val + 450 test images")
    assert (task.metric_name, task.higher_is_better, task.name) == ("accuracy", True, "digits")
    task.check()
    inputs, targets = next(batches(task.train, task.batch_size, shuffle=True))
    assert inputs.shape == (64, 1, 8, 8) and targets.shape == (64,)
    model = task.make_model().eval()
    whole = torch.cat([model(inputs).argmax(1) == targets for inputs, targets in batches(task.evaluation, 100)])
    assert task.evaluate(model, batches(task.evaluation, 64))[1] == float(whole.double().mean())


def test_another_image_size_scales_the_images():
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    task = built_in("digits", "wrn-10-1", image_size=16, augment=False)
    inputs, _ = next(batches(task.train, 3))
    small, _ = next(batches(built_in("digits", "wrn-10-1").evaluation, 1))
    assert inputs.shape == (3, 1, 16, 16) and small.shape == (1, 1, 8, 8)
    with pytest.raises(ValueError, match="data must be one of digits, cifar10, cifar100, imagefolder, got 'mnist'"):
        built_in("mnist", "wrn-10-1")
