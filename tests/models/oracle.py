"""What a tap must contain, computed row by row from the weights and nothing else."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F


class Recorder:
    """Plain forward hooks on an MoE block: its input, its output and what the router returned."""

    def __init__(self, model: Any, layers: list[int]) -> None:
        self.inputs: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}
        self.router: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self.handles = []
        for layer in layers:
            block = model.model.layers[layer].mlp
            self.handles.append(block.register_forward_hook(self._block(layer)))
            self.handles.append(block.gate.register_forward_hook(self._router(layer)))

    def _block(self, layer: int) -> Any:
        def hook(_m: Any, args: tuple[Tensor, ...], out: Any) -> None:
            self.inputs[layer] = args[0].reshape(-1, args[0].shape[-1]).clone()
            out = out[0] if isinstance(out, tuple) else out
            self.outputs[layer] = out.reshape(-1, out.shape[-1]).clone()

        return hook

    def _router(self, layer: int) -> Any:
        def hook(_m: Any, _a: Any, out: tuple[Tensor, Tensor, Tensor]) -> None:
            self.router[layer] = (out[0].clone(), out[1].clone(), out[2].clone())

        return hook


def expert_row(experts: Any, x: Tensor, expert: int) -> tuple[Tensor, Tensor]:
    """Activation and output of one expert on one token, by matrix-vector products in float64."""
    gate_up = experts.gate_up_proj[expert].double()
    gate, up = (gate_up @ x.double()).chunk(2)
    activation = F.silu(gate) * up
    return activation, experts.down_proj[expert].double() @ activation
