"""What goes wrong in silence when a forward is captured: each either handled or refused, and said."""

import copy

import pytest
import torch
import torch.nn.functional as F
from prefix_cases import NETS, ShyOfHooks, UNet, assert_same_steps, conv_bn, freeze, images, one_step, pair, trained
from torch import nn
from torch.utils.checkpoint import checkpoint

from freezeout_ext.layers import find_layers
from freezeout_ext.prefix import Prefix


class Glue(nn.Module):
    """Three layers and a head; what stands between the first and the second is the subclass's."""

    def __init__(self):
        super().__init__()
        self.one, self.two = conv_bn(3, 6), nn.Sequential(*conv_bn(6, 6), nn.ReLU())
        self.three, self.head = nn.Sequential(*conv_bn(6, 6), nn.ReLU()), nn.Linear(6, 10)

    def between(self, x):
        return F.relu(x)

    def forward(self, x):
        x = self.two(self.between(self.one(x)))
        return self.head(self.three(x).mean((2, 3)))


def check(model: nn.Module, num_frozen: int = 2, mode: str = "exact", **options) -> Prefix:
    model.train()
    plain, model, prefix = pair(model, num_frozen, mode)
    assert_same_steps(plain, model, **options)
    return prefix


class Checkpointed(Glue):
    def forward(self, x):
        x = self.two(self.between(self.one(x)))
        return self.head(checkpoint(lambda t: self.three(t) * 2, x, use_reentrant=self.reentrant).mean((2, 3)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_is_not_traced_away(reentrant):
    Checkpointed.reentrant = reentrant
    prefix = check(Checkpointed())
    assert prefix.report().route == "split"


class CheckpointedBlocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = NETS["wrn"]()

    def forward(self, x):
        x = self.net.stem(x)
        for block in self.net.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.net.head(x)


def test_frozen_blocks_under_checkpoint_run_as_a_chain():
    torch.manual_seed(1)
    prefix = check(CheckpointedBlocks(), 3)
    assert prefix.report().route == "chain"


class Growing(nn.Module):
    """Dense blocks in the way that hands each layer a list which grows later."""

    class Layer(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.conv = conv_bn(channels, 4)

        def forward(self, features):
            return F.relu(self.conv(torch.cat(features, 1)))

    def __init__(self):
        super().__init__()
        self.stem, self.layers = conv_bn(3, 4), nn.ModuleList(self.Layer(4 * n) for n in (1, 2, 3))
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(features))
        return self.head(torch.cat(features, 1).mean((2, 3)))


@pytest.mark.parametrize("num_frozen", [2, 3])
def test_a_list_that_grows_after_it_was_handed_over(num_frozen):
    prefix = check(Growing(), num_frozen, batches=(6,) * 6)
    report = prefix.report()
    assert report.route == "split" and report.units == report.of_units and report.calls


class Counting(Glue):
    """Its own code counts, draws, asks for values, and reads what changes."""

    def __init__(self, how="plain"):
        super().__init__()
        self.how, self.count, self.seen, self.alpha = how, 0, [], 1.0
        self.register_buffer("tensor", torch.zeros(()))

    def between(self, x):
        return F.relu(x) * self.factor(x)

    def factor(self, x):
        if self.how == "buffer":
            return 1 + 0.01 * self.tensor.add_(1)
        if self.how == "buffer replaced":
            self.tensor = self.tensor + 1
            return 1 + 0.01 * self.tensor
        if self.how == "attribute":
            self.count += 1
            return 1 + 0.01 * self.count
        if self.how == "list":
            self.seen.append(len(self.seen))
            return 1 + 0.01 * len(self.seen)
        if self.how == "random numbers":
            return 1 + torch.randn(6, 1, 1)
        if self.how == "dropout":
            return F.dropout(torch.ones(6, 1, 1), 0.3, self.training)
        if self.how == "values":
            return 1 if x.mean() > 0 else 2
        return self.alpha


CODE = ["plain", "buffer", "buffer replaced", "attribute", "list", "random numbers", "dropout", "values"]


@pytest.mark.parametrize("how", CODE)
def test_code_between_the_modules_runs_as_it_is(how):
    plain, model, prefix = pair(Counting(how).train(), 2, "exact")
    assert_same_steps(plain, model)
    report = prefix.report()
    assert report.route == "split" and report.units == report.of_units and report.calls
    plain.alpha = model.alpha = 3.0
    assert_same_steps(plain, model)
    assert (model.count, model.seen, model.tensor) == (plain.count, plain.seen, plain.tensor)


class TrainingOnly(Glue):
    def between(self, x):
        return F.relu(x) if self.training else x * 2


def test_evaluation_is_not_the_traced_training_path():
    plain, model, _ = pair(TrainingOnly().train(), 2, "exact")
    assert_same_steps(plain, model)
    model.eval(), plain.eval()
    x = images()
    assert torch.equal(model(x), plain(x))


class Arguments(Glue):
    def forward(self, batch, mask=None, *, gain=1.0, flip=False):
        x = batch["image"].flip(3) if flip else batch["image"]
        x = self.two(self.between(self.one(x))) * gain
        x = x if mask is None else x * mask
        return {"logits": self.head(self.three(x).mean((2, 3))), "features": (x, [gain])}


def test_dicts_keywords_and_options_in_and_out():
    plain, model, prefix = pair(Arguments().train(), 2, "exact")
    mask = torch.rand(16, 16)
    calls = [
        {},
        {},
        {},
        {"mask": mask},
        {"gain": 2.0},
        {"flip": True},
        {"mask": None, "gain": 1.0},
    ]
    for seed, options in enumerate(calls):
        results = []
        for net in (plain, model):
            results.append(
                one_step(net, seed, run=lambda net, x, options=options: net({"image": x}, **options)["logits"])
            )
        for name, value in results[0].items():
            assert torch.equal(value, results[1][name]), (options, name)
    report = prefix.report()
    assert report.route == "split" and report.calls == 12  # two pieces in all but the watched forward


# Hooks


@pytest.mark.parametrize("name", ["wrn", "resnet-50"])
def test_hooks_on_active_modules_fire_once_a_forward_also_while_watched(name):
    plain, model, _ = pair(trained(name), 3, "exact")
    counts = []
    for net in (plain, model):
        seen: list[str] = []
        for inner, module in net.named_modules():
            if any(p.requires_grad for p in module.parameters()):
                module.register_forward_hook(lambda m, a, o, inner=inner, seen=seen: seen.append(inner))
        counts.append(seen)
    straddles = name == "resnet-50"  # hooks on what holds both kinds forbid to open it
    assert_same_steps(plain, model)
    assert counts[0] == counts[1] and len(counts[0]) > 4
    assert not straddles or "layer1" not in counts[0]


@pytest.mark.parametrize("name", ["wrn", "resnet-50"])
@pytest.mark.parametrize("when", ["before", "later"])
def test_a_hook_on_a_frozen_module_fires_and_cuts_before_it(name, when):
    plain, model, prefix = pair(trained(name), 4, "folded")
    if when == "later":
        for seed in range(3):
            one_step(plain, seed), one_step(model, seed)
        assert not prefix.report().fallbacks or name == "resnet-50"
    seen = [[], []]
    for net, values in zip((plain, model), seen, strict=True):
        inner = net.blocks[1].conv2 if name == "wrn" else net.layer1[1].b
        inner.register_forward_hook(lambda m, a, output, values=values: values.append(output.clone()))
    for seed in range(5):
        one_step(plain, seed), one_step(model, seed)
    assert len(seen[0]) == len(seen[1]) == 5
    torch.testing.assert_close(seen[1][-1], seen[0][-1], rtol=1e-4, atol=1e-5)  # folding in front of it
    report = prefix.report()
    assert 0 < report.units < report.of_units
    assert report.fused


def test_a_hook_may_look_at_a_value_inside_the_chain_of_a_call():
    model = trained("wrn")
    plain, model, _ = pair(model, 4, "exact")
    assert_same_steps(plain, model)
    seen = [[], []]
    for net, values in zip((plain, model), seen, strict=True):
        net.blocks[0].register_forward_hook(lambda m, a, o, values=values: values.append(o.mean()))
    assert_same_steps(plain, model)
    assert seen[0] == seen[1]


def test_global_hooks_see_the_modules_run():
    plain, model, _ = pair(trained("wrn"), 4, "exact")
    assert_same_steps(plain, model)
    kinds = [[], []]
    for net, seen in zip((plain, model), kinds, strict=True):
        handle = nn.modules.module.register_module_forward_hook(lambda m, a, o, seen=seen: seen.append(type(m)))
        net(images())
        handle.remove()
    assert kinds[0] == kinds[1]


# Values between the units of a chain


class Looking(nn.Module):
    """A model that looks at an inner value in some way between or behind the frozen units."""

    def __init__(self, look):
        super().__init__()
        self.one, self.act, self.two = nn.Conv2d(3, 6, 1), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 1)
        self.drop, self.head, self.look = nn.Dropout(), nn.Linear(6, 10), look

    def forward(self, x):
        start, x = x, x.clone()
        a = self.one(x)
        b = self.act(a)
        if self.look == "a value that the next unit wrote":
            b = a + b
        c = self.drop(self.two(b))
        if self.look == "after the input changed":
            x.zero_()
            c = c + b
        elif self.look == "at a value that shares memory with a later one":
            b.add_(1)
            c = c + a
        elif self.look == "writes":
            b.mul_(2)
            c = c + b
        elif self.look == "at two":
            c = c + a + b
        return self.head(c.mean((2, 3)) + start.mean())


LOOKS = [
    "a value that the next unit wrote", "after the input changed", "at a value that shares memory with a later one",
    "writes", "at two",
]  # fmt: skip


@pytest.mark.parametrize("mode", ["exact", "folded"])
@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("since", [0, 4])
def test_whoever_looks_at_an_inner_value_sees_that_of_eager(look, mode, since):
    names = [["one", "act"], "two", "head"]
    model = Looking(None if since else look).train()
    plain = copy.deepcopy(model)
    for net in (plain, model):
        layers = find_layers(net, names)
        freeze(net, 2, layers)
    prefix = Prefix(model, layers, mode=mode, measure=False)
    prefix.freeze(2)
    for seed in range(8):
        if seed == since:
            plain.look = model.look = look
        if since and look == "after the input changed" and seed == since:
            with pytest.raises(RuntimeError, match="was looked at after the input of one was changed in place"):
                one_step(model, seed)
            one_step(plain, seed)
            continue
        expected, found = one_step(plain, seed), one_step(model, seed)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0 if mode == "exact" else 1e-4, atol=1e-6)
    assert prefix.report().calls
    cut = [2, 1] if look == "after the input changed" else [1, 1]  # behind the unit whose value was looked at
    assert [len(chain.units) for chain in prefix._chains] == cut


