"""The lower bounds again, one position at a time, by bisection and by a general optimiser. Slow and obvious."""

from __future__ import annotations

import math

from scipy.optimize import Bounds, LinearConstraint, minimize


def bisect(decreasing):
    """Root of a decreasing function of L > 0, searched over log L."""
    low, high = -800.0, 800.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if decreasing(math.exp(min(middle, 700.0))) > 0 else (low, middle)
    return math.exp(min((low + high) / 2, 700.0))


def kl(p, q):
    return p * math.log(p / q) if p > 0 else 0.0


def js(p, q):
    return (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2


def lower(list_p, list_q, slack):
    """(KL, reverse KL, JS, TV) at the completion with one ratio p/q, from two dicts of token → probability."""
    shared = list_p.keys() & list_q.keys()
    a = [list_p[token] for token in list_p.keys() - shared]
    b = [list_q[token] for token in list_q.keys() - shared]
    cap_p, cap_q = min(list_p.values()), min(list_q.values())
    total_p = max(1 - math.fsum(list_p.values()), 0) + slack
    total_q = max(1 - math.fsum(list_q.values()), 0) + slack

    def x_at(ratio):
        return [min(cap_p, ratio * value) for value in b]

    def y_at(ratio):
        return [min(cap_q, value / ratio) for value in a]

    ratio = bisect(lambda r: total_p - sum(x_at(r)) - r * (total_q - sum(y_at(r))))
    x, y = x_at(ratio), y_at(ratio)
    out_q = total_q - sum(y)
    if out_q <= 0 or total_p - sum(x) <= 0:
        out_q = 0.0
        x = x_at(bisect(lambda r: total_p - sum(x_at(r))))
        y = y_at(bisect(lambda r: sum(y_at(r)) - total_q))
    out_p = max(total_p - sum(x), 0.0) if out_q else 0.0
    cells = [(list_p[token], list_q[token]) for token in shared]
    cells += [*zip(a, y, strict=True), *zip(x, b, strict=True), (out_p, out_q)]
    return (
        sum(kl(p, q) for p, q in cells),
        sum(kl(q, p) for p, q in cells),
        sum(js(p, q) for p, q in cells),
        sum(abs(p - q) for p, q in cells) / 2,
    )


def optimise(terms, start, lowers, uppers, equations):
    """Smallest value of ``terms`` (a convex function) in a box under equations ``(coefficients, total)``."""
    constraints = [LinearConstraint([coefficients], total, total) for coefficients, total in equations]
    best = math.inf
    for method_start in start:
        found = minimize(
            terms,
            method_start,
            method="SLSQP",
            bounds=Bounds(lowers, uppers),
            constraints=constraints,
            options={"maxiter": 2000, "ftol": 1e-14},
        )
        errors = [abs(sum(c * v for c, v in zip(cs, found.x, strict=True)) - total) for cs, total in equations]
        if max(errors) < 1e-9:
            best = min(best, float(found.fun))
    return best
