"""What stands on the user's modules: pins, copies of them, torch's own ways of using a model, encoders with padding."""

import copy
import pickle
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from test_freezeout import assert_same, batch, controlled, train
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

from freezeout_ext import FreezeOut
from freezeout_ext.attach import no_fast_path, pin, unpin
from freezeout_ext.layers import find_layers
from freezeout_ext.prefix.cpu import unsupported_dtype


def norms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def test_a_thawed_module_is_in_the_mode_that_was_asked_for_last():
    module = nn.Sequential(nn.Sequential(nn.Dropout(), nn.BatchNorm1d(3)), nn.ReLU())
    inner = list(module[0].modules())
    for mode in (True, False):
        module.train()
        for each in inner:
            pin(each)
        module.train(mode)
        assert not any(each.training for each in inner)
        for each in inner:
            unpin(each)
        assert [each.training for each in inner] == [mode] * 3
        assert not any("train" in vars(each) or "reset_running_stats" in vars(each) for each in module.modules())


def test_modules_that_the_user_keeps_in_eval_mode_come_back_so():
    model, optimizer, freezeout = controlled(start_frozen=2)
    freezeout.close()
    norm = norms(model)[0]
    norm.eval()
    freezeout = FreezeOut(model, optimizer, total_steps=10, start_frozen=2)
    freezeout.thaw_to(0)
    assert not norm.training and norms(model)[1].training


def test_an_average_made_while_layers_are_frozen_learns_its_statistics():
    model, optimizer, freezeout = controlled(t_0=0.2)
    train(model, optimizer, freezeout, range(16))
    average = AveragedModel(model)
    train(model, optimizer, freezeout, range(16, 20))
    average.update_parameters(model)
    assert freezeout.num_frozen > 1
    update_bn([batch(step)[0] for step in range(4)], average)
    plain = AveragedModel(copy.deepcopy(model))
    for mine, frozen in zip(norms(average), norms(model), strict=True):
        assert mine.running_mean.any() and int(mine.num_batches_tracked) == 4
        assert int(frozen.num_batches_tracked) > 4
    assert not any(module.training for module in plain.eval().modules())


def test_update_bn_on_the_model_itself_is_an_error_until_close():
    model, optimizer, freezeout = controlled(t_0=0.2)
    train(model, optimizer, freezeout, range(16))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"frozen BatchNorm2d must not be reset: .* a copy .*\.close\(\)"):
        update_bn([batch(0)[0]], model)
    assert_same(model.state_dict(), before)
    freezeout.close()
    update_bn([batch(0)[0]], model)
    assert all(int(norm.num_batches_tracked) == 1 for norm in norms(model))


def test_a_second_training_of_a_copy_trains_its_batch_norms():
    model, optimizer, freezeout = controlled(t_0=0.2)
    train(model, optimizer, freezeout, range(16))
    twin = copy.deepcopy(model).requires_grad_(True)
    opt = torch.optim.SGD(twin.parameters(), lr=0.1)
    means = [norm.running_mean.clone() for norm in norms(twin)]
    train(twin.train(), opt, FreezeOut(twin, opt, total_steps=10), range(2))
    assert not any(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms(twin), means, strict=True))


WITHOUT_THE_PACKAGE = """
import sys
sys.modules["freezeout_ext"] = None  # importing it is an ImportError
import torch
model = torch.load(sys.argv[1], weights_only=False).train()
model(torch.randn(4, 3, 6, 6)).sum().backward()
assert all(module.training for module in model.modules())
"""


def blocks():
    convs = [nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()) for _ in range(3)]
    return nn.Sequential(*convs, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)))


