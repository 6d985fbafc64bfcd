"""The float64 exponential of the kernels, step by step in exact arithmetic: every instruction rounds once, as the GPU's does."""

import re
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy
from support import ROOT

SOURCE = (ROOT / "kernels" / "exponential_float64.cuh").read_text()


def constant(name):
    return float(re.search(rf"\b{name} = ([-0-9.e]+)", SOURCE)[1])


def fma(x, y, z):
    return float(Fraction(x) * Fraction(y) + Fraction(z))


def exponential(x):
    """exp_float64 for -708 <= x <= 709."""
    coefficients = [float(number) for number in re.search(r"COEFFICIENTS\[\] = \{(.*?)\}", SOURCE, re.S)[1].split(",")]
    k = fma(x, constant("LOG2_E"), constant("INTEGER")) - constant("INTEGER")
    r = fma(k, -constant("LN_2_LOW"), fma(k, -constant("LN_2_HIGH"), x))
    power = coefficients[0]
    for coefficient in coefficients[1:]:
        power = fma(power, r, coefficient)
    return power * 2.0 ** int(k)


def test_relative_error():
    said = float(re.search(r"relative error of at most ([0-9.e-]+) ", SOURCE)[1])
    numbers = numpy.random.default_rng(0).uniform(-1, 1, 3000) * numpy.repeat([708.0, 30.0, 0.35], 1000)
    with localcontext() as context:
        context.prec = 50
        errors = [abs(Decimal(exponential(x)) / Decimal(x).exp() - 1) for x in map(float, numbers)]
    assert 0 < max(errors) <= said
