"""T5: an encoder and a decoder. Its sites are not known, nor what is fused."""

from ptq_cli.models.family import Family, Folds
from ptq_cli.models.names import Names

FAMILY = Family(
    name="t5",
    other_types=("mt5", "umt5"),
    names=Names(qkv=(), output="", norms={}, buffers=()),
    folds=Folds(attentions=((),)),
    own_class=True,  # it draws every weight at random before it loads it
)
