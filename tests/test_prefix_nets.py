"""A whole run with the exact prefix against a plain loop, bit for bit: timm's and Transformers' nets, by name.

A sample of the lists; FREEZEOUT_TESTS_NETS=all runs them whole.
"""

import os

import pytest
import torch
from prefix_nets import TEXT, TIMM, plain_loop, transformer
from timm_models import MISSING, importable_timm

from freezeout_ext import FreezeOut

ALL = os.environ.get("FREEZEOUT_TESTS_NETS") == "all"
STEPS = 18


def losses(make, loss_of, prefix=None):
    torch.manual_seed(0)
    model = make().train()
    torch.manual_seed(1)
    if prefix is None:
        return plain_loop(model, STEPS, loss_of, t_0=0.3), model, None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    freezeout = FreezeOut(
        model, optimizer, total_steps=STEPS, t_0=0.3, how_scale="linear", prefix=prefix, measure_prefix=False
    )
    found, calls, units = [], 0, 0
    for step in range(STEPS):
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        freezeout.step()
        found.append(loss.item())
        report = freezeout.prefix_report()
        calls, units = max(calls, report.calls), max(units, report.units)
    return found, model, (report, calls, units)


def check(make, loss_of):
    expected, plain, _ = losses(make, loss_of)
    found, model, (report, calls, units) = losses(make, loss_of, "exact")
    assert found == expected, report
    for (name, value), other in zip(plain.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    # Where layers freeze at each step no forward is left to watch.
    assert units > 0 or report.num_frozen > STEPS // 2, report
    return report, calls


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
@pytest.mark.parametrize("name", TIMM if ALL else TIMM[3:30:8])
def test_a_run_of_a_timm_net_is_that_of_a_plain_loop(name):
    with importable_timm() as timm:
        check(
            lambda: timm.create_model(name, num_classes=5),
            lambda model, step: torch.nn.functional.cross_entropy(
                model(torch.randn(2, 3, 64, 64)), torch.randint(5, (2,))
            ),
        )


@pytest.mark.parametrize("name", TEXT if ALL else ["Bert", "GPT2", "Llama", "T5Encoder", "ViT"])
def test_a_run_of_a_transformer_is_that_of_a_plain_loop(name):
    pytest.importorskip("transformers")
    batch = transformer(name)[1]

    def loss_of(model, step):
        outputs = [t for t in model(**batch()).to_tuple() if isinstance(t, torch.Tensor)]
        return sum((t - 1).square().mean() for t in outputs)

    check(lambda: transformer(name)[0], loss_of)


@pytest.mark.parametrize("name", ["Bert", "GPT2", "Llama", "T5Encoder", "ViT"])
@pytest.mark.parametrize("mode", ["exact", "folded"])
def test_blocks_that_are_called_with_masks_and_positions_are_one_chain(name, mode):
    pytest.importorskip("transformers")
    from prefix_cases import freeze

    from freezeout_ext.layers import find_layers
    from freezeout_ext.prefix import Prefix

    torch.manual_seed(0)
    model, batch = transformer(name)
    layers = find_layers(model.train())
    freeze(model, len(layers) - 1, layers)
    prefix = Prefix(model, layers, mode=mode, measure=False)
    prefix.freeze(len(layers) - 1)
    for _ in range(9):
        model(**batch())
    longest = max(len(chain.units) for chain in prefix._chains)
    assert longest >= 2 and prefix.report().calls, prefix.report()
