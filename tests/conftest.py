"""Toy models gain nothing from threads, and several processes that spin on two cores lose a lot."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in child processes
