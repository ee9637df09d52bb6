"""Poly decay and SGD, one number at a time, numpy only."""

import numpy as np


def poly_rate(first_rate, *, step, steps, power):
    """rate_0 * (1 - step / steps) ** power, for 0-based step."""
    left = (steps - step) / steps
    return first_rate * np.exp(power * np.log(left))


def sgd(weight, gradients, *, rates, momentum, weight_decay):
    """Weights after each step: v = momentum v + (g + decay w), w = w - rate v; v starts at 0.

    Args:
        weight: Where it starts.
        gradients: `gradients(weight, step)`.
        rates: One a step.
        momentum: Share of the last velocity that is kept.
        weight_decay: L2 decay, inside the velocity.
    """
    weight, path = np.array(weight, np.float64), []
    velocity = np.zeros_like(weight)
    for step, rate in enumerate(rates):
        pull = gradients(weight, step) + weight_decay * weight
        velocity = momentum * velocity + pull
        weight = weight - rate * velocity
        path.append(weight)
    return path
