"""The SAS architectures: what a checkpoint carries to the Hub. Needs torch and transformers alone."""

from transformers.utils import is_vision_available

from .configuration_sas_encoder import *
from .configuration_sas_gpt import *
from .configuration_sas_seq2seq import *
from .configuration_sas_vit import *
from .modeling_sas_encoder import *
from .modeling_sas_gpt import *
from .modeling_sas_seq2seq import *
from .modeling_sas_vit import *


# The models registered themselves when they were imported.
if is_vision_available():
    # By its own name: in 5.16 and 5.17, `transformers.AutoImageProcessor` asks for torchvision.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from .configuration_sas_vit import SASViTConfig
    from .image_processing_sas_vit import SASViTImageProcessor

    AutoImageProcessor.register(SASViTConfig, image_processor_classes={"pil": SASViTImageProcessor}, exist_ok=True)
