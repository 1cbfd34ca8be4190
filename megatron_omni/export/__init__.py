"""The Hugging Face side: configuration, model and processor classes, and conversion of checkpoints to their format.

Importing it registers the classes, so that ``AutoConfig``, ``AutoModel`` and ``AutoProcessor`` know an exported folder.
"""

from transformers import AutoConfig, AutoModel, AutoProcessor

from megatron_omni.export.configuration import OmniConfig
from megatron_omni.export.modeling import OmniForConditionalGeneration, OmniSpeech
from megatron_omni.export.processing import OmniProcessor

__all__ = ["OmniConfig", "OmniForConditionalGeneration", "OmniProcessor", "OmniSpeech"]

AutoConfig.register(OmniConfig.model_type, OmniConfig, exist_ok=True)
AutoModel.register(OmniConfig, OmniForConditionalGeneration, exist_ok=True)
AutoProcessor.register(OmniConfig, OmniProcessor, exist_ok=True)
