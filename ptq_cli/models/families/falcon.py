"""Falcon: q, k and v in one linear; attention and MLP one after the other (Falcon-RW), or side by
side behind one norm (7B, 11B) or two (40B, 180B)."""

from ptq_cli.models.families import bloom
from ptq_cli.models.family import Condition, Family, Folds, behind

FAMILY = Family(
    name="falcon",
    names=bloom.FAMILY.names,
    own_class=True,
    defaults={"activation": "gelu", "tie_word_embeddings": True},
    folds=Folds(
        values="q k v per head",
        inner_if=Condition("activation", "relu", behind("an activation other than relu")),
        norms=(
            {"attention_in": "input_layernorm", "mlp_in": "input_layernorm"},
            {"attention_in": "ln_attn", "mlp_in": "ln_mlp"},
        ),
    ),
)
