"""Under quantisers: the simulation is left alone, as it is small and sits where errors count most."""

import torch

from .annotations import ModelMixin


class QuantisableMixin(ModelMixin):
    """Quantisers keep the simulation's weights in the dtype that the model is loaded in, and what they made stays so.

    Transformers' ask a model which of its modules want float32, and let these be whatever else they are told. Here
    float32 is not meant: a simulation in another dtype than its heads could not be computed.
    """

    _keep_in_fp32_modules = [r".*\.[qkv]_simulation"]

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict:
        """As in Transformers, but without the simulation."""
        plan = super()._get_dtype_plan(dtype)
        return {name: kept for name, kept in plan.items() if name not in QuantisableMixin._keep_in_fp32_modules}

    def train(self, mode: bool = True):
        """As in PyTorch, which loading calls too; bitsandbytes' 4-bit maps are told to stay as they were quantised.

        In evaluation on a CPU bitsandbytes 0.50 packs their weights anew, for a faster product. Of these the
        gradients stop at the map, merging an adapter and `dequantize` read other numbers, and saving writes the scales
        of other blocks, all without a word.
        """
        for module in self.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # no parameter
        return super().train(mode)
