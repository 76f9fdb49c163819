"""Specs: TOML files that fully determine an architecture."""

from composeformer.contracts import LayerParts
from composeformer.spec.inherit import shipped
from composeformer.spec.spec import Spec

__all__ = ["LayerParts", "Spec", "shipped"]
