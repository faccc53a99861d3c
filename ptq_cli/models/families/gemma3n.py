"""Gemma 3n's text model: Gemma 3 with four streams between blocks, which matrices of their width
predict and correct, and a narrow branch beside attention. Norms store their gain; values are
normalised; the last blocks take keys and values of others."""

from dataclasses import replace

from ptq_cli.models.families import gemma3
from ptq_cli.models.family import Family, FamilySite, Folds

_NAMES = replace(
    gemma3.FAMILY.names,
    norms={
        **gemma3.FAMILY.names.norms,
        "streams": "altup.router_norm",
        "narrow_out": "laurel.post_laurel_norm",
        "embedding_out": "post_per_layer_input_norm",
    },
    dense=("altup.correction_coefs", "altup.prediction_coefs", "altup.modality_router"),
    buffers=(
        "input_layernorm.weight",
        "self_attn.k_norm.weight",
        "altup.correct_output_scale",
    ),
)
_NARROW = ("laurel.linear_left", "laurel.linear_right")
_ALSO_OUTPUT = "its inputs are also added to the outputs of the branch"
_OTHERS = (
    FamilySite((_NAMES.output,), reason="a norm of the values feeds it, which has no gains"),
    FamilySite(_NARROW[1:], after=_NARROW[0]),
    FamilySite(("per_layer_input_gate",), reason="no norm feeds it"),
    FamilySite(("per_layer_projection",), reason="its inputs are scaled by embeddings"),
)

FAMILY = Family(
    name="gemma3n",
    other_types=("gemma3n_text",),
    names=_NAMES,
    defaults={"tie_word_embeddings": True},
    folds=Folds(
        attentions=(
            (FamilySite((*_NAMES.qkv, _NARROW[0]), reason=_ALSO_OUTPUT), *_OTHERS),
            (FamilySite((_NAMES.qkv[0], _NARROW[0]), reason=_ALSO_OUTPUT), *_OTHERS),
        ),
    ),
)
