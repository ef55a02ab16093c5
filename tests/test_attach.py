"""What stands on the user's modules: pins, copies of them, torch's own ways of using a model, encoders with padding."""

import copy
import warnings

import pytest
import torch
from test_freezeout import assert_same, batch, controlled, train
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

from freezeout_ext import FreezeOut
from freezeout_ext.attach import NoNestedTensors, pin, unpin


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


def test_an_encoder_that_raises_keeps_its_setting():
    encoder = Encoder().encoder
    watched = NoNestedTensors(encoder)
    pin(encoder.layers[0])
    with pytest.raises((RuntimeError, AssertionError)):
        encoder(torch.randn(3, 7, 5))
    assert encoder.use_nested_tensor
    watched.remove()
