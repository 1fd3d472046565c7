"""AdamW with its moments in 8 bits (torchao; Dettmers et al. 2021, arXiv 2110.02861). Needs the extra `low_bit`."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

_AdamW8bit: Any = import_module("torchao.optim").AdamW8bit
_State: Any = import_module("torchao.optim.subclass_8bit").OptimState8bit

MOMENTS = {"exp_avg": True, "exp_avg_sq": False}
"""Name -> whether it has a sign."""
CODES, SCALE = "_codes", "_scale"


class AdamW8bit(_AdamW8bit):
    """What it saves are plain tensors, codes and scales, and learning rates as numbers: a checkpoint can be read
    without torchao, and a run goes on from it exactly."""

    def state_dict(self) -> dict[str, Any]:
        saved = super().state_dict()
        state: dict[int, dict[str, Any]] = {}
        for i, values in saved["state"].items():
            state[i] = {}
            for name, value in values.items():
                packed = isinstance(value, _State)
                state[i] |= {name + CODES: value.codes, name + SCALE: value.scale} if packed else {name: value}
        groups = [{key: _number(value) for key, value in group.items()} for group in saved["param_groups"]]
        return {"state": state, "param_groups": groups}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for key in group.keys() & {"lr", "initial_lr"}:
                group[key] = torch.tensor(group[key], dtype=torch.float32)
        for parameter, values in self.state.items():
            for name, signed in MOMENTS.items():
                if name + CODES in values:
                    values[name] = self._new_buffer(parameter, signed)
                    values[name].codes.copy_(values.pop(name + CODES))
                    values[name].scale.copy_(values.pop(name + SCALE))


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, Tensor) else value