def folded_training(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    arguments = {"total_steps": 9, "start_frozen": 2, "prefix": "folded", "measure_prefix": False}
    freezeout = FreezeOut(model, optimizer, layers=["0", "1", "2", "3"], **arguments)
    for _ in range(4):
        model(torch.randn(4, 3, 6, 6)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        freezeout.step()
    return freezeout


def in_run(steps):
    model = blocks()
    if steps:
        return folded_training(model).model
    return FreezeOut(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=9, start_frozen=2).model


@pytest.mark.parametrize("steps", [0, 4])
def test_a_model_that_was_saved_whole_is_read_where_the_package_is_not_installed(steps, tmp_path):
    torch.save(in_run(steps), tmp_path / "model.pt")
    subprocess.run([sys.executable, "-c", WITHOUT_THE_PACKAGE, tmp_path / "model.pt"], check=True)


@pytest.mark.parametrize("steps", [0, 4])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_that_was_made_in_mid_run_folds_as_the_original_did(copied, steps):
    again = folded_training(copied(in_run(steps)).requires_grad_(True)).prefix_report()
    assert again.fused == {"conv+bn+relu": 2}


def test_scripting_a_watched_model_says_what_to_do_instead():
    model, _, freezeout = controlled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in torch 2.13
        for watched in (model, copy.deepcopy(model)):
            with pytest.raises(RuntimeError, match=r"script the model within `with freezeout\.paused\(\):`"):
                torch.jit.script(watched)
        freezeout.close()
        torch.jit.script(model)


class Encoder(nn.Module):
    def __init__(self, **arguments):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.inp, self.encoder, self.head = (
            nn.Linear(6, 8),
            nn.TransformerEncoder(layer, 4, **arguments),
            nn.Linear(8, 2),
        )

    def forward(self, x, mask):
        return self.head(self.encoder(self.inp(x), src_key_padding_mask=mask).mean(1))


def padded():
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[0, 5:] = mask[1, 6:] = mask[2, 6:] = True  # the last place is padding in all of them
    return torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(0)), mask


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("prefix", ["off", "exact", "folded"])
def test_an_encoder_with_a_padding_mask_trains_on_as_without_nested_tensors(prefix):
    def run(**arguments):
        torch.manual_seed(0)
        model = Encoder(**arguments)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        freezeout = FreezeOut(
            model, optimizer, total_steps=16, t_0=0.2, how_scale="linear", prefix=prefix, measure_prefix=False
        )
        for _ in range(16):
            model(*padded()).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            freezeout.step()
        assert freezeout.num_frozen == 5
        return model, freezeout

    model, freezeout = run()
    plain, _ = run(enable_nested_tensor=False)
    # exact: the same modules; folded: nothing here can be folded into another
    assert_same(model.state_dict(), plain.state_dict())
    assert model.encoder.use_nested_tensor
    # Evaluation is torch's own, nested tensors included.
    fresh = Encoder()
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model.eval()(*padded()), fresh.eval()(*padded()))
    freezeout.close()
    assert not model.encoder._forward_hooks and not model.encoder._forward_pre_hooks


class Attention(nn.Module):
    """Calls nn.MultiheadAttention itself."""

    def __init__(self, **arguments):
        super().__init__()
        self.attention, self.linear = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

    def forward(self, x, **masks):
        return x + self.linear(self.attention(x, x, x, need_weights=False, **masks)[0])


def attention_layer(**arguments):
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0, **arguments)


class Stack(nn.Module):
    """Blocks one after the other, each given the masks."""

    def __init__(self, make):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(make() for _ in range(4)), nn.Linear(8, 2)

    def forward(self, x, **masks):
        for block in self.blocks:
            x = block(x, **masks)
        return self.head(x)


