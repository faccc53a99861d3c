"""Falcon: q, k and v in one linear; attention and MLP side by side."""

from ptq_cli.models.families import bloom
from ptq_cli.models.family import Family

FAMILY = Family(
    name="falcon",
    names=bloom.FAMILY.names,
    own_class=True,
    defaults={"tie_word_embeddings": True},
)
