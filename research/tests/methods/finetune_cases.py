"""Cases of finetune with gates, which two test modules read."""

from __future__ import annotations

from rasa_research import methods

SMALL = {"gate_threshold": 1e-3}
GATED = {
    "gated-rasa": (SMALL, methods.GatedRasaConfig(4, 1, gate_threshold=1e-3)),
    "sora": (SMALL, methods.SoraConfig(4, alpha=8.0, gate_threshold=1e-3)),
    "sora, pool": ({"k": 1, **SMALL}, methods.SoraConfig(4, 1, 8.0, gate_threshold=1e-3)),
}
