"""AdamW over weights that lie one behind the other in memory: one call for each group, however many layers it has.

torch's fused kernel takes lists of tensors; to make these lists, to count the steps of hundreds of small tensors and to
clip the gradient of each takes longer than the arithmetic of an adapter.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.optim.adamw import adamw

MOST_WEIGHTS = 2**24
"""Numbers of a group: gradients are copied, and for more of them that is no longer nothing."""


@dataclass(frozen=True, slots=True)
class Row:
    """A group and what the optimiser knows of it, each one tensor (N,); the group's weights are views of them."""

    weights: Tensor
    averages: Tensor
    squares: Tensor
    step: Tensor

    def views(self, parameters: list[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of each weight, its average and its average square, in the shape of the weight."""
        sizes = [parameter.numel() for parameter in parameters]
        parts = [whole.split(sizes) for whole in (self.weights, self.averages, self.squares)]
        return [
            (weight.view_as(parameter), average.view_as(parameter), square.view_as(parameter))
            for parameter, weight, average, square in zip(parameters, *parts, strict=True)
        ]


class FlatAdamW(AdamW):
    """torch's AdamW; its `state_dict` is the same, and each may go on where the other stopped."""

    def __init__(self, groups: Any, **options: Any) -> None:
        super().__init__(groups, **options)
        self._rows: dict[int, Row] = {}
        self._gradients: dict[int, Tensor] = {}  # of groups, until the step

    @staticmethod
    def fits(optimizer: torch.optim.Optimizer) -> bool:
        """Whether one can take the place of an optimiser that has made no step yet."""
        return type(optimizer) is AdamW and all(
            group["fused"]
            and not (group["amsgrad"] or group["maximize"] or group["capturable"] or group["differentiable"])
            and all(type(each) is torch.nn.Parameter and each.is_contiguous() for each in group["params"])
            and {each.dtype for each in group["params"]} == {torch.float32}
            and len({each.device for each in group["params"]}) == 1
            and sum(each.numel() for each in group["params"]) <= MOST_WEIGHTS
            for group in optimizer.param_groups
        )

    def state_dict(self) -> dict[str, Any]:
        """As torch has it: every weight has a count of its own."""
        found = super().state_dict()
        found["state"] = {key: state | {"step": state["step"].clone()} for key, state in found["state"].items()}
        return found

    def forget_rows(self) -> None:
        """Without the averages that the rows hold; weights stay where they are."""
        self._rows = {}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch has it."""
        self._gradients = {}
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """The norm of all gradients, which the next step takes scaled to at most `max_norm`.

        This is `torch.nn.utils.clip_grad_norm_` in a few calls, but for the `grad`s, which may stay as they are.
        """
        trained = self._trained()
        if not trained:
            parameters = [parameter for group in self.param_groups for parameter in group["params"]]
            return torch.nn.utils.clip_grad_norm_(parameters, max_norm, foreach=True)
        self._gradients = {id(group): _gradient_of(group) for group in trained}
        norms = [torch.linalg.vector_norm(gradient) for gradient in self._gradients.values()]
        norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in self._gradients.values():
            gradient.mul_(factor)
        return norm

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Groups without gradients stay as they are; where only some weights of one have one, torch makes the step."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        gradients, self._gradients = self._gradients, {}
        if not gradients:
            trained = self._trained()
            if trained is None:
                for state in self.state.values():
                    state["step"] = state["step"].clone()
                super().step()
                return loss
            gradients = {id(group): _gradient_of(group) for group in trained}
        for group in self.param_groups:
            if id(group) in gradients:
                self._step(group, self._rows[id(group)], gradients[id(group)])
        return loss

    def _trained(self) -> list[dict[str, Any]] | None:
        """The groups that have gradients, each in its row; None where torch has to make the step."""
        given = [{each.grad is not None for each in group["params"]} for group in self.param_groups]
        trained = [group for group, has in zip(self.param_groups, given, strict=True) if True in has]
        return None if {True, False} in given or not all(map(self._is_laid, trained)) else trained

    def _step(self, group: dict[str, Any], row: Row, gradient: Tensor) -> None:
        adamw(
            *([row.weights], [gradient], [row.averages], [row.squares], [], [row.step]),
            fused=True,
            found_inf=getattr(self, "found_inf", None),
            amsgrad=False,
            maximize=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
        )

    def _is_laid(self, group: dict[str, Any]) -> bool:
        """Whether a group is in its row; it is put there if need be, and if its weights have made as many steps."""
        row, parameters = self._rows.get(id(group)), group["params"]
        if row is None or not self._lies_in(row, parameters):
            if len({float(self.state[each].get("step", 0.0)) for each in parameters}) > 1:
                return False
            self._rows[id(group)] = self._laid(parameters)
        return True

    def _lies_in(self, row: Row, parameters: list[Tensor]) -> bool:
        at, averages, squares = (each.data_ptr() for each in (row.weights, row.averages, row.squares))
        offset = 0
        for parameter in parameters:
            state = self.state[parameter]
            if (
                parameter.data_ptr() != at + offset
                or state.get("step") is not row.step
                or state["exp_avg"].data_ptr() != averages + offset
                or state["exp_avg_sq"].data_ptr() != squares + offset
            ):
                return False
            offset += parameter.element_size() * parameter.numel()
        return True

    def _laid(self, parameters: list[Tensor]) -> Row:
        states = [self.state[parameter] for parameter in parameters]
        zeros = [torch.zeros_like(parameter) for parameter in parameters]
        row = Row(
            torch.cat([parameter.flatten() for parameter in parameters]),
            torch.cat([state.get("exp_avg", zero).flatten() for state, zero in zip(states, zeros, strict=True)]),
            torch.cat([state.get("exp_avg_sq", zero).flatten() for state, zero in zip(states, zeros, strict=True)]),
            states[0]["step"].clone() if states[0] else torch.zeros((), device=parameters[0].device),
        )
        for parameter, state, (weight, average, square) in zip(parameters, states, row.views(parameters), strict=True):
            parameter.data = weight
            state.update(step=row.step, exp_avg=average, exp_avg_sq=square)
        return row


def _gradient_of(group: dict[str, Any]) -> Tensor:
    """(N,), a copy."""
    return torch.cat([parameter.grad.flatten() for parameter in group["params"]])
