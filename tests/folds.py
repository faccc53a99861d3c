"""Folding one whole site, as a run does tensor by tensor."""

from __future__ import annotations

from ptq_cli.models.folding import as_stored, fold_tensor, settle_factors


def fold_site(site, tensors, factors):
    """The site's tensors after the fold, the factors it used, and its notes.

    tensors: at least `site.tensors`. A tensor may belong to two sites (v_proj is a linear of one
        and feeds another): fold the sites one after the other, each into the result of the last.
    """
    used, notes = settle_factors(site, tensors, factors)
    folded = {name: fold_tensor(name, tensors[name], [(site, used)]) for name in site.tensors}
    changed = {name: as_stored(name, a, tensors[name].dtype) for name, a in folded.items()}
    return changed, used, notes
