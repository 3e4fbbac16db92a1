"""Balancing methods on two toys whose answers are known; writes the figure and the table of docs/balancing.md.

python scripts/bench/toys.py                 # prints the tables
python scripts/bench/toys.py --write docs    # writes docs/toys.png, and the tables into docs/balancing.md

The two-dimensional problem is that of Liu et al., "Conflict-Averse Gradient Descent" (arXiv 2110.14048, appendix), with
the first loss scaled by 0.1 and the five starts of Navon et al., "Multi-Task Learning as a Bargaining Game" (arXiv
2202.01017).
The regression is that of Chen et al., "GradNorm" (arXiv 1711.02257, section 4): y_i = s_i tanh((B + e_i) x).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from mtl.config.optim import BalanceConfig
from mtl.optim.balance.balance import Balance
from mtl.optim.balance.build import build_balance
from mtl.optim.balance.gradient_method import TaskGradients

# The second is (0, 0) in the paper, where torch's clamp has no gradient.
STARTS = [(-8.5, 7.5), (0.0, -0.001), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0)]
SETTINGS = {
    "sum": BalanceConfig(method="sum"),
    "mgda": BalanceConfig(method="mgda"),
    "pcgrad": BalanceConfig(method="pcgrad"),
    "cagrad": BalanceConfig(method="cagrad", preset="paper"),
    "imtlg": BalanceConfig(method="imtlg"),
    "upgrad": BalanceConfig(method="upgrad", options={"norm_eps": 1e-9}),
    "nashmtl": BalanceConfig(method="nashmtl"),
}
NUM_STEPS, RATE = 5000, 1e-2


def valley(x: Tensor) -> Tensor:
    """The two losses at a point "2": "2"."""
    one, two = x[0], x[1]
    rough = torch.stack([0.5 * (-one - 7) - torch.tanh(-two), 0.5 * (-one + 3) + torch.tanh(-two) + 2])
    upper = rough.abs().clamp(min=5e-6).log() + 6
    ends = torch.stack([7.0 - one, -7.0 - one])
    lower = (ends**2 + 0.1 * (-two - 8) ** 2) / 10 - 20
    losses = torch.tanh(0.5 * two).clamp(min=0) * upper + torch.tanh(-0.5 * two).clamp(min=0) * lower
    return losses * torch.tensor([0.1, 1.0], dtype=x.dtype)


def gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    """Losses "2" and their gradients "2 2"."""
    point = x.detach().requires_grad_()
    losses = valley(point)
    rows = [torch.autograd.grad(loss, point, retain_graph=True)[0] for loss in losses]
    return losses.detach(), torch.stack(rows)


def step_of(balance: Balance, losses: Tensor, rows: Tensor) -> Tensor:
    if balance.by_gradients is None:
        return rows.sum(dim=0)
    return balance.by_gradients.combine(TaskGradients(rows, losses)).of(rows)


def descend(setting: BalanceConfig, start: Sequence[float]) -> Tensor:
    """The points of a descent by Adam, "s 2"."""
    torch.manual_seed(0)
    balance = build_balance(setting, ["one", "two"])
    x = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    adam = torch.optim.Adam([x], lr=RATE)
    points = [x.detach().clone()]
    for _ in range(NUM_STEPS):
        losses, rows = gradients(x)
        x.grad = step_of(balance, losses, rows).to(x)
        adam.step()
        points.append(x.detach().clone())
    return torch.stack(points)


def is_on_front(x: Tensor) -> bool:
    """Whether a point is on the global front: in the lower half, and near to Pareto-stationary."""
    _, (one, other) = gradients(x)
    gap = other - one
    share = float((gap @ other / (gap @ gap)).clamp(0, 1))
    shortest = float((share * one + (1 - share) * other).norm())
    return bool(x[1] < -1) and shortest < 0.02


def regress(method: str, sigma: float, num_steps: int = 800) -> float:
    """The sum of L_i / L_i(0) after training two tasks whose labels differ in scale by `sigma`."""
    torch.manual_seed(0)
    common = torch.randn(100, 250) * math.sqrt(10)
    maps = [common + torch.randn(100, 250) * 3.5 for _ in range(2)]
    scales = [1.0, sigma]
    trunk = nn.Sequential(*(layer for i in range(4) for layer in (nn.Linear(250 if i == 0 else 100, 100), nn.ReLU())))
    heads = nn.ModuleList(nn.Linear(100, 100) for _ in range(2))
    options = {"alpha": 0.12, "warmup_steps": 1} if method == "gradnorm" else {}
    balance = build_balance(BalanceConfig(method=method, options=options), ["one", "two"])
    shared = list(trunk.parameters())
    adam = torch.optim.Adam([*shared, *heads.parameters()], lr=1e-3)
    first: Tensor | None = None
    recent = list[Tensor]()
    for _ in range(num_steps):
        x = torch.randn(200, 250) / math.sqrt(250)
        features = trunk(x)
        losses = torch.stack(
            [
                (head(features) - scale * torch.tanh(x @ m.T)).square().mean()
                for head, scale, m in zip(heads, scales, maps, strict=True)
            ]
        )
        first = losses.detach() if first is None else first
        adam.zero_grad()
        if balance.by_gradients is None:
            balance(losses).backward()
        else:
            rows = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in losses]
            flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
            combined = balance.by_gradients.combine(TaskGradients(flat, losses.detach()))
            weights = torch.ones(2) if combined.head_weights is None else combined.head_weights
            (weights @ losses).backward(inputs=list(heads.parameters()), retain_graph=True)
            for parameter, part in zip(shared, combined.of(flat).split([p.numel() for p in shared]), strict=True):
                parameter.grad = part.view_as(parameter)
        adam.step()
        recent = [*recent[-49:], losses.detach()]
    assert first is not None
    return float((torch.stack(recent).mean(0) / first).sum())


def figure(paths: dict[str, list[Tensor]]) -> Figure:
    """A panel for each method: the descents from the five starts."""
    drawn = Figure(figsize=(2.1 * len(paths), 2.4), layout="constrained")
    axes = drawn.subplots(1, len(paths), sharey=True)
    ticks = torch.linspace(-10.5, 10.5, 120, dtype=torch.float64)
    total = torch.stack([torch.stack([valley(torch.stack([a, b])).sum() for a in ticks]) for b in ticks])
    for axis, (name, own) in zip(axes, paths.items(), strict=True):
        axis.contour(ticks, ticks, total, levels=20, linewidths=0.3, colors="gray")
        axis.plot([-7, 7], [-8, -8], color="C2", linewidth=3, alpha=0.5)
        for points in own:
            axis.plot(points[::10, 0], points[::10, 1], color="C0", linewidth=0.8)
            axis.plot(*points[0], "o", color="black", markersize=3)
            axis.plot(*points[-1], "*", color="C2" if is_on_front(points[-1]) else "C3", markersize=7)
        axis.set_title(name, fontsize=8)
        axis.tick_params(labelsize=6)
    return drawn


def tables(paths: dict[str, list[Tensor]], regressions: dict[str, list[float]], sigmas: Sequence[float]) -> str:
    lines = ["| method | starts that reach the front |", "|---|---|"]
    for name, own in paths.items():
        reached = [f"({x:g}, {y:g})" for (x, y), points in zip(STARTS, own, strict=True) if is_on_front(points[-1])]
        lines.append(f"| `{name}` | {len(reached)} of 5{': ' + ', '.join(reached) if 0 < len(reached) < 5 else ''} |")
    titles = " | ".join(f"scales 1 and {sigma:g}" for sigma in sigmas)
    lines += ["", f"| method | {titles} |", f"|---|{'---|' * len(sigmas)}"]
    for name, values in regressions.items():
        lines.append(f"| `{name}` | {' | '.join(f'{value:.3f}' for value in values)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="the folder of the docs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    paths = {name: [descend(setting, start) for start in STARTS] for name, setting in SETTINGS.items()}
    sigmas = (1.0, 10.0, 100.0)
    methods = ("sum", "gradnorm", "uw", "imtlg", "dbmtl")
    found = tables(paths, {method: [regress(method, sigma) for sigma in sigmas] for method in methods}, sigmas)
    sys.stdout.write(found + "\n")
    if options.write is not None:
        figure(paths).savefig(options.write / "toys.png", dpi=110)
        page = options.write / "balancing.md"
        before, rest = page.read_text().split("<!-- toys -->\n")
        page.write_text(f"{before}<!-- toys -->\n{found}\n<!-- end of toys -->{rest.split('<!-- end of toys -->')[1]}")


if __name__ == "__main__":
    main()
