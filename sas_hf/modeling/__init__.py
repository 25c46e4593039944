"""The SAS architectures: what a checkpoint carries to the Hub. Needs torch and transformers alone."""

from .configuration_sas_gpt import *
from .configuration_sas_vit import *
from .modeling_sas_gpt import *
from .modeling_sas_vit import *
