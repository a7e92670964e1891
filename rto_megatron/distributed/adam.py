"""Adam in plain torch, as Megatron's distributed optimizer wants it; used where no GPU library brings one."""

from inspect import unwrap
from typing import Any

import torch
from torch.optim.adam import adam


class FusedAdam(torch.optim.Optimizer):
    """Adam with the contract of apex's and Transformer Engine's: 'step' in the param group, two moments a parameter.

    Megatron's own fallback, torch's AdamW, keeps 'step' per parameter: it trains, but `DistributedOptimizer` cannot
    write or read it. With this class an optimizer checkpoint looks the same from CPU and from GPU.
    """

    # torch marks these as not to be compiled; the mark imports the compiler, which takes 20 MB and seconds, and nothing
    # compiles this optimizer
    add_param_group = unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = unwrap(torch.optim.Optimizer.load_state_dict)

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        **unsupported: Any,
    ) -> None:
        # 0.19 passes capturable=False: the variant for GPU graphs, which has no meaning here.
        refused = {name: value for name, value in unsupported.items() if not (name == "capturable" and not value)}
        if refused:
            raise ValueError(f"this Adam does not take {refused}; leave them at their defaults")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.decoupled = adam_w_mode

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            # An empty group keeps no step, as in Transformer Engine: Megatron aligns the groups itself.
            if group["params"]:
                group["step"] = int(group.get("step", 0)) + 1
                self._step_group(group)

    def _step_group(self, group: dict[str, Any]) -> None:
        # Megatron hands over empty slices where another rank owns the whole parameter.
        params = [param for param in group["params"] if param.grad is not None and param.numel()]
        for param in params:
            if not self.state[param]:
                self.state[param] = {"exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}
        if not params:
            return
        adam(
            params,
            [param.grad for param in params],
            [self.state[param]["exp_avg"] for param in params],
            [self.state[param]["exp_avg_sq"] for param in params],
            [],
            # torch counts up before it uses the step.
            list(torch.full((len(params),), group["step"] - 1.0, device=params[0].device).unbind()),
            fused=True,
            amsgrad=False,
            maximize=False,
            decoupled_weight_decay=self.decoupled,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
        )
