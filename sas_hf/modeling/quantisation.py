"""What quantisers shall leave alone: the simulation, which is small and sits where errors count most."""

import torch


class FloatSimulationMixin:
    """Transformers' quantisers keep the simulation's weights as they are, in the dtype that the model is loaded in.

    They ask a model which of its modules want float32, and let these be whatever else they are told. Here float32 is
    not meant: a simulation in another dtype than its heads could not be computed.
    """

    _keep_in_fp32_modules = [r".*\.[qkv]_simulation"]

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict:
        """As in Transformers, but without the simulation."""
        plan = super()._get_dtype_plan(dtype)
        return {name: kept for name, kept in plan.items() if name not in FloatSimulationMixin._keep_in_fp32_modules}

    def state_dict(self, *args, **kwargs) -> dict[str, torch.Tensor]:
        """As in PyTorch, after what bitsandbytes forgets.

        A 4-bit weight that has run on a CPU is packed anew, its scales [blocks of a row, rows]. Before they are read
        bitsandbytes 0.50 unpacks the weight but not the scales: saved, and from then on in this model too, they would
        belong to other blocks.
        """
        for module in self.modules():
            state = getattr(getattr(module, "weight", None), "quant_state", None)
            packed = getattr(state, "packing_format_for_cpu", False) and not state.original_nested
            if packed and state.absmax.ndim == 2:
                state.absmax = state.absmax.T.reshape(-1).float()
        return super().state_dict(*args, **kwargs)
