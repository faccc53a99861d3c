"""What config.json says of the layers, so that real loaders find them."""

from __future__ import annotations

import re

import pytest

from ptq_cli.core.grid import Activation
from ptq_cli.core.layer import Layer
from ptq_cli.errors import InputError
from tests.formats.cases import FORMATS, folder, layer, read_back

DOWN, UP, GATE = (f"model.layers.0.mlp.{name}_proj" for name in ("down", "up", "gate"))
Q, K = (f"model.layers.0.self_attn.{name}_proj" for name in ("q", "k"))
CT = "compressed-tensors"


@pytest.mark.parametrize("name", ["gptq", "gptq_v2", CT])
def test_fused_layers_must_agree(name: str) -> None:
    record = FORMATS[name]
    layers = [layer(module=Q), layer(module=K, bits=8)]
    with pytest.raises(InputError, match=f"{Q} has 4 bits.* {K} has 8 bits"):
        record.config(layers, [])
    with pytest.raises(InputError, match=r"4 bits.*8 bits"):
        record.config([layer(module=GATE), layer(module=UP, bits=8)], [])
    config, tensors = folder(record, [layer(module=Q), layer(module="model.layers.1.x", bits=8)])
    _, wide = folder(record, [layer(module=K, bits=8)])
    if name == CT:
        config["quantization_config"]["config_groups"]["group_1"]["targets"].append(K)
    else:
        config["quantization_config"]["dynamic"]["+:.*k_proj"] = {"bits": 8}
    with pytest.raises(InputError, match="fuse the two"):
        read_back(record, config, tensors | wide)


def mixed(name: str) -> list[Layer]:
    bits = 4 if name == "awq" else 8
    return [
        layer(module=Q),
        layer(module=K),
        layer(module=DOWN, bits=bits),
        layer(module="model.layers.10.mlp.down_proj"),
        layer(module="model.layers.9.mlp.down_proj"),
    ]


@pytest.mark.parametrize("name", ["gptq", "gptq_v2", "awq", CT, "mlx"])
def test_several_layers(name: str) -> None:
    dense = ("model.layers.0.mlp.up_proj", "lm_head")
    config, tensors = folder(FORMATS[name], mixed(name), dense)
    found = read_back(FORMATS[name], config, tensors)
    assert [own.module for own in found] == [
        DOWN, K, Q, "model.layers.9.mlp.down_proj", "model.layers.10.mlp.down_proj",
    ]  # fmt: skip
    assert [own.grid.bits for own in found] == [4 if name == "awq" else 8, 4, 4, 4, 4]


def test_gptq_declares_dense_layers_for_both_loaders() -> None:
    config = FORMATS["gptq"].config(mixed("gptq"), [UP, "lm_head", "model.embed_tokens"])
    assert config == {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True,
        "checkpoint_format": "gptq", "lm_head": False,
        "dynamic": {
            f"-:^{re.escape(UP)}$": {},
            f"+:^{re.escape(DOWN)}$": {"bits": 8, "group_size": 32, "sym": True},
        },
        "modules_in_block_to_quantize": [["self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"]],
    }  # fmt: skip


def test_gptq_names_whole_modules_where_one_of_a_kind_is_dense() -> None:
    one, other = (f"model.layers.{number}.mlp.down_proj" for number in (0, 1))
    config = FORMATS["gptq"].config([layer(module=one)], [other])
    assert config is not None
    assert config["modules_in_block_to_quantize"] == [[one]]


@pytest.mark.parametrize(
    ("own", "named"),
    [
        (layer(group_size=-1), True),
        (layer(group_size=16), True),
        (layer((72, 128)), True),
        (layer(), False),
        (layer(bits=8, group_size=-1), False),
    ],
)
def test_gptq_names_a_kernel_that_can(own: Layer, named: bool) -> None:
    config = FORMATS["gptq"].config([own], [])
    assert config is not None
    assert config.get("backend") == ("gptq_torch" if named else None)


def test_awq_cannot_mix_or_leave_a_lookalike_dense() -> None:
    with pytest.raises(InputError, match="one group size"):
        FORMATS["awq"].config([layer(), layer(module=UP, group_size=64)], [])
    with pytest.raises(InputError, match=r"cannot leave layers\.0 dense"):
        FORMATS["awq"].config([layer(module="layers.0.x")], ["layers.0"])
    config = FORMATS["awq"].config([layer()], [])
    assert config is not None
    assert config["modules_to_not_convert"] is None


def test_compressed_tensors_declaration() -> None:
    w8a8 = layer(module=DOWN, bits=8, group_size=-1, activation=Activation())
    config = FORMATS[CT].config([layer(module=Q), layer(module=K), w8a8], ["lm_head"])
    assert config is not None
    assert config["format"] == "mixed-precision"
    assert config["quantization_status"] == "compressed"
    assert config["ignore"] == ["lm_head"]
    assert config["config_groups"] == {
        "group_0": {
            "targets": ["Linear"],
            "format": "pack-quantized",
            "weights": {
                "num_bits": 4, "type": "int", "symmetric": True, "dynamic": False,
                "strategy": "group", "group_size": 32,
            },
            "input_activations": None,
            "output_activations": None,
        },
        "group_1": {
            "targets": [DOWN],
            "format": "int-quantized",
            "weights": {
                "num_bits": 8, "type": "int", "symmetric": True, "dynamic": False,
                "strategy": "channel",
            },
            "input_activations": {
                "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token",
                "dynamic": True,
            },
            "output_activations": None,
        },
    }  # fmt: skip


@pytest.mark.parametrize(("modules", "dense", "ignored"), [
    ([DOWN], [], ["lm_head"]),
    ([DOWN], [UP], [UP, "lm_head"]),
    ([DOWN], ["lm_head"], ["lm_head"]),
    ([DOWN, "lm_head"], [UP], [UP]),
])  # fmt: skip
def test_compressed_tensors_ignores_a_tied_head(
    modules: list[str], dense: list[str], ignored: list[str]
) -> None:
    config = FORMATS[CT].config([layer(module=module) for module in modules], dense)
    assert config is not None
    assert config["ignore"] == ignored


def test_compressed_tensors_asymmetric_asks_to_be_dequantized() -> None:
    config = FORMATS[CT].config([layer(sym=False)], [])
    assert config is not None
    assert config["dequantize"] is True


def test_mlx_declaration() -> None:
    config, _ = folder(FORMATS["mlx"], [layer(module=Q), layer(module=K), layer(bits=8)])
    wanted = {"group_size": 32, "bits": 4, "mode": "affine", DOWN: {"group_size": 32, "bits": 8}}
    assert config["quantization"] == config["quantization_config"] == wanted
