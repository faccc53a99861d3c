"""Granite: a Llama whose embeddings, scores, branches and logits are multiplied by numbers of
config.json."""

from ptq_cli.models.families import llama
from ptq_cli.models.family import Family, Folds

FAMILY = Family(name="granite", names=llama.FAMILY.names, folds=Folds())