class Swapping(nn.Module):
    """Changes the second frozen unit between the calls of the first and the second."""

    def __init__(self, how):
        super().__init__()
        self.one, self.two, self.head, self.how = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Linear(6, 10), how

    def forward(self, x):
        x = self.one(x)
        with torch.no_grad():
            if self.how == "data":
                self.two.weight.data.mul_(1.01)
            elif self.how == "version":
                self.two.weight.mul_(1.01)
            elif self.how == "attribute":
                self.two.stride = (2, 2)
        x = self.two(x)
        if self.how == "attribute":
            self.two.stride = (1, 1)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("mode", ["exact", "folded"])
@pytest.mark.parametrize("how", ["data", "version", "attribute"])
def test_a_unit_that_the_model_changes_in_its_forward_is_in_no_chain(how, mode):
    model = Swapping(how).train()
    plain = copy.deepcopy(model)
    for net in (plain, model):
        layers = find_layers(net, ["one", "two", "head"])
        freeze(net, 2, layers)
    prefix = Prefix(model, layers, mode=mode, measure=False)
    prefix.freeze(2)
    for seed in range(5):
        expected, found = one_step(plain, seed), one_step(model, seed)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0 if mode == "exact" else 1e-4, atol=1e-6)
    report = prefix.report()
    assert report.units == 1 and report.calls and "two runs as it is: the model changes it" in str(report), report


