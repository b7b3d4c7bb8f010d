"""Linear attention with a ridge-corrected state and 2D rotary positions (WaveLiT, section 3).

With phi = elu + 1 and R the rotation of a token's position, per head of width m over N tokens z:

    q = R phi(W_q z),   k = R phi(W_k z),   v = z
    S = K^T V / N,   G = K^T K / N,   state = (G + lambda I)^-1 S,   o_n = q_n state

The state is the ridge regression of the values on the keys. Without the inverse it is plain linear attention with no
softmax denominator. lambda > 0 is learned per head. Everything after the linear map is float32 under autocast. Softmax
attention, for comparison (Table 1), is softmax(R W_q z (R W_k z)^T / sqrt(m)) v.

Rotary position embedding (Su et al. 2021) in its axial form: a head has m/2 channel pairs (2p, 2p + 1). The first half
of the pairs turns with the token's x index, the second half with its y index, pair i of an axis by the angle
index * base**(-i / (m/4)). Products of turned queries and keys depend on the difference of positions only.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

ROPE_BASE = 10_000.0
RIDGE_MODES = ("ridge", "none", "least_squares", "scaled")
LAMBDA_INIT = 0.1
JITTER = 1e-6  # of the mean of G's diagonal: keeps Cholesky alive in float32 where lambda is far below the keys' scale

ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()  # x86 builds
ONEDNN_IMAGES = 16  # from 16 images on oneDNN takes the convolution even on one thread
is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # torch >= 2.7 has it


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x (..., D_in) times weight (D_out, D_in) transposed, plus bias (D_out), the faster way on a CPU.

    PyTorch sends a float32 nn.Linear to MKL, which on AMD processors runs at less than half the rate of oneDNN. A 1x1
    convolution of the same tokens, cut into 16 "images", is the same product through oneDNN: 2.2 times as fast forward,
    1.7 times forward and backward for 4096 x 64 x 256 on an EPYC.
    """
    # An exported program takes any number of tokens, so it cannot cut them into images.
    if is_exporting() or not ONEDNN or x.device.type != "cpu" or x.numel() % (ONEDNN_IMAGES * x.shape[-1]):
        return F.linear(x, weight, bias)
    images = x.reshape(ONEDNN_IMAGES, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # channels-last, no copy
    y = F.conv2d(images, weight[:, :, None, None], bias)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])


class Linear(nn.Linear):
    """nn.Linear by way of `linear`."""

    def forward(self, x: Tensor, update: Tensor | None = None) -> Tensor:
        """Map (..., D_in) to (..., D_out); `update` (D_out, D_in) is added to the weight."""
        return linear(x, self.weight if update is None else self.weight + update, self.bias)


def rope_table(height: int, width: int, head_width: int, device: torch.device | str = "cpu") -> Tensor:
    """Return cosine and sine of each pair at each token of an h x w grid: float32 (N, m/2, 2), y running fastest.

    Tables are kept and shared, so do not write into one. ValueError if m is not a multiple of 4.
    """
    if head_width % 4:
        raise ValueError(f"2D RoPE needs a head width that is a multiple of 4, got {head_width}")
    # A compiler's or a fake tensor must neither enter the cache nor be replaced by a real one from it.
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return _make_table(height, width, head_width, torch.device(device))
    return _kept_table(height, width, head_width, torch.device(device))


