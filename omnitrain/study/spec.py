"""What a recipe says about a study: the key `study` (recipes/nondegradation.yaml), and the names that a study knows."""

from __future__ import annotations

UNIMODAL = ("text", "vision", "audio")
OMNI = ("omni_early", "omni_late")
ARMS = (*UNIMODAL, *OMNI)
"""The arms that the tables compare."""
MATCHES = ("data", "compute")
"""What is made equal among the arms (docs/nondegradation_matching.md)."""