def test_shapes_of_a_value_inside_a_chain_are_its_own():
    class Sized(UNet):
        def forward(self, x):
            a = self.down1(x)
            height, width = a.shape[2:]
            return F.interpolate(self.up1(torch.cat((self.middle(self.down2(a)), a[:, :4]), 1)), (height, width)).mean(
                (2, 3)
            )

    prefix = check(Sized(), 3)
    assert prefix.report().error == 0.0


# Gradients that must not be cut


class TrainableGain(Glue):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(6, 1, 1))

    def between(self, x):
        return F.relu(x) * self.gain


def test_a_frozen_layer_behind_an_active_parameter_hands_its_gradient_on():
    model = TrainableGain().train()
    names = ["one", "two", ["gain", "three"], "head"]
    plain = copy.deepcopy(model)
    for net in (plain, model):
        layers = find_layers(net, names)
        freeze(net, 2, layers)
    prefix = Prefix(model, layers, mode="folded", measure=False)
    prefix.freeze(2)
    for seed in range(4):
        expected, found = one_step(plain, seed), one_step(model, seed)
        assert "gradient of gain" in found
        torch.testing.assert_close(found["gradient of gain"], expected["gradient of gain"], rtol=1e-3, atol=1e-6)
    assert prefix.report().units < prefix.report().of_units