class EncoderStack(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.TransformerEncoder(attention_layer(), 4), nn.Linear(8, 2)

    def forward(self, x, **masks):
        return self.head(self.encoder(x, **masks))


STACKS = {
    "encoder": EncoderStack,
    "layer": lambda: Stack(attention_layer),
    "norm first": lambda: Stack(lambda: attention_layer(norm_first=True)),
    "attention": lambda: Stack(Attention),
}


def masks_of(stack, kind):
    padding = padded()[1]
    causal = torch.triu(torch.ones(7, 7, dtype=torch.bool), 1)
    attends = {"encoder": "mask", "attention": "attn_mask"}.get(stack, "src_mask")
    pads = "key_padding_mask" if stack == "attention" else "src_key_padding_mask"
    return {"none": {}, "padding": {pads: padding}, "causal": {attends: causal},
            "both": {attends: causal, pads: padding}}[kind]  # fmt: skip


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("kind", ["none", "padding", "causal", "both"])
@pytest.mark.parametrize("prefix", ["off", "exact", "folded", "bf16"])
def test_a_frozen_transformer_runs_the_path_that_it_ran_while_it_trained(stack, kind, prefix):
    """Bit-equal to requires_grad_(False) alone, in training mode: there is no dropout."""
    if prefix == "bf16" and unsupported_dtype(torch.bfloat16):
        pytest.skip("bf16 runs as folded float32")
    masks = masks_of(stack, kind)

    def run(frozen):
        torch.manual_seed(0)
        model = STACKS[stack]().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        freezeout = None
        if frozen is None:
            rule = {"total_steps": 16, "t_0": 0.2, "how_scale": "linear", "anneal": False}
            freezeout = FreezeOut(model, optimizer, prefix=prefix, measure_prefix=False, **rule)
        counts, layers = [], list(find_layers(model))
        for step in range(16):
            for layer in layers[: frozen[step]] if frozen else []:
                for p in layer.parameters.values():
                    p.requires_grad_(False)
                    p.grad = None
            x = torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(step))
            counts.append(freezeout.num_frozen if freezeout else 0)
            model(x, **masks).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if freezeout:
                freezeout.step()
        return model, counts

    model, counts = run(None)
    plain, _ = run(counts)
    assert counts[-1] >= 3
    assert torch.backends.mha.get_fastpath_enabled()
    if prefix == "bf16":
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-2)  # of the prefix's values
    else:
        assert_same(model.state_dict(), plain.state_dict())


def test_a_row_that_is_masked_whole_is_what_training_makes_of_it():
    layer = attention_layer()
    x, mask = torch.randn(3, 7, 8), torch.zeros(3, 7, dtype=torch.bool)
    mask[1] = True
    model = nn.ModuleDict({"layer": layer, "head": nn.Linear(8, 2)})
    expected = layer(x, src_key_padding_mask=mask).detach()
    freezeout = FreezeOut(
        model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=10, layers=["layer", "head"],
        start_frozen=1, prefix="off",
    )  # fmt: skip
    assert torch.equal(layer(x, src_key_padding_mask=mask), expected) and not expected.isnan().any()
    with torch.no_grad():
        fast = copy.deepcopy(layer).eval()(x, src_key_padding_mask=mask)
        layer.eval()
        torch.testing.assert_close(layer(x, src_key_padding_mask=mask), fast, rtol=0, atol=0, equal_nan=True)
    freezeout.close()
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("as_set", [True, False])
def test_the_fast_path_is_as_the_user_set_it_behind_the_last_of_several_blocks(as_set):
    mha = torch.backends.mha
    mha.set_fastpath_enabled(as_set)
    try:
        inside, leave, seen = threading.Event(), threading.Event(), []

        def other():
            with no_fast_path():
                inside.set()
                leave.wait()
                seen.append(mha.get_fastpath_enabled())

        thread = threading.Thread(target=other)
        with pytest.raises(RuntimeError, match="inside"), no_fast_path(), no_fast_path():
            thread.start()
            inside.wait()
            raise RuntimeError("inside")
        assert not mha.get_fastpath_enabled()  # the other thread is in its block
        leave.set()
        thread.join()
        assert seen == [False] and mha.get_fastpath_enabled() == as_set
    finally:
        mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("stack", STACKS)
def test_a_compiled_frozen_transformer_runs_that_path_too(stack):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = STACKS[stack]().train()
    x, plain = torch.randn(3, 7, 8), copy.deepcopy(model)
    for layer in list(find_layers(plain))[:2]:
        for p in layer.parameters.values():
            p.requires_grad_(False)
    expected = plain(x).detach()
    freezeout = FreezeOut(
        model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=10, start_frozen=2, prefix="off"
    )
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), expected) and torch.backends.mha.get_fastpath_enabled()
    freezeout.close()
    torch._dynamo.reset()
