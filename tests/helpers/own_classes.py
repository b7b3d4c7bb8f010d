"""Classes that a user might write: networks, a loss and optimizers, some of which cannot be used."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Random layers, a constant in a buffer, and a constructor that does not run on the meta device."""

    grid_multiple = 3

    def __init__(self, dim_in: int, dim_out: int, width: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        rates = torch.linspace(0, dropout, 2).tolist()
        self.body = nn.Sequential(nn.Conv2d(dim_in, width, 3, padding=1), nn.GELU(), nn.Dropout(rates[-1]))
        self.head = nn.Conv2d(width, dim_out, 1)
        self.register_buffer("gain", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-2] % self.grid_multiple == x.shape[-1] % self.grid_multiple == 0
        return self.gain * self.head(self.body(x))


class TokenNet(nn.Module):
    """Of matrices alone."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.mix = nn.Linear(dim_in, dim_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x.movedim(1, -1)).movedim(-1, 1)


class Normalized(nn.Sequential):
    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__(nn.Conv2d(dim_in, dim_out, 1), nn.BatchNorm2d(dim_out))


class Tied(nn.Sequential):
    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__(nn.Conv2d(dim_in, dim_in, 1), nn.Conv2d(dim_in, dim_in, 1), nn.Conv2d(dim_in, dim_out, 1))
        self[1].weight = self[0].weight


class Counting(Net):
    """Changes a buffer as it trains."""

    def forward(self, x: Tensor) -> Tensor:
        self.gain.mul_(0.9)
        return super().forward(x)


class HalfOutput(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., ::2]


class Fussy(Net):
    def __init__(self, dim_in: int, dim_out: int, width: int) -> None:
        if width % 2:
            raise ValueError(f"an odd width of {width}")
        super().__init__(dim_in, dim_out, width)


class Constant(nn.Module):
    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()


class Loss(nn.Module):
    """The mean absolute error, for each window or as one number; `kind` other: of a wrong shape."""

    def __init__(self, kind: str = "windows") -> None:
        super().__init__()
        self.kind = kind

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        errors = (prediction - target).abs()
        return {"windows": errors.mean((1, 2, 3)), "number": errors.mean()}.get(self.kind, errors[0])


class Momentum(torch.optim.Optimizer):
    """Gradient descent with momentum that counts its steps in Python."""

    def __init__(self, params: Any, lr: float = 0.1, keep: Any = None) -> None:
        super().__init__(params, {"lr": lr, "keep": keep, "total": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state["count"] = state.get("count", 0) + 1
                    state["mean"] = state.get("mean", torch.zeros_like(parameter)).lerp(parameter.grad, 0.1)
                    parameter.sub_(group["lr"] * state["mean"] / (1 - 0.9 ** state["count"]))
                    if group["keep"] == "list":
                        state["history"] = [1.0]
            if group["keep"] == "total":
                group["total"] += 1


def not_a_class(dim_in: int, dim_out: int) -> nn.Module:
    return Net(dim_in, dim_out)
