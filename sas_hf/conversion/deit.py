"""DeiT checkpoints: a ViT with a distillation token, and in one class a classifier of its own on that token."""

from ..modeling import SASViTForImageClassification, SASViTForMaskedImageModeling, SASViTModel
from .family import SourceFamily
from .vit import VIT_FIELDS


DEIT = SourceFamily(
    model_type="deit",
    architectures={
        "DeiTModel": SASViTModel,
        "DeiTForImageClassification": SASViTForImageClassification,
        "DeiTForImageClassificationWithTeacher": SASViTForImageClassification,
        "DeiTForMaskedImageModeling": SASViTForMaskedImageModeling,
    },
    fields=VIT_FIELDS,
    constants={"use_distillation_token": True},
    of_architecture={"DeiTForImageClassificationWithTeacher": lambda config: {"classifier_pooling": "distilled"}},
    names={"cls_classifier": "classifier"},
)