@lru_cache(maxsize=64)
def _kept_table(height: int, width: int, head_width: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # autograd refuses inference tensors, which a prediction would leave here
        return _make_table(height, width, head_width, device)


def _make_table(height: int, width: int, head_width: int, device: torch.device) -> Tensor:
    quarter = head_width // 4
    frequencies = ROPE_BASE ** (-torch.arange(quarter, device=device, dtype=torch.float32) / quarter)
    along_x = torch.arange(height, device=device, dtype=torch.float32)[:, None] * frequencies  # (h, m/4)
    along_y = torch.arange(width, device=device, dtype=torch.float32)[:, None] * frequencies  # (w, m/4)
    tables = [torch.stack([angles.cos(), angles.sin()], dim=-1) for angles in (along_x, along_y)]  # (h or w, m/4, 2)
    on_grid = tables[0][:, None].expand(-1, width, -1, -1), tables[1][None].expand(height, -1, -1, -1)
    return torch.cat(on_grid, dim=2).flatten(0, 1)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn each pair (a, b) of x (B, N, A, m) to (a cos - b sin, a sin + b cos); `table` is (N, m/2, 2)."""
    pairs = x.unflatten(-1, (-1, 2))  # (B, N, A, m/2, 2)
    if torch.compiler.is_compiling():  # the compiler fuses real arithmetic but not complex numbers
        (a, b), (cosine, sine) = pairs.unbind(-1), table[:, None].unbind(-1)
        return torch.stack([a * cosine - b * sine, a * sine + b * cosine], dim=-1).flatten(-2)
    # One complex product takes less than half the time of the six real ones, forward and backward.
    turned = torch.view_as_complex(pairs) * torch.view_as_complex(table)[:, None]
    return torch.view_as_real(turned).flatten(-2)


def feature_map(x: Tensor) -> Tensor:
    """Return phi(x) = elu(x) + 1 > 0."""
    return F.elu(x) + 1


class _RidgeSolve(torch.autograd.Function):
    """X = (G + shift I)^-1 S through one Cholesky factor, which backward uses again.

    With Y = A^-1 dX: dS = Y, dG = -Y X^T, dshift = trace(dG). Autograd's own backward of a Cholesky factorization takes
    twice the time. On a GPU, triangular solves are one kernel for all heads and samples, and never TF32;
    cholesky_inverse and cholesky_solve go through the matrices one by one, or through MAGMA.
    """

    @staticmethod
    def forward(ctx: Any, gram: Tensor, s: Tensor, shift: Tensor) -> Tensor:
        matrix = gram.clone()
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        diagonal.add_(shift[:, None] + JITTER * diagonal.mean(-1, keepdim=True))
        # _ex does not synchronize with the device; a failed factorization shows as NaN in the loss.
        factor, _ = torch.linalg.cholesky_ex(matrix)
        solution = _substitute(factor, s)
        ctx.save_for_backward(factor, solution)
        return solution

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        factor, solution = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            grad_s = _substitute(factor, grad)
            grad_gram = -grad_s @ solution.transpose(-2, -1)
        grad_shift = grad_gram.diagonal(dim1=-2, dim2=-1).sum((0, -1))
        return grad_gram, grad_s, grad_shift


def _substitute(factor: Tensor, b: Tensor) -> Tensor:
    """Return (L L^T)^-1 b for lower triangular L (..., m, m) and b (..., m, e)."""
    half = torch.linalg.solve_triangular(factor, b, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)


def ridge_solve(gram: Tensor, s: Tensor, shift: Tensor) -> Tensor:
    """Return (G + shift I)^-1 S for positive semi-definite G (B, A, m, m), S (B, A, m, e) and shift (A,) >= 0.

    1e-6 of the mean of G's diagonal is added to the shift. First derivatives only.
    """
    if is_exporting():  # torch.export takes no batch of unknown size through a Cholesky factorization
        return eliminate(gram, s, shift)
    return _RidgeSolve.apply(gram, s, shift)


def eliminate(gram: Tensor, s: Tensor, shift: Tensor) -> Tensor:
    """Return what `ridge_solve` does by Gauss-Jordan elimination: m steps of plain arithmetic, for exported programs.

    There is no pivoting, which positive definite matrices do not need.
    """
    one = torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)
    scale = JITTER * gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    table = torch.cat([gram + (shift + scale)[..., None, None] * one, s], dim=-1)  # (B, A, m, m + e)
    for k in range(gram.shape[-1]):
        row = table[..., k : k + 1, :] / table[..., k : k + 1, k : k + 1]
        table = table - (table[..., k : k + 1] - one[:, k : k + 1]) * row
    return table[..., gram.shape[-1] :]


def attention_state(k: Tensor, v: Tensor, ridge_lambda: Tensor | None) -> Tensor:
    """Return the state (B, A, m, e) of keys (B, A, N, m) and values (B, A, N, e).

    It is S where `ridge_lambda` is None, else (G + lambda I)^-1 S with lambda (A,).
    """
    num_tokens = k.shape[-2]
    s = k.transpose(-2, -1) @ v / num_tokens
    if ridge_lambda is None:
        return s
    return ridge_solve(k.transpose(-2, -1) @ k / num_tokens, s, ridge_lambda)


class LinearAttention(nn.Module):
    """q, k from the tokens by one linear map, values are the tokens themselves; A heads of width m = D/A."""

    def __init__(self, width: int, heads: int, ridge: str = "ridge") -> None:
        super().__init__()
        if ridge not in RIDGE_MODES:
            raise ValueError(f"unknown ridge mode {ridge!r}: choose one of {', '.join(RIDGE_MODES)}")
        self.heads, self.ridge = heads, ridge
        self.query_key = Linear(width, 2 * width)
        if ridge == "ridge":
            self.log_lambda = nn.Parameter(torch.zeros(heads))  # of lambda / LAMBDA_INIT

    def ridge_lambda(self) -> Tensor | None:
        """Return lambda (A,): learned, 0 for least squares, None for plain linear attention, scaled or not."""
        if self.ridge in ("none", "scaled"):
            return None
        if self.ridge == "least_squares":
            return self.query_key.weight.new_zeros(self.heads, dtype=torch.float32)
        return LAMBDA_INIT * self.log_lambda.float().exp()

    def forward(self, z: Tensor, rope: Tensor, update: Tensor | None = None) -> Tensor:
        """Map tokens (B, N, D) and the grid's table (N, m/2, 2) to (B, N, D), before kernel gate and LePE.

        `update` (2D, D) is added to the weight of queries and keys.
        """
        qk = self.query_key(z, update)
        with torch.autocast(z.device.type, enabled=False):
            qk = rotate(feature_map(qk.float()).unflatten(-1, (2 * self.heads, -1)), rope)  # (B, N, 2A, m)
            q, k = qk.unflatten(2, (2, -1)).permute(2, 0, 3, 1, 4).contiguous()  # (B, A, N, m) each
            v = z.float().unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, A, N, m)
            state = attention_state(k, v, self.ridge_lambda())
            if self.ridge == "scaled":  # S is larger than the ridge's state by a factor of about 0.6 m at first
                state = state / q.shape[-1]
            o = q @ state
            return o.transpose(1, 2).flatten(-2).to(z.dtype)


class SoftmaxAttention(nn.Module):
    """Attention of every token to every token by torch's kernels: work in proportion to N^2."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key = Linear(width, 2 * width)

    def forward(self, z: Tensor, rope: Tensor, update: Tensor | None = None) -> Tensor:
        """Map tokens (B, N, D) and the grid's table (N, m/2, 2) to (B, N, D), as `LinearAttention`."""
        qk = self.query_key(z, update).float().unflatten(-1, (2 * self.heads, -1))
        q, k = rotate(qk, rope).to(z.dtype).unflatten(2, (2, -1)).permute(2, 0, 3, 1, 4)  # (B, A, N, m) each
        v = z.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, A, N, m)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2).to(z.dtype)
