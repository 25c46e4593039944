"""Linear least squares over data that comes in batches: normal equations in float64 with a small ridge."""

import torch


RIDGE = 1e-5  # of the mean square of the inputs: keeps unseen directions at rest


class NormalEquations:
    """The affine map from x `[..., n]` to y `[..., m]` with the smallest squared error over all batches added.

    Args:
        bias: fit a constant too.
    """

    def __init__(self, bias: bool):
        self.bias = bias
        self.gram = self.moment = torch.zeros(())

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        x, y = with_ones(x.flatten(0, -2).double(), self.bias), y.flatten(0, -2).double()
        self.gram = self.gram + x.T @ x
        self.moment = self.moment + x.T @ y

    def solve(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight `[m, n]` and bias `[m]` (`None` without), as `nn.Linear` holds them."""
        return split_bias(torch.linalg.solve(with_ridge(self.gram), self.moment), self.bias)


def with_ones(x: torch.Tensor, wanted: bool) -> torch.Tensor:
    """Append a feature of ones to `[N, n]`, which turns a linear map into an affine one."""
    return torch.cat((x, x.new_ones(len(x), 1)), dim=1) if wanted else x


def split_bias(solution: torch.Tensor, bias: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The solution `[n (+ 1), m]` for inputs of [`with_ones`] as weight `[m, n]` and bias `[m]`."""
    return (solution[:-1].T, solution[-1]) if bias else (solution.T, None)


def with_ridge(gram: torch.Tensor) -> torch.Tensor:
    """The Gram matrix `[n, n]` plus `RIDGE` times its mean diagonal entry (and never singular)."""
    ridge = RIDGE * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny
    return gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
