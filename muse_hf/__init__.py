"""Multipole Semantic Attention for Hugging Face Transformers.

Importing this package registers `attn_implementation="muse"`.
"""

from muse_hf.adapter import register
from muse_hf.choosing import Recommendation, recommend_config
from muse_hf.config import MuseConfig
from muse_hf.evaluation import Evaluation, evaluate_policy
from muse_hf.functional import exact_attention, muse_attention
from muse_hf.models import token_losses
from muse_hf.monitor import MonitorCallback, TrainingMonitor
from muse_hf.patches import patch_model, unpatch_model
from muse_hf.profiling import Profile, profile_layers
from muse_hf.routing import SUPPORTED_FAMILIES, UnsupportedError
from muse_hf.segments import Segments

register()

__all__ = [
    "SUPPORTED_FAMILIES",
    "Evaluation",
    "MonitorCallback",
    "MuseConfig",
    "Profile",
    "Recommendation",
    "Segments",
    "TrainingMonitor",
    "UnsupportedError",
    "evaluate_policy",
    "exact_attention",
    "muse_attention",
    "patch_model",
    "profile_layers",
    "recommend_config",
    "token_losses",
    "unpatch_model",
]
__version__ = "0.1.0"
