"""Methods from papers, one config each. rasa_ext finds them once this package is installed."""

from rasa_research.methods.block_lora import BlockLoraConfig
from rasa_research.methods.boosted_lora import BoostedLoraConfig
from rasa_research.methods.boosted_pool import BoostedPoolConfig
from rasa_research.methods.gated_rasa import GatedRasaConfig
from rasa_research.methods.reslora import ResLoraConfig
from rasa_research.methods.sbora import SboraConfig
from rasa_research.methods.sd_lora import SdLoraConfig
from rasa_research.methods.sora import SoraConfig

__all__ = [
    "BlockLoraConfig",
    "BoostedLoraConfig",
    "BoostedPoolConfig",
    "GatedRasaConfig",
    "ResLoraConfig",
    "SboraConfig",
    "SdLoraConfig",
    "SoraConfig",
]
