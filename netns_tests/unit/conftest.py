"""Hypothesis for these tests: nothing is written into the checkout, and a slow machine is no failure."""

import os

from hypothesis import settings
from hypothesis.configuration import set_hypothesis_home_dir

set_hypothesis_home_dir(os.devnull)
settings.register_profile("tproxyd", database=None, deadline=None)
settings.load_profile("tproxyd")
