"""Best approximations of weight changes by factors: of a fine-tuning, a LoRA, several LoRAs."""

from rasa_research.solver.compress import CompressedAdapter, compress, compress_lora
from rasa_research.solver.compress_many import CompressedLoras, Distances, compress_many
from rasa_research.solver.decompose import Decomposition, decompose
from rasa_research.solver.fit import fit_adapter
from rasa_research.solver.lora_set import LoraSet
from rasa_research.solver.shared_basis import SharedBasis
from rasa_research.solver.weights import SafetensorsFolder

__all__ = [
    "CompressedAdapter",
    "CompressedLoras",
    "Decomposition",
    "Distances",
    "LoraSet",
    "SafetensorsFolder",
    "SharedBasis",
    "compress",
    "compress_lora",
    "compress_many",
    "decompose",
    "fit_adapter",
]
