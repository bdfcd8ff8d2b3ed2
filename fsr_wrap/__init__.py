"""FSR: training robust to wrong labels and long-tailed classes, as an optimizer wrapper."""

from .config import FSRConfig as FSRConfig
from .data import with_index as with_index
from .dictionary import RewardDictionary as RewardDictionary
from .wrapper import FSRWrapper as FSRWrapper

__version__ = "0.2.0"
__all__ = ["FSRConfig", "FSRWrapper", "RewardDictionary", "with_index"]
