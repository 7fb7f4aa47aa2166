#!/usr/bin/env python3
"""Are the pinned libraries what Python imports? Whatever pip says is installed, a source tree on PYTHONPATH comes first.

Run by the image's build, and by hand in any image: python scripts/check_image.py. Exit status: 0 yes, 1 no, a line per problem.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import re
import site
import sys
import sysconfig
from pathlib import Path


def pinned() -> dict[str, tuple[str, str]]:
    """Module -> its package and the pinned version."""
    text = (Path(__file__).resolve().parents[1] / "requirements.txt").read_text()
    pins = dict(re.findall(r"^([\w-]+)(?:\[.*?\])?==([\w.]+)", text, re.M))
    modules = {"nemo.collections.llm": "nemo_toolkit", "megatron.core": "megatron-core"}
    found = {module: (package, pins[package]) for module, package in modules.items()}
    if importlib.import_module("torch").version.cuda:
        minor = ".".join(pins["transformer_engine"].split(".")[:2])  # a base's own build of it may stay
        found["transformer_engine"] = ("transformer_engine", minor)
    return found


def location(module: str) -> str:
    """File that the module is imported from."""
    try:
        return importlib.import_module(module).__file__ or ""
    except (ImportError, OSError) as error:
        if "libcuda.so" not in str(error):  # a build has no driver: that one library may be missing
            raise
    spec = importlib.util.find_spec(module)
    return (spec and spec.origin) or ""


def problems(module: str, package: str, pin: str) -> list[str]:
    try:
        version, file = importlib.metadata.version(package), location(module)
    except importlib.metadata.PackageNotFoundError:
        return [f"{package} is not installed"]
    except Exception as error:  # whatever a broken library raises while it is imported
        return [f"{module} cannot be imported: {type(error).__name__}: {error}"]
    print(f"{module} {version} from {file}", flush=True)
    found = []
    if version != pin and not version.startswith((f"{pin}.", f"{pin}+")):
        found.append(f"{package} is {version}, must be {pin}")
    places = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()}
    if not any(file.startswith(f"{place}/") for place in places):
        found.append(f"{module} is imported from {file}, not from site-packages: take that tree out of PYTHONPATH")
    return found


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    found = [problem for module, (package, pin) in pinned().items() for problem in problems(module, package, pin)]
    for problem in found:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
