"""Open quantum systems as probabilities over the outcomes of local measurements."""

from __future__ import annotations
