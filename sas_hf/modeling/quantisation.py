"""What quantisers shall leave alone: the simulation, which is small and sits where errors count most."""

import torch

from .annotations import ModelMixin


class FloatSimulationMixin(ModelMixin):
    """Transformers' quantisers keep the simulation's weights as they are, in the dtype that the model is loaded in.

    They ask a model which of its modules want float32, and let these be whatever else they are told. Here float32 is
    not meant: a simulation in another dtype than its heads could not be computed.
    """

    _keep_in_fp32_modules = [r".*\.[qkv]_simulation"]

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict:
        """As in Transformers, but without the simulation."""
        plan = super()._get_dtype_plan(dtype)
        return {name: kept for name, kept in plan.items() if name not in FloatSimulationMixin._keep_in_fp32_modules}

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
