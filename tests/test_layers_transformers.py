"""find_layers on tiny nets of Transformers: layers in the order of execution, blocks whole, one training step."""

import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="Transformers is not installed")

from freezeout_ext import FreezeOut, find_layers  # noqa: E402

IDS = {"input_ids": torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])}
PIXELS = {"pixel_values": torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))}
TEXT = {
    "vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 64,
}  # fmt: skip
STAGES = {"num_labels": 2, "hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 2, 1]}
VISION = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 64,
    "patch_size": 16,
}  # fmt: skip
OPT = {name: size for name, size in TEXT.items() if name != "intermediate_size"}
# name of the net -> (its configuration, inputs, how many layers)
NETS = {
    "ResNetForImageClassification": ({**STAGES, "embedding_size": 8, "layer_type": "basic"}, PIXELS, 7),
    "RegNetForImageClassification": ({**STAGES, "embedding_size": 8, "groups_width": 4}, PIXELS, 7),
    "PoolFormerForImageClassification": (STAGES, PIXELS, 10),
    "SegformerForImageClassification": (
        {**STAGES, "depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1, 1, 2, 2]},
        PIXELS, None,
    ),
    "MobileNetV1ForImageClassification": ({"num_labels": 2, "depth_multiplier": 0.25}, PIXELS, 28),
    "ViTForImageClassification": ({**VISION, "num_labels": 2}, PIXELS, 5),
    "OPTForCausalLM": ({**OPT, "ffn_dim": 32, "word_embed_proj_dim": 16}, IDS, 5),
    "MPNetForSequenceClassification": (TEXT, IDS, 6),
    "LlamaForCausalLM": ({**TEXT, "num_key_value_heads": 2}, IDS, 5),
    "BertForSequenceClassification": (TEXT, IDS, 6),
    "T5ForConditionalGeneration": (
        {"vocab_size": 97, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
        {**IDS, "decoder_input_ids": IDS["input_ids"]}, None,
    ),
    "CLIPModel": ({"text_config": TEXT, "vision_config": VISION, "projection_dim": 8}, {**IDS, **PIXELS}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_the_layers_of_a_net_run_in_their_order(name):
    arguments, inputs, count = NETS[name]
    net = getattr(transformers, name)
    model = net(net.config_class(**arguments))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tied embeddings, and layers that are large in nets as small as these
        layers = find_layers(model)
    held = [p for layer in layers for p in layer.parameters.values()]
    assert len(held) == len(set(held)) and set(held) == {p for p in model.parameters() if p.requires_grad}
    assert count in (None, len(layers)) and len(layers) >= 5
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freezeout = FreezeOut(model, optimizer, total_steps=10, t_0=0.1, how_scale="linear", layers=layers)
    output = model(**inputs)
    (output.logits if "logits" in output else output[0]).sum().backward()
    optimizer.step()
    freezeout.step()
    assert freezeout.num_frozen == 1
