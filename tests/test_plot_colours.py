"""Colours of the pictures, as they are seen with all cones and without some."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from torch_spheres.plots.theme import THEMES, ink_on


def linear(colour):
    return np.array(
        [c / 12.92 if c < 0.04 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    )


def luminance(colour):
    return np.dot([0.2126, 0.7152, 0.0722], linear(colour))


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def oklab(rgb_linear):
    to_cones = [[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]]
    to_lab = [[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]]
    return np.array(to_lab) @ np.cbrt(np.clip(np.array(to_cones) @ rgb_linear, 0, None))


# Machado, Oliveira and Fernandes (2009), at the highest severity.
NO_RED = """ 0.152286  1.052583 -0.204868
             0.114503  0.786281  0.099216
            -0.003882 -0.048116  1.051998"""
NO_GREEN = """ 0.367322  0.860646 -0.227968
               0.280085  0.672501  0.047413
              -0.011820  0.042940  0.968881"""
SEEN_WITH = {
    "all cones": np.eye(3),
    "no red ones": np.array(NO_RED.split(), float).reshape(3, 3),
    "no green ones": np.array(NO_GREEN.split(), float).reshape(3, 3),
}


@pytest.mark.parametrize("theme", THEMES.values(), ids=THEMES)
def test_the_scale_goes_in_even_steps_away_from_the_background(theme):
    colours = [theme.colormap()(x) for x in np.linspace(0, 1, 33)]
    lightness = np.array([oklab(linear(c))[0] for c in colours])
    steps = np.diff(lightness)
    assert np.all(steps < 0) if theme is THEMES["light"] else np.all(steps > 0)
    assert np.ptp(steps) < 0.2 * abs(steps.mean())
    away = [contrast(c, theme.background) for c in colours]
    assert away == sorted(away)
    assert all(contrast(ink_on(c), c) > 4.5 for c in colours)


@pytest.mark.parametrize("theme", THEMES.values(), ids=THEMES)
@pytest.mark.parametrize("eyes", SEEN_WITH.values(), ids=SEEN_WITH)
def test_categories_can_be_told_apart(theme, eyes):
    together = [
        [*theme.states.values(), theme.steal],
        [*theme.phases.values(), theme.states["processing"], theme.states["waiting"], theme.steal],
        [theme.waited, theme.late, theme.unused],
    ]
    for colours in together:
        seen = [oklab(np.clip(eyes @ linear(c), 0, 1)) for c in colours]
        for (a, one), (b, other) in itertools.combinations(zip(colours, seen, strict=True), 2):
            assert np.linalg.norm(one - other) > 0.05, (a, b)


@pytest.mark.parametrize("theme", THEMES.values(), ids=THEMES)
def test_words_can_be_read(theme):
    assert contrast(theme.ink, theme.background) > 10
    assert contrast(theme.faint, theme.background) > 4.5
    assert contrast(theme.faint, theme.unused) > 4.0