@pytest.mark.parametrize("name", ["wrn", "resnet-50"])
def test_an_input_that_needs_a_gradient_gets_it(name):
    plain, model, _ = pair(trained(name), 3, "folded")
    for seed in range(3):
        one_step(plain, seed), one_step(model, seed)
    plain.load_state_dict(model.state_dict())
    x = images()
    grads = []
    for net in (plain, model):
        leaf = x.clone().requires_grad_()
        net(leaf).square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


class InPlaceBehind(Glue):
    def forward(self, x):
        x = self.two(self.between(self.one(x)))
        return self.head(self.three(F.relu(x.mul_(2), inplace=True)).mean((2, 3)))


@pytest.mark.parametrize("mode", ["exact", "folded"])
def test_code_behind_the_frontier_may_write_into_it(mode):
    if mode == "exact":
        prefix = check(InPlaceBehind())
        assert prefix.report().error == 0.0
    _, model, prefix = pair(InPlaceBehind().train(), 2, mode)
    first = [one_step(model, 1, 6)["output"] for _ in range(3)] and one_step(copy.deepcopy(model), 4)["output"]
    assert torch.isfinite(first).all()


# Modes of modules, tensors and calls


@pytest.mark.parametrize("name", ["wrn", "resnet-50"])
def test_a_frozen_norm_flipped_to_training_runs_as_it_is(name):
    plain, model, prefix = pair(trained(name), 3, "exact")
    assert_same_steps(plain, model)
    for net in (plain, model):
        norm = (net.blocks[0] if name == "wrn" else net.layer1[0].a).get_submodule("bn1" if name == "wrn" else "1")
        norm.training = True
    assert_same_steps(plain, model)
    assert "training mode" in str(prefix.report())


def test_a_capture_after_evaluation_under_inference_mode_can_be_saved_for_backward():
    plain, model, prefix = pair(trained("densenet"), 3, "folded")
    with torch.inference_mode():
        model(images())
    for seed in range(2):
        one_step(model, seed)
    with torch.inference_mode():
        model(images(9))  # a larger batch: its buffers are made here
    one_step(model, 2, 9)
    plain.load_state_dict(model.state_dict())
    expected, found = one_step(plain, 3, 9), one_step(model, 3, 9)
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-4, atol=0)  # folding
    assert prefix.report().route == "chain"


