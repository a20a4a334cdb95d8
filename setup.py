"""Puts the checkout's folders into one import package; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

ROOMS = ("export", "plugins", "runtime", "validation")

setup(
    packages=[
        "latentrt", *(f"latentrt.{package}" for package in find_packages("latentrt")), *(f"latentrt.{room}" for room in ROOMS),
        *(f"latentrt.{room}.{package}" for room in ROOMS for package in find_packages(room)),
    ],
    package_dir={"latentrt": "latentrt"} | {f"latentrt.{room}": room for room in ROOMS},
    package_data={"latentrt.validation.report": ["*.j2"], "latentrt.plugins.cpu": ["native/*"],
                  "latentrt.runtime.server": ["page.html"]},
)  # fmt: skip
