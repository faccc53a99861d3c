"""The sites of a model of an unknown family, as a recipe to check."""

from __future__ import annotations

from pathlib import Path

from ptq_cli.errors import InputError
from ptq_cli.models.derived_sites import derive_sites
from ptq_cli.models.detect import find_sites
from ptq_cli.models.recipe_text import recipe_text
from ptq_cli.storage.sources import open_float


def derived_recipe(path: Path) -> str:
    """`[[sites]]` for a model of a family that is not known, with how sure each is.

    Raises:
        InputError: its family is known; nothing is called as blocks with linears are.
    """
    checkpoint = open_float(path, any_architecture=True)
    config = checkpoint.config or {}
    found = find_sites(checkpoint.specs, config or None)
    if found.family is not None:
        raise InputError(
            f"{checkpoint.path}: its family is known ({found.family}), and so are its sites",
            hint=f"ptq inspect {path} --tensors shows them",
        )
    derived = derive_sites(checkpoint.specs, config)
    if not derived:
        raise InputError(
            f"{checkpoint.path}: no linears have names with the number of a block in them",
            hint="name the sites in a recipe: [[sites]]",
        )
    about = f"Sites of {checkpoint.path}, derived from config.json, names and shapes."
    sites = ((site.pattern, f"{site.certainty}: {site.why}") for site in derived)
    return recipe_text(about, sites, checkpoint.specs)