def test_vmap_and_functional_call_run_the_modules():
    plain, model, _ = pair(trained("wrn"), 3, "folded")
    for seed in range(3):
        one_step(model, seed)
    plain.load_state_dict(model.state_dict())
    model.eval(), plain.eval()
    x = images(4)
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    with torch.no_grad():
        for net in (plain, model):
            assert torch.equal(torch.func.functional_call(net, zeros, (x,)), torch.zeros(4, 10))
        mapped = torch.func.vmap(lambda image: model(image[None])[0])(x)
        torch.testing.assert_close(mapped, plain(x), rtol=1e-4, atol=1e-4)  # vmap convolves in another order


def test_a_forward_that_raises_while_it_is_watched_leaves_nothing_behind():
    plain, model, prefix = pair(trained("wrn"), 3, "exact")
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 5, 16, 16))
    assert_same_steps(plain, model)
    assert prefix.report().route == "chain"


def test_a_capture_that_fails_leaves_the_modules_and_says_so(monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise RuntimeError("engine on fire")

    monkeypatch.setattr("freezeout_ext.prefix.build.Builder._engine", broken)
    plain, model, prefix = pair(trained("wrn"), 3, "folded")
    assert_same_steps(plain, model)
    assert prefix.report().route == "eager"
    assert "engine on fire" in str(prefix.report()) and "engine on fire" in caplog.text


def test_compiled_active_blocks_keep_working():
    plain, model, prefix = pair(trained("wrn"), 3, "exact")
    for net in (plain, model):
        net.blocks[4].compile(backend="eager")
        net.blocks[5] = torch.compile(net.blocks[5], backend="eager")
    assert_same_steps(plain, model)
    assert prefix.report().route == "chain"


def test_a_forward_wrapped_by_someone_else_survives_close():
    plain, model, prefix = pair(trained("wrn"), 3, "exact")
    assert_same_steps(plain, model)
    block = model.blocks[0]
    inner = block.forward
    block.forward = lambda x: inner(x)
    assert_same_steps(plain, model)
    prefix.close()
    assert_same_steps(plain, model)
    assert prefix.report().route == "eager"


@pytest.mark.only_cpu  # its processes are gloo's
def test_distributed_data_parallel_trains_the_same(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("this torch was built without torch.distributed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        plain, model, prefix = pair(trained("wrn"), 3, "exact")
        parallel = nn.parallel.DistributedDataParallel(model)
        for seed in range(3):
            expected, found = one_step(plain, seed), one_step(parallel, seed)
            assert torch.equal(expected["loss"], found["loss"])
            for name, p in plain.named_parameters():
                q = model.get_parameter(name)
                assert (p.grad is None) == (q.grad is None) and (p.grad is None or torch.equal(p.grad, q.grad))
        assert prefix.report().route == "chain"
        del parallel
    finally:
        torch.distributed.destroy_process_group()


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)

    def forward(self, x):
        return self.conv(x) if x.sum() > 0 else -self.conv(x)


@pytest.mark.parametrize("num_frozen", [1, 2])
@pytest.mark.parametrize("first", [Untraceable, lambda: nn.ConvTranspose2d(3, 6, 1)], ids=["untraceable", "torch's"])
def test_a_module_that_is_not_written_as_steps_runs_by_its_own_forward(first, num_frozen):
    """Not by the one that is installed on it, which would call the engine again."""
    last = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10))
    model = nn.Sequential(first(), nn.Sequential(*conv_bn(6, 6)), last).train()
    plain, model, prefix = pair(model, num_frozen, "folded")
    for seed in range(3):
        expected, found = one_step(plain, seed), one_step(model, seed)
        torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-4, atol=0)
    assert prefix.report().route == "chain", prefix.report()
    assert not prefix._chains[0].looked_inside


@pytest.mark.parametrize("num_frozen", [1, 2])
def test_watching_leaves_no_hooks_on_the_frozen_modules(num_frozen):
    last = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10))
    prefix = check(nn.Sequential(ShyOfHooks(3), ShyOfHooks(3), last), num_frozen)
    assert prefix.report().route == "chain"
