"""Nets of timm and Transformers that are small, and a plain loop to train them with layers that freeze."""

import math
from collections.abc import Callable

import torch
from torch import nn

from freezeout_ext.attach import pin
from freezeout_ext.layers import find_layers

TIMM = [
    "resnet10t", "resnetaa50", "seresnet18", "resnext26ts", "gcresnext26ts", "eca_resnet33ts", "skresnet18",
    "res2net50_14w_8s",
    "efficientnet_b0", "tf_efficientnet_lite0", "mobilenetv2_035", "mobilenetv3_large_100", "mnasnet_small",
    "fbnetc_100",
    "ghostnet_050", "regnety_002", "lcnet_035", "dla34", "ese_vovnet19b_dw", "cspresnet50", "repvgg_a0", "mixnet_s",
    "hardcorenas_a", "semnasnet_075", "vgg11_bn", "mobileone_s0", "edgenext_xx_small", "rexnet_100", "darknet17",
]  # fmt: skip
TEXT = {
    "Bert": {}, "Roberta": {}, "Electra": {"embedding_size": 16}, "Albert": {"embedding_size": 16}, "DistilBert": {},
    "MPNet": {}, "GPT2": {}, "GPTNeoX": {}, "OPT": {"word_embed_proj_dim": 16, "ffn_dim": 32}, "Llama": {},
    "Mistral": {},
    "Qwen2": {}, "Gemma": {"head_dim": 8}, "Phi": {},
    "T5Encoder": {"d_kv": 8, "d_ff": 32, "num_hidden_layers": 5}, "ViT": {}, "DeiT": {},
    "Bloom": {}, "ConvBert": {"embedding_size": 16}, "RoFormer": {"embedding_size": 16},
}  # fmt: skip


def transformer(name: str) -> tuple[nn.Module, Callable[[], dict]]:
    """-> a tiny model of the family, and what makes a batch for it."""
    transformers = __import__("transformers")
    small = {
        "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 60,
        "pad_token_id": 0, "use_cache": False, "image_size": 16, "patch_size": 4, "num_key_value_heads": 2,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    family = name.removesuffix("Encoder")
    config = getattr(transformers, f"{family}Config")(**small | TEXT[name])
    model = getattr(transformers, "T5EncoderModel" if name == "T5Encoder" else f"{family}Model")(config)

    def batch() -> dict:
        if name in ("ViT", "DeiT"):
            return {"pixel_values": torch.randn(3, 3, 16, 16)}
        mask = (torch.arange(8) < torch.tensor([[8], [5], [3]])).long()
        return {"input_ids": torch.randint(3, 60, (3, 8)), "attention_mask": mask}

    return model, batch


def plain_loop(model: nn.Module, steps: int, loss_of: Callable, t_0: float, rate: float = 0.01) -> list[float]:
    """Layer i trains while step < t_i * steps, t_i = t_0 + (1 - t_0) * i / L, on its own cosine; then it is frozen."""
    layers = list(find_layers(model))
    last = len(layers) - 1
    times = [t_0 + (1 - t_0) * i / last for i in range(last + 1)]
    ends = [round(t * steps, 6) for t in times]  # as the schedule rounds them
    groups = [{"params": list(layer.parameters.values()), "lr": rate} for layer in layers]
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9)
    losses = []
    for step in range(steps):
        for i, (layer, group) in enumerate(zip(layers, optimizer.param_groups, strict=True)):
            if step < ends[i]:
                group["lr"] = rate * (1 / times[i] * 0.5 * (1 + math.cos(math.pi * step / ends[i])))
                continue
            for p in layer.parameters.values():
                p.requires_grad_(False)
                p.grad = None
            for module in layer.submodules:
                pin(module)
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
